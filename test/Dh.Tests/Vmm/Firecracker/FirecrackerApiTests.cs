using System.Net.Sockets;
using System.Text;
using Dh.TestSupport;
using Dh.Vmm;
using Dh.Vmm.Firecracker;

namespace Dh.Tests.Vmm.Firecracker;

/// <summary>Requests to the letter, answers however they come, and a Firecracker that does not answer is killed.</summary>
public sealed class FirecrackerApiTests : IDisposable
{
    private static readonly TimeSpan Short = TimeSpan.FromMilliseconds(300);
    private static readonly TimeSpan Long = TimeSpan.FromSeconds(20);

    private readonly Peer _peer = new();
    private readonly FirecrackerApi _api;
    private int _kills;

    public FirecrackerApiTests() => _api = new FirecrackerApi(_peer.Near, () => _kills++, () => Task.FromResult(" (exit code 1)."), () => ", waited for the page server,");

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    [Fact(Timeout = 30_000)]
    public async Task A_request_has_its_length_and_no_chunks()
    {
        var asking = _api.PatchAsync("/vm", new VmState("Resumed"), FirecrackerJson.Default.VmState, Long, Cancellation);
        await _peer.HearTextAsync("PATCH /vm HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}");
        await _peer.SayAsync("HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n");
        await asking;
    }

    [Fact(Timeout = 30_000)]
    public async Task A_question_has_no_body()
    {
        var asking = _api.GetAsync("/", FirecrackerJson.Default.InstanceInformation, Long, Cancellation);
        await _peer.HearTextAsync("GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n");
        await _peer.SayAsync("HTTP/1.1 200 \r\ncontent-length: 100\r\n\r\n");
        await _peer.SayAsync("""{"id":"anonymous-instance","state":"Not started","vmm_version":"1.16.1","app_name":"Firecracker"}    """);
        Assert.Equal(new InstanceInformation("anonymous-instance", "Not started", "1.16.1", "Firecracker"), await asking);
    }

    [Fact(Timeout = 30_000)]
    public async Task An_answer_may_come_byte_by_byte_and_without_a_reason()
    {
        var asking = PutAsync(Long);
        foreach (char c in "HTTP/1.1 204\r\n\r\n")
        {
            await _peer.SayAsync(c.ToString());
            await Task.Yield();
        }

        await asking;
    }

    [Fact(Timeout = 30_000)]
    public async Task One_connection_takes_many_requests()
    {
        for (int i = 0; i < 3; i++)
        {
            var asking = PutAsync(Long);
            await _peer.SayAsync(i == 1 ? Answer(400, """{"fault_message":"no"}""") : "HTTP/1.1 204 \r\n\r\n");
            await (i == 1 ? Assert.ThrowsAsync<VmmException>(() => asking) : asking);
        }
    }

    [Theory(Timeout = 30_000)]
    [InlineData("""{"fault_message":"Load snapshot error: bitcode error"}""", "Load snapshot error: bitcode error")]
    [InlineData("""{"error":"Too many open connections"}""", "Too many open connections")]
    [InlineData("not JSON\u001b[2J", "not JSON [2J")]
    [InlineData("", "it does not say why")]
    public async Task A_refusal_has_the_fault_and_the_request(string body, string fault)
    {
        var asking = PutAsync(Long);
        await _peer.SayAsync(Answer(400, body));
        var error = await Assert.ThrowsAsync<VmmException>(() => asking);
        Assert.Equal($"Firecracker refused `PUT /entropy` (400): {fault}", error.Message);
        Assert.Equal("PUT /entropy", error.Request);
        Assert.Equal(body.Length == 0 ? "" : fault, error.FaultMessage);
        Assert.Equal(0, _kills);
    }

    [Fact(Timeout = 30_000)]
    public async Task Whoever_does_not_answer_in_time_is_killed()
    {
        var error = await Assert.ThrowsAsync<DhException>(() => PutAsync(Short));
        Assert.Equal("Firecracker did not answer `PUT /entropy` within 0.3 s, waited for the page server, and was killed (exit code 1).", error.Message);
        Assert.Equal(1, _kills);
    }

    [Fact(Timeout = 30_000)]
    public async Task Half_an_answer_is_none()
    {
        var asking = PutAsync(Short);
        await _peer.SayAsync("HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\n{");
        Assert.Equal(DhErrorReason.Vmm, (await Assert.ThrowsAsync<DhException>(() => asking)).Reason);
        Assert.Equal(1, _kills);
    }

