using System.Diagnostics;
using System.Net.Sockets;
using System.Text.Json;
using Dh.Guest;
using Dh.IntegrationTests.Paging;
using Dh.Linux;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary><c>dh page-server</c> as docs/page-server.md shows it.</summary>
public sealed class PageServerCommandTests(PreparedHome prepared) : IDisposable
{
    private const long Size = 16 << 20;
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(30);

    private readonly TempDir _directory = new();

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    private string SocketPath => _directory["uffd.sock"];

    [Fact(Timeout = 120_000)]
    public async Task A_QEMU_that_was_started_by_hand_runs_on_memory_that_it_serves()
    {
        var snapshot = new SnapshotStore(prepared.Home).FindNewest("python")!;
        string channelPath = _directory["channel.sock"];
        using var server = await StartAsync("--memory", snapshot.MemoryPath, "--working-set", snapshot.WorkingSetPath, "--json");
        using var qemu = Process.Start(new ProcessStartInfo("bash", [Repository.PathOf("contrib/qemu-restore.sh"), snapshot.Directory, SocketPath, Repository.PathOf("bin/native/vmm_preload.so"), channelPath])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!;
        try
        {
            var socket = await ConnectAsync(channelPath);
            using (var session = new GuestSession(new SocketTransport(socket)))
            {
                await session.GreetAsync(Bound, Cancellation);
                var output = new Output();
                var result = await session.ExecuteAsync(new ExecutionRequest { Source = "print('by hand'); 6 * 7" }, output, Cancellation);
                Assert.Equal((0, "42", "by hand\n"), (result.ExitCode, result.ResultRepr, output.Text));
            }
        }
        finally
        {
            qemu.StandardInput.Close(); // the script ends its QEMU
            await qemu.WaitForExitAsync(Cancellation).WaitAsync(Bound, Cancellation);
        }

        using var report = JsonDocument.Parse(await server.StandardOutput.ReadToEndAsync(Cancellation));
        await server.WaitForExitAsync(Cancellation);
        Assert.Equal(0, server.ExitCode);
        Assert.Equal(("vmm_ended", "prefetch"), (report.RootElement.GetProperty("outcome").GetString(), report.RootElement.GetProperty("policy").GetString()));
        Assert.InRange(report.RootElement.GetProperty("faults").GetInt64(), 1, long.MaxValue);
        Assert.False(File.Exists(SocketPath));
    }

    [Theory(Timeout = 60_000)]
    [InlineData("eager", "released")]
    [InlineData("lazy", "vmm_ended")]
    public async Task It_says_what_it_did(string policy, string outcome)
    {
        using var server = await StartAsync("--memory", MemoryFile(), "--policy", policy, "--json");
        await using (var client = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size))
        {
            await client.SentAsync();
            Assert.Equal(Size / 4096, (await client.HashPagesAsync()).Length);
        }

        using var report = JsonDocument.Parse(await server.StandardOutput.ReadToEndAsync(Cancellation));
        await server.WaitForExitAsync(Cancellation);
        Assert.Equal((0, outcome, policy), (server.ExitCode, report.RootElement.GetProperty("outcome").GetString(), report.RootElement.GetProperty("policy").GetString()));
        Assert.Equal(Size, report.RootElement.GetProperty("total_bytes").GetInt64());
        Assert.InRange(report.RootElement.GetProperty("copied_bytes").GetInt64(), 1, Size);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_recording_becomes_a_working_set_for_the_next_VMM()
    {
        string memory = MemoryFile(), set = _directory["working-set"];
        using (var server = await StartAsync("--memory", memory, "--record", set))
        {
            await using (var client = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size))
            {
                await client.SentAsync();
                await client.HashPagesAsync();
            }

            await server.WaitForExitAsync(Cancellation);
            Assert.Equal(0, server.ExitCode);
        }

        using var next = await StartAsync("--memory", memory, "--working-set", set, "--json");
        await using (var client = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size))
        {
            await client.SentAsync();
            await client.HashPagesAsync();
        }

