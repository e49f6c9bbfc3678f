using System.Net.Sockets;
using System.Text;
using Dh.TestSupport;
using Dh.Vmm.Firecracker;

namespace Dh.Tests.Vmm.Firecracker;

/// <summary>Connections to a guest: refused ones are tried again for a bounded time, wrong answers end them, and what follows the answer is the guest's.</summary>
public sealed class VsockConnectionTests : IDisposable
{
    private static readonly TimeSpan Short = TimeSpan.FromMilliseconds(300);
    private static readonly TimeSpan Long = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);

    public VsockConnectionTests()
    {
        _listener.Bind(new UnixDomainSocketEndPoint(_directory["v.sock"]));
        _listener.Listen();
    }

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    [Fact(Timeout = 30_000)]
    public async Task What_follows_the_answer_is_read_by_whoever_reads_next()
    {
        var connecting = ConnectAsync(Long);
        using var accepted = await AcceptAsync("CONNECT 5252\n");
        await accepted.SendAsync("OK 1073741824\nhello"u8.ToArray(), Cancellation);
        using var connected = await connecting;
        byte[] heard = new byte[16];
        Assert.Equal("hello", Encoding.UTF8.GetString(heard, 0, await connected.ReceiveAsync(heard, Cancellation)));
    }

    [Fact(Timeout = 30_000)]
    public async Task A_refused_connection_is_tried_again()
    {
        var connecting = ConnectAsync(Long);
        for (int i = 0; i < 3; i++)
        {
            (await AcceptAsync("CONNECT 5252\n")).Dispose();
        }

        using var accepted = await AcceptAsync("CONNECT 5252\n");
        await accepted.SendAsync("OK 1\n."u8.ToArray(), Cancellation);
        using var connected = await connecting;
        Assert.True(connected.Connected);
    }

    [Fact(Timeout = 30_000)]
    public async Task A_connection_that_is_dropped_before_the_guest_has_spoken_is_tried_again()
    {
        var connecting = ConnectAsync(Long);
        var dropped = await AcceptAsync("CONNECT 5252\n");
        await dropped.SendAsync("OK 1\n"u8.ToArray(), Cancellation);
        dropped.Dispose();
        using var accepted = await AcceptAsync("CONNECT 5252\n");
        await accepted.SendAsync("OK 2\n."u8.ToArray(), Cancellation);
        using var connected = await connecting;
        byte[] heard = new byte[2];
        Assert.Equal(1, await connected.ReceiveAsync(heard, Cancellation));
        Assert.Equal((byte)'.', heard[0]);
    }

    [Fact(Timeout = 30_000)]
    public async Task A_guest_that_refuses_for_ever_is_given_up()
    {
        using var refusing = new CancellationTokenSource();
        var refused = Task.Run(
            async () =>
            {
                while (!refusing.IsCancellationRequested)
                {
                    (await _listener.AcceptAsync(refusing.Token)).Dispose();
                }
            },
            Cancellation);
        var error = await Assert.ThrowsAsync<DhException>(() => ConnectAsync(Short));
        Assert.Equal(DhErrorReason.Guest, error.Reason);
        Assert.Matches(@"^The guest's runner took no connection on vsock port 5252 within 0\.\d s \(\d+ attempts, the last: (it was refused|ConnectionReset|Shutdown)\)\.$", error.Message);
        await refusing.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => refused);
    }

    [Fact(Timeout = 30_000)]
    public async Task A_guest_that_keeps_silent_is_given_up()
    {
        var error = await Assert.ThrowsAsync<DhException>(() => ConnectAsync(Short));
        Assert.Contains("(1 attempts, the last: it was not answered)", error.Message, StringComparison.Ordinal);
    }

    [Fact(Timeout = 30_000)]
    public async Task A_socket_that_is_not_there_is_given_up()
    {
        var error = await Assert.ThrowsAsync<DhException>(() => VsockConnection.ConnectAsync(_directory["none.sock"], 5252, Short, Cancellation));
        Assert.Contains("took no connection", error.Message, StringComparison.Ordinal);
    }

    [Theory(Timeout = 30_000)]
    [InlineData("FAIL 1\n", "FAIL 1")]
    [InlineData("OK", "OK")]
    [InlineData("0123456789012345678901234567890123456789", "01234567890123456789012345678901")]
    public async Task A_wrong_answer_ends_it(string answer, string shown)
    {
        var connecting = ConnectAsync(Long);
        var accepted = await AcceptAsync("CONNECT 5252\n");
        await accepted.SendAsync(Encoding.ASCII.GetBytes(answer), Cancellation);
        accepted.Dispose();
        var error = await Assert.ThrowsAsync<DhException>(() => connecting);
        Assert.Equal($"Firecracker answered `CONNECT 5252` with \"{shown}\" instead of OK.", error.Message);
    }

    public void Dispose()
    {
        _listener.Dispose();
        _directory.Dispose();
    }

    private Task<Socket> ConnectAsync(TimeSpan timeLimit) => VsockConnection.ConnectAsync(_directory["v.sock"], 5252, timeLimit, Cancellation);

    private async Task<Socket> AcceptAsync(string line)
    {
        var accepted = await _listener.AcceptAsync(Cancellation);
        byte[] heard = new byte[line.Length];
        for (int at = 0; at < heard.Length;)
        {
            at += await accepted.ReceiveAsync(heard.AsMemory(at), Cancellation);
        }

        Assert.Equal(line, Encoding.ASCII.GetString(heard));
        return accepted;
    }
}
