using System.Net.Sockets;
using Dh.Linux;
using Dh.TestSupport;

namespace Dh.Tests.Linux;

public sealed class UnixSocketsTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMilliseconds(50);

    private readonly TempDir _directory = new();

    [Fact(Timeout = 10_000)]
    public async Task A_connection_is_made_or_given_up()
    {
        string path = _directory["socket"];
        Assert.Equal(Errno.ENOENT, Fails(path).Errno);
        using var listener = new Socket(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(path));
        Assert.StartsWith($"connect {path}: ", Fails(path).Message, StringComparison.Ordinal);
        listener.Listen(backlog: 0);
        using var first = UnixSockets.Connect(path, UnixSocketKind.SequencedPacket, Limit);
        Assert.Equal(Errno.EAGAIN, Fails(path).Errno); // nobody accepts
        FdPassing.Send(first, "hello"u8);
        using var accepted = await listener.AcceptAsync(TestContext.Current.CancellationToken);
        byte[] heard = new byte[16];
        Assert.Equal(5, await accepted.ReceiveAsync(heard, TestContext.Current.CancellationToken));
    }

    [Fact]
    public void A_path_that_is_too_long_is_refused() =>
        Assert.Throws<ArgumentException>(() => UnixSockets.Connect(new string('x', UnixSockets.MaxPathLength + 1), UnixSocketKind.Stream, Limit));

    public void Dispose() => _directory.Dispose();

    private static LinuxException Fails(string path) => Assert.Throws<LinuxException>(() => UnixSockets.Connect(path, UnixSocketKind.SequencedPacket, Limit));
}
