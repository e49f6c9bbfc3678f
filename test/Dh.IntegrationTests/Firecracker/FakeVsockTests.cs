using System.Net.Sockets;
using System.Text;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>The fake's vsock socket, as the original's behaves.</summary>
public sealed class FakeVsockTests : IAsyncLifetime
{
    private const string Resumed = """{"state":"Resumed"}""";
    private const string Paused = """{"state":"Paused"}""";
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(10);

    private readonly FakeFirecracker _fake = new();
    private readonly TempDir _snapshot = new();

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    public async ValueTask InitializeAsync() => await _fake.MakeSnapshotAsync(_snapshot.Path, 8);

    [Fact(Timeout = 60_000)]
    public async Task The_guest_answers_over_it()
    {
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        // What follows the CONNECT line may come with it.
        await using var vsock = process.ConnectVsock();
        await vsock.WriteAsync((byte[])[.. "CONNECT 5252\n"u8, .. FakeGuest.Frame("""{"type":"hello"}""")], Cancellation);
        Assert.Matches(@"^OK \d+$", await ReadLineAsync(vsock));
        byte[] answer = [.. FakeGuest.Frame(FakeGuest.Ready), .. FakeGuest.Frame(FakeGuest.Hello)];
        byte[] heard = new byte[answer.Length];
        await vsock.ReadExactlyAsync(heard, Cancellation);
        Assert.Equal(answer, heard);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_refusal_is_end_of_file_without_a_word()
    {
        _fake.Guest.Port = 5252;
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        Assert.Equal("", await ConnectAsync(process, "CONNECT 5253\n"));
        Assert.StartsWith("OK ", await ConnectAsync(process, "CONNECT 5252\n"), StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task Before_the_resume_a_connection_gets_OK_and_then_a_reset()
    {
        var (process, api) = await LoadAsync(resume: false);
        using var _ = process;
        using var __ = api;
        await using var vsock = process.ConnectVsock();
        await vsock.WriteAsync((byte[])[.. "CONNECT 5252\n"u8, .. FakeGuest.Frame("""{"type":"hello"}""")], Cancellation);
        Assert.StartsWith("OK ", await ReadLineAsync(vsock), StringComparison.Ordinal);
        var reset = await Assert.ThrowsAsync<IOException>(() => ReadLineAsync(vsock));
        Assert.Equal(SocketError.ConnectionReset, Assert.IsType<SocketException>(reset.InnerException).SocketErrorCode);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("1.16.1", false)]
    [InlineData("1.15.0", true)]
    [InlineData("1.17.0", true)]
    public async Task A_second_resume_is_answered_with_204_and_on_1_16_the_end_of_vsock(string version, bool answers)
    {
        _fake.Play($"version {version}", "snapshot-version 10.0.0");
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        Assert.StartsWith("OK ", await ConnectAsync(process, "CONNECT 1\n"), StringComparison.Ordinal);
        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", Resumed)).Status);
        Assert.Equal(answers, await AnswersAsync(process));
        Assert.Equal(200, (await api.AskAsync("GET", "/")).Status);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(false, false)]
    [InlineData(true, true)]
    public async Task A_resume_after_a_pause_needs_a_snapshot_between_them(bool snapshot, bool answers)
    {
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", Paused)).Status);
        if (snapshot)
        {
            Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/create", $$$"""{"snapshot_path":"{{{_snapshot["state2"]}}}","mem_file_path":"{{{_snapshot["memory2"]}}}"}""")).Status);
        }

        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", Resumed)).Status);
        Assert.Equal(answers, await AnswersAsync(process));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_host_that_ends_its_sending_side_loses_the_reply()
    {
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        await using var vsock = process.ConnectVsock();
        await vsock.WriteAsync(Encoding.ASCII.GetBytes("CONNECT 5252\n"), Cancellation);
        Assert.StartsWith("OK ", await ReadLineAsync(vsock), StringComparison.Ordinal);
        await vsock.ReadExactlyAsync(new byte[FakeGuest.Frame(FakeGuest.Ready).Length], Cancellation);
        // The run's reply waits for the end of the program.
        var done = new TaskCompletionSource();
        _fake.Guest.Programs["wait"] = async run =>
        {
            await done.Task;
            return 0;
        };
        await vsock.WriteAsync(FakeGuest.Frame("""{"type":"exec","id":1}""", "wait"u8.ToArray()), Cancellation);
        vsock.Socket.Shutdown(SocketShutdown.Send);
        Assert.Equal("", await ReadLineAsync(vsock));
        done.SetResult();
    }

    [Theory(Timeout = 60_000)]
    [InlineData("vsock refuse 2", "", "", "OK")]
    [InlineData("vsock garbage", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1")]
    public async Task It_answers_wrongly_when_the_script_says_so(string line, params string[] answers)
    {
        _fake.Play(line);
        var (process, api) = await LoadAsync(resume: true);
        using var _ = process;
        using var __ = api;
        foreach (string answer in answers)
        {
            Assert.Equal(answer, (await ConnectAsync(process, "CONNECT 5252\n")).Split(' ')[0]);
        }
    }

    [Fact(Timeout = 60_000)]
    public async Task An_empty_path_is_a_socket_that_nobody_can_find()
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        string load = $$$"""{"snapshot_path":"{{{_snapshot["state"]}}}","mem_backend":{"backend_type":"File","backend_path":"{{{_snapshot["memory"]}}}"},"vsock_override":{"uds_path":""}}""";
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", load)).Status);
        Assert.Equal(["api.sock"], Directory.GetFileSystemEntries(process.Directory).Select(Path.GetFileName));
    }

    public ValueTask DisposeAsync()
    {
        _fake.Dispose();
        _snapshot.Dispose();
        return ValueTask.CompletedTask;
    }

    private static async Task<string> ConnectAsync(FakeFirecrackerProcess process, string line)
    {
        await using var vsock = process.ConnectVsock();
        await vsock.WriteAsync(Encoding.ASCII.GetBytes(line), Cancellation);
        return await ReadLineAsync(vsock);
    }

    private static async Task<bool> AnswersAsync(FakeFirecrackerProcess process)
    {
        var answer = ConnectAsync(process, "CONNECT 5252\n");
        return await Task.WhenAny(answer, Task.Delay(500, Cancellation)) == answer && (await answer).StartsWith("OK ", StringComparison.Ordinal);
    }

    /// <summary>A line without its end; what has come before the end of file.</summary>
    private static async Task<string> ReadLineAsync(Stream stream)
    {
        var line = new StringBuilder();
        byte[] next = new byte[1];
        while (await stream.ReadAsync(next, Cancellation).AsTask().WaitAsync(Bound, Cancellation) == 1 && next[0] != '\n')
        {
            line.Append((char)next[0]);
        }

        return line.ToString();
    }

    private async Task<(FakeFirecrackerProcess Process, RawHttp Api)> LoadAsync(bool resume)
    {
        var process = await _fake.StartAsync();
        var api = process.Connect();
        string load = $$$"""{"snapshot_path":"{{{_snapshot["state"]}}}","mem_backend":{"backend_type":"File","backend_path":"{{{_snapshot["memory"]}}}"}}""";
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", load)).Status);
        if (resume)
        {
            Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", Resumed)).Status);
        }

        return (process, api);
    }
}