    [Theory(Timeout = 30_000)]
    [InlineData("")]
    [InlineData("HTTP/1.1 204 \r\nServer")]
    public async Task One_that_ends_is_said_to_have_ended(string said)
    {
        var asking = PutAsync(Long);
        await _peer.SayAsync(said);
        _peer.HangUp();
        var error = await Assert.ThrowsAsync<DhException>(() => asking);
        Assert.Equal("Firecracker ended before it had answered `PUT /entropy` (exit code 1).", error.Message);
    }

    [Theory(Timeout = 30_000)]
    [InlineData("SSH-2.0-OpenSSH\r\n\r\n", "its first line is \"SSH-2.0-OpenSSH\"")]
    [InlineData("HTTP/1.1 20x OK\r\n\r\n", "its first line is \"HTTP/1.1 20x OK\"")]
    [InlineData("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "its body's length is \"-1\"")]
    [InlineData("HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", "its body's length is \"1048577\"")]
    [InlineData("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "its body has no length")]
    public async Task What_is_not_HTTP_is_refused(string said, string what)
    {
        var asking = PutAsync(Long);
        await _peer.SayAsync(said);
        var error = await Assert.ThrowsAsync<DhException>(() => asking);
        Assert.Equal($"Firecracker broke HTTP when it answered `PUT /entropy`: {what}.", error.Message);
    }

    [Fact(Timeout = 30_000)]
    public async Task An_endless_head_is_refused()
    {
        var asking = PutAsync(Long);
        await _peer.SayAsync($"HTTP/1.1 200 OK\r\nX: {new string('x', 20_000)}");
        Assert.Contains("bytes before its body", (await Assert.ThrowsAsync<DhException>(() => asking)).Message, StringComparison.Ordinal);
    }

    [Fact(Timeout = 30_000)]
    public async Task A_request_that_Firecracker_would_not_take_is_not_sent()
    {
        var error = await Assert.ThrowsAsync<DhException>(() => _api.PutAsync("/boot-source", new string('x', 60_000), Long, Cancellation));
        Assert.Equal("`PUT /boot-source` has 60000 bytes; Firecracker takes at most 51200.", error.Message);
    }

    [Fact(Timeout = 30_000)]
    public async Task It_connects_as_soon_as_somebody_listens()
    {
        using var directory = new TempDir();
        var connecting = ConnectAsync(directory, Long, new TaskCompletionSource<VmmExit>().Task);
        await Task.Delay(50, Cancellation);
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(directory["api.sock"]));
        listener.Listen();
        (await connecting).Dispose();
        Assert.Equal(0, _kills);
    }

    [Fact(Timeout = 30_000)]
    public async Task One_that_never_listens_is_killed()
    {
        using var directory = new TempDir();
        var error = await Assert.ThrowsAsync<DhException>(() => ConnectAsync(directory, Short, new TaskCompletionSource<VmmExit>().Task));
        Assert.StartsWith("Firecracker did not listen for requests within 0.3 s", error.Message, StringComparison.Ordinal);
        Assert.Equal(1, _kills);
    }

    [Fact(Timeout = 30_000)]
    public async Task One_that_ends_at_once_is_not_waited_for()
    {
        using var directory = new TempDir();
        var error = await Assert.ThrowsAsync<DhException>(() => ConnectAsync(directory, Long, Task.FromResult(new VmmExit(1, 0))));
        Assert.Equal("Firecracker ended before it listened for requests (exit code 1).", error.Message);
    }

    public void Dispose()
    {
        _api.Dispose();
        _peer.Dispose();
    }

    private static string Answer(int status, string body) => $"HTTP/1.1 {status} \r\nContent-Length: {Encoding.UTF8.GetByteCount(body)}\r\n\r\n{body}";

    private Task PutAsync(TimeSpan timeLimit) => _api.PutAsync("/entropy", new EntropyDevice(), FirecrackerJson.Default.EntropyDevice, timeLimit, Cancellation);

    private Task<FirecrackerApi> ConnectAsync(TempDir directory, TimeSpan timeLimit, Task<VmmExit> exited) => FirecrackerApi.ConnectAsync(
        directory["api.sock"], timeLimit, exited, () => _kills++, () => Task.FromResult(" (exit code 1)."), () => "", Cancellation);

    private sealed class Peer : FakePeer
    {
        public async Task HearTextAsync(string expected) => Assert.Equal(expected, Encoding.ASCII.GetString(await HearAsync(expected.Length)));
    }
}