        using var report = JsonDocument.Parse(await next.StandardOutput.ReadToEndAsync(Cancellation));
        Assert.Equal(0, report.RootElement.GetProperty("faults").GetInt64() - ZeroFaults(report));
        Assert.Equal(report.RootElement.GetProperty("copied_bytes").GetInt64(), report.RootElement.GetProperty("populated_bytes").GetInt64());
    }

    [Fact(Timeout = 60_000)]
    public async Task It_serves_several_VMMs_at_once_until_it_is_told_to_end_and_takes_them_with_it()
    {
        using var server = await StartAsync("--memory", MemoryFile(), "--policy", "lazy", "--serve-forever");
        await using var first = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size);
        await using var second = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size);
        await first.SentAsync();
        await second.SentAsync();
        Assert.Equal(await first.HashPagesAsync(), await second.HashPagesAsync());

        Assert.Equal(143, await Processes.EndAsync(server, "TERM"));
        first.WaitForExit();
        second.WaitForExit();
        Assert.False(File.Exists(SocketPath));
    }

    [Fact(Timeout = 60_000)]
    public async Task It_takes_the_socket_that_systemd_has_opened()
    {
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(SocketPath));
        listener.Listen();
        // As systemd does: descriptor 3, and variables that name the process.
        string command = $"export LISTEN_PID=$$ LISTEN_FDS=1; exec {Repository.PathOf("bin/dh")} page-server --memory {MemoryFile()}";
        using var server = ChildProcess.Start("/bin/sh", ["-c", command], new Dictionary<string, string>(), [(3, listener.SafeHandle)]);
        await using var client = await GuestMemoryClient.ConnectAsync(SocketPath, "normal", Size);
        await client.SentAsync();
        Assert.Equal(Size / 4096, (await client.HashPagesAsync()).Length);
        Assert.True(server.WaitAndReap(Bound), "it does not end although it has released its VMM");
    }

    [Theory]
    [InlineData(2, "Give --socket PATH", "--memory", "/no/such/file")]
    [InlineData(125, "Memory file /no/such/file cannot be opened", "--memory", "/no/such/file", "--socket", "SOCKET")]
    [InlineData(2, "--policy prefetch needs --working-set FILE", "--memory", "/no/such/file", "--socket", "SOCKET", "--policy", "prefetch")]
    [InlineData(2, "--record serves one VMM lazily", "--memory", "/no/such/file", "--socket", "SOCKET", "--record", "set", "--fill")]
    [InlineData(2, "a power of two", "--memory", "/no/such/file", "--socket", "SOCKET", "--block", "12")]
    [InlineData(125, "No VMM connected within 0.2 s.", "--memory", "MEMORY", "--socket", "SOCKET", "--timeout", "0.2")]
    public async Task What_makes_no_sense_is_said(int exitCode, string message, params string[] arguments)
    {
        string[] real = [.. arguments.Select(argument => argument switch { "SOCKET" => SocketPath, "MEMORY" => MemoryFile(), _ => argument })];
        var result = await prepared.Dh.RunAsync(["page-server", .. real]);
        Assert.Equal((exitCode, ""), (result.ExitCode, result.Output));
        Assert.Contains(message, result.Error, StringComparison.Ordinal);
        Assert.False(File.Exists(SocketPath));
    }

    public void Dispose() => _directory.Dispose();

    private static long ZeroFaults(JsonDocument report) =>
        // Holes that are too short to be given back are zeroed by the block.
        report.RootElement.GetProperty("zeroed_bytes").GetInt64() == 0 ? 0 : report.RootElement.GetProperty("faults").GetInt64();

    private static async Task<Socket> ConnectAsync(string path)
    {
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            try
            {
                await socket.ConnectAsync(new UnixDomainSocketEndPoint(path), Cancellation);
                return socket;
            }
            catch (SocketException) when (Stopwatch.GetElapsedTime(start) < Bound)
            {
                socket.Dispose();
                await Task.Delay(20, Cancellation);
            }
        }
    }

    /// <summary>Starts it, and waits until a VMM can connect.</summary>
    private async Task<Process> StartAsync(params string[] arguments)
    {
        var server = prepared.Dh.Start(["page-server", "--socket", SocketPath, .. arguments]);
        Assert.Equal($"dh: listening on {SocketPath} for a VMM", await server.StandardError.ReadLineAsync(Cancellation));
        return server;
    }

    private string MemoryFile() => SparseFileBuilder.Write(_directory["memory"], Size, holes: true);

    private sealed class Output : IOutputSink
    {
        public string Text { get; private set; } = "";

        public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
        {
            Text += System.Text.Encoding.UTF8.GetString(bytes.Span);
            return ValueTask.CompletedTask;
        }
    }
}
