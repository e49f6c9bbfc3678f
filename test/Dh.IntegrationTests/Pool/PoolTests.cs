using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;
using Dh.IntegrationTests.Guests;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Pool;

/// <summary>Runs in sandboxes that were ready: as right as any other, each in one of its own, and nothing is left however it ends.</summary>
public sealed class PoolTests(PreparedHome prepared)
{
    private const string Took = "Pool: took a sandbox that was ready";

    private int _port;

    private static CancellationToken Test => TestContext.Current.CancellationToken;

    [Fact]
    public async Task A_pooled_run_is_as_one_that_has_restored_its_own_sandbox()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "2");
        string script = own.Write("script.py", "import sys; print(sys.argv[1:], input()); print('e', file=sys.stderr); sys.exit(7)");
        Assert.Equal(new ProgramResult(7, "['a'] in\n", "e\n"), await own.Dh.RunAsync(["exec", script, "a"], "in\n"));
        Assert.Equal((3, true), Ending(await own.Dh.ExecAsync("while True: pass", "--timeout", "0.2", "-v")));
        using (var interrupted = own.Dh.Start(["exec", "-c", "print('started', flush=True)\nwhile True: pass"]))
        {
            Assert.Equal("started", await interrupted.StandardOutput.ReadLineAsync(Test));
            Assert.Equal(130, await Processes.EndAsync(interrupted, "INT"));
        }

        foreach (string code in (string[])["1 + 1", "print('o'); 1 / 0", "import os; os.kill(os.getpid(), 9)"])
        {
            string[] pooled = Json(await own.Dh.ExecAsync(code, "--json")), unpooled = Json(await own.Dh.ExecAsync(code, "--json", "--no-pool"));
            Assert.Equal(unpooled, pooled);
        }

        Assert.Equal(6, pool.HandedOutVmms().Distinct().Count());
        Assert.Contains(Took, (await own.Dh.ExecAsync("1", "-v")).Error, StringComparison.Ordinal);
        Assert.DoesNotContain(Took, (await own.Dh.RunAsync(["exec", "-v", "-c", "1"], environment: new Dictionary<string, string> { ["DH_NO_POOL"] = "1" })).Error, StringComparison.Ordinal);
        Assert.DoesNotContain(Took, (await own.Dh.ExecAsync("1", "-v", "--memory-policy", "eager")).Error, StringComparison.Ordinal);

        // What is required and not there is refused before code runs, with or without a pool.
        var strict = await own.Dh.ExecAsync("print('ran')", "--require-isolation", "hardware+jail");
        Assert.Equal((125, ""), (strict.ExitCode, strict.Output));
        Assert.Equal(0, await pool.EndAsync("TERM"));
        await own.AssertNothingLeftAndUsableAsync("a pool");
    }

    [Fact]
    public async Task Eight_at_once_on_a_pool_of_two_share_no_machine_and_no_number()
    {
        const string Code = $"open('/workspace/trace', 'x').close(); open('/tmp/trace', 'x').close()\n{CloneGenerators.Code}";
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "--size", "2");
        await Task.Delay(TimeSpan.FromSeconds(1), Test); // a clone that has waited still knows the time
        double before = Now();
        var results = await Task.WhenAll(Enumerable.Range(0, 8).Select(_ => own.Dh.ExecAsync(Code)));
        Assert.All(results, result => Assert.Equal((0, ""), (result.ExitCode, result.Error)));
        string[][] values = [.. results.Select(result => result.Output.Trim().Split(' '))];
        Assert.Empty(CloneGenerators.Alike(values));
        Assert.All(values, line => Assert.InRange(double.Parse(line[^1], System.Globalization.CultureInfo.InvariantCulture), before, Now()));
        Assert.Equal(8, pool.HandedOutVmms().Distinct().Count());
        await pool.WaitAsync("ready", 2);
        Assert.Equal((2, 8, 0), ((await pool.StatusAsync()).GetProperty("size").GetInt32(), (await pool.StatusAsync()).GetProperty("handed_out").GetInt32(), (await pool.StatusAsync()).GetProperty("failed").GetInt32()));
    }

    [Fact]
    public async Task Sixty_four_at_once_on_a_pool_of_four_all_end_well_and_no_more_are_begun_than_there_are_processors()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "4");
        var runs = Enumerable.Range(0, 64).Select(number => own.Dh.RunAsync(["exec", "-c", $"{number}"], timeLimit: TimeSpan.FromMinutes(2))).ToArray();
        var all = Task.WhenAll(runs);
        while (!all.IsCompleted)
        {
            var status = await pool.StatusAsync();
            Assert.InRange(status.GetProperty("starting").GetInt32(), 0, Environment.ProcessorCount);
            Assert.InRange(status.GetProperty("ready").GetInt32(), 0, 4);
            await Task.WhenAny(all, Task.Delay(100, Test));
        }

        var results = await all;
        Assert.Equal(Enumerable.Range(0, 64).Select(number => new ProgramResult(0, $"{number}\n", "")), results);
        Assert.Equal(64, pool.HandedOutVmms().Distinct().Count());
        await pool.WaitAsync("ready", 4);
        Assert.Equal((0, 0), ((await pool.StatusAsync()).GetProperty("running").GetInt32(), (await pool.StatusAsync()).GetProperty("failed").GetInt32()));
    }

    [Fact]
    public async Task A_run_that_has_just_begun_has_the_greatest_share_of_the_processors()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1");
        string machine = Path.GetFileName(Directory.EnumerateDirectories(new DhHome(own.Dh.Home).RunDirectory).Single());
        Assert.SkipWhen(CpuWeight(machine) is null, "this host grants machines no cgroup");
        Assert.Equal(50, CpuWeight(machine));
        using var run = own.Dh.Start(["exec", "-c", "print('started', flush=True); input()"]);
        Assert.Equal("started", await run.StandardOutput.ReadLineAsync(Test));
        var weights = new List<int?>();
        long start = Stopwatch.GetTimestamp();
        while (weights.LastOrDefault() != 25)
        {
            Assert.True(Stopwatch.GetElapsedTime(start) < TimeSpan.FromSeconds(10), string.Join(' ', weights));
            weights.Add(CpuWeight(machine));
            await Task.Delay(20, Test);
        }

        Assert.Contains(100, weights);
        Assert.Equal(0, ReadNumber(CpuFile(machine, "cpu.idle")!)); // nothing else is there that it could give way to
        using (var other = own.Dh.Start(["exec", "-c", "print('started', flush=True); input()"]))
        {
            Assert.Equal("started", await other.StandardOutput.ReadLineAsync(Test));
            Assert.Equal(1, ReadNumber(CpuFile(machine, "cpu.idle")!));
            other.StandardInput.Close();
            await other.WaitForExitAsync(Test);
        }

        await pool.WaitAsync("ready", 1);
        await pool.WaitAsync("running", 1);
        Assert.Equal(0, ReadNumber(CpuFile(machine, "cpu.idle")!));
        run.StandardInput.Close();
        await run.WaitForExitAsync(Test);
    }

    [Fact]
    public async Task Neither_side_talks_to_another_users()
    {
        Assert.SkipUnless(Environment.IsPrivilegedProcess, "only root can become another user");
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1");
        string path = Directory.EnumerateFiles(Path.Combine(own.Dh.Home, "pool"), "*.sock").Single();

        // As if these were open to all, which they are not.
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute, File.GetUnixFileMode(Path.GetDirectoryName(path)!));
        foreach (string file in (string[])[own.Dh.Home, Path.GetDirectoryName(path)!, path, Path.ChangeExtension(path, ".lock")])
        {
            File.SetUnixFileMode(file, (UnixFileMode)0x1ff);
        }

        string program = Path.Combine(own.Dh.Home, "dh");
        ProgramFile.Copy(Repository.PathOf("bin/dh"), program);
        var status = await own.Dh.RunAsync(new ProcessStartInfo("setpriv", ["--reuid=65534", "--regid=65534", "--clear-groups", program, "vm", "pool", "status", "--json"]));
        Assert.Equal((0, "{\"pools\":[]}"), (status.ExitCode, status.Output.Trim()));
        await pool.WaitForEventAsync(" is of user 65534");
        Assert.Contains(Took, (await own.Dh.ExecAsync("1", "-v")).Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("KILL", 137)]
    [InlineData("TERM", 0)]
    public async Task A_daemon_that_ends_takes_its_machines_with_it(string signal, int exitCode)
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1");
        using var run = own.Dh.Start(["exec", "-c", "import time; print('started', flush=True); time.sleep(60)"]);
        Assert.Equal("started", await run.StandardOutput.ReadLineAsync(Test));
        Assert.Equal(exitCode, await pool.EndAsync(signal));
        await run.WaitForExitAsync(Test);
        Assert.Equal(125, run.ExitCode);
        Assert.Contains("pool", await run.StandardError.ReadToEndAsync(Test), StringComparison.Ordinal);

        // A socket that was left behind is in nobody's way.
        await own.AssertNothingLeftAndUsableAsync($"SIG{signal} to the daemon");
        await using (var next = await RunningPool.StartAsync(own.Dh, "-n", "1"))
        {
            Assert.Contains(Took, (await own.Dh.ExecAsync("1", "-v")).Error, StringComparison.Ordinal);
        }

        await own.AssertNothingLeftAsync("the next daemon");
    }

    [Fact]
    public async Task A_client_that_vanishes_or_talks_nonsense_costs_nobody_a_run()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1");
        using (var run = own.Dh.Start(["exec", "-c", "import time; print('started', flush=True); time.sleep(60)"]))
        {
            Assert.Equal("started", await run.StandardOutput.ReadLineAsync(Test));
            int vmm = pool.HandedOutVmms().Single();
            run.Kill();
            long start = Stopwatch.GetTimestamp();
            while (Directory.Exists($"/proc/{vmm}"))
            {
                Assert.True(Stopwatch.GetElapsedTime(start) < TimeSpan.FromSeconds(5));
                await Task.Delay(5, Test);
            }
        }

        string path = Directory.EnumerateFiles(Path.Combine(own.Dh.Home, "pool"), "*.sock").Single();
        using var silent = Connect(path);
        foreach (byte[] request in (byte[][])[[], "{\"type\":\"take\""u8.ToArray(), [0xff, 0, 1], "{\"type\":\"take\"}"u8.ToArray(), "[]"u8.ToArray(), new byte[100_000], Encoding.UTF8.GetBytes($"{{\"type\":\"{new string('x', 20_000)}\"}}")])
        {
            using var client = Connect(path);
            _ = await client.SendAsync(request, SocketFlags.None, Test);
        }

        using (var flood = Connect(path))
        {
            byte[] part = new byte[64 << 10];
            await Assert.ThrowsAsync<SocketException>(async () =>
            {
                for (int sent = 0; sent < 1 << 30; sent += part.Length)
                {
                    _ = await flood.SendAsync(part, SocketFlags.None, Test);
                }
            });
        }

        await pool.WaitAsync("running", 0);
        Assert.Contains(Took, (await own.Dh.ExecAsync("1", "-v")).Error, StringComparison.Ordinal);
        Assert.False(pool.Daemon.HasExited);
    }

    [Fact]
    public async Task A_second_daemon_and_too_many_sandboxes_are_refused_and_stop_waits_for_the_end()
    {
        using var own = new OwnHome(prepared);
        Assert.Equal(0, (await own.Dh.RunAsync(["vm", "pool", "start", "--detach", "-n", "1"])).ExitCode);
        try
        {
            var second = await own.Dh.RunAsync(["vm", "pool", "start", "-n", "1"]);
            Assert.Equal((2, true), (second.ExitCode, second.Error.Contains("There is a pool of python", StringComparison.Ordinal)));
            Assert.Equal(second, await own.Dh.RunAsync(["vm", "pool", "start", "-n", "1", "--detach"]));
            var many = await own.Dh.RunAsync(["vm", "pool", "scale", "10000"]);
            Assert.Equal((2, true), (many.ExitCode, many.Error.Contains("at most", StringComparison.Ordinal)));
            Assert.Equal(2, (await own.Dh.RunAsync(["vm", "pool", "start", "-n", "0"])).ExitCode);
            Assert.Equal(2, (await own.Dh.RunAsync(["vm", "pool", "start", "--metrics", "0.0.0.0:9464"])).ExitCode);
            Assert.Equal(0, (await own.Dh.RunAsync(["vm", "pool", "scale", "0"])).ExitCode);
            Assert.Equal(new ProgramResult(0, "2\n", ""), await own.Dh.ExecAsync("1 + 1"));
        }
        finally
        {
            Assert.Equal(0, (await own.Dh.RunAsync(["vm", "pool", "stop"])).ExitCode);
        }

        await own.AssertNothingLeftAndUsableAsync("stop");
        Assert.Contains(" 4 Stopped ", (await own.Dh.RunAsync(["vm", "pool", "logs"])).Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_snapshot_that_is_removed_under_the_pool_is_not_run_any_more()
    {
        using var copy = new CopyOfHome(prepared);
        await using var pool = await RunningPool.StartAsync(copy.Dh, "-n", "1");
        string snapshot = Path.GetDirectoryName(copy.FileOf("memory"))!, current = Path.Combine(Path.GetDirectoryName(snapshot)!, "current");
        Assert.Equal(0, (await copy.Dh.ExecAsync("1")).ExitCode);
        File.Delete(current);
        Assert.Equal(4, (await copy.Dh.ExecAsync("print('ran')")).ExitCode);
        await pool.WaitForEventAsync(" 31 SnapshotChanged it is gone");
        await OwnHome.AssertNothingLeftAsync(copy.Dh, "the snapshot");
        File.CreateSymbolicLink(current, Path.GetFileName(snapshot));
        await pool.WaitAsync("ready", 1);
        Assert.Contains(Took, (await copy.Dh.ExecAsync("1", "-v")).Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_pool_that_nobody_uses_ends_by_itself()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1", "--idle-timeout", "4s", "--metrics", $"127.0.0.1:{FreePort()}");
        using (var http = new HttpClient())
        {
            Assert.Contains("dh_pool_ready{template=\"python\"", await http.GetStringAsync($"http://127.0.0.1:{_port}/metrics", Test), StringComparison.Ordinal);
        }

        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(20));
        await pool.Daemon.WaitForExitAsync(limit.Token);
        Assert.Equal(0, pool.Daemon.ExitCode);
        await own.AssertNothingLeftAsync("an idle pool");
    }

    /// <summary>A machine's CPU weight in the units of cgroup version 2; null when it has no cgroup.</summary>
    private static int? CpuWeight(string machine) =>
        CpuFile(machine, "cpu.shares") is { } shares ? (int)Math.Round(ReadNumber(shares) / 10.24)
        : CpuFile(machine, "cpu.weight") is { } weight ? ReadNumber(weight)
        : null;

    private static string? CpuFile(string machine, string file) =>
        (Directory.Exists("/sys/fs/cgroup/cpu") ? Directory.GetDirectories("/sys/fs/cgroup/cpu", $"dh-{machine}", SearchOption.AllDirectories) : [])
        .Append($"/sys/fs/cgroup/dh/{machine}")
        .Select(directory => Path.Combine(directory, file))
        .FirstOrDefault(File.Exists);

    private static int ReadNumber(string path) => int.Parse(File.ReadAllText(path), System.Globalization.CultureInfo.InvariantCulture);

    private int FreePort()
    {
        using var probe = new TcpListener(IPAddress.Loopback, 0);
        probe.Start();
        return _port = ((IPEndPoint)probe.LocalEndpoint).Port;
    }

    private static Socket Connect(string path)
    {
        var client = new Socket(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified);
        client.Connect(new UnixDomainSocketEndPoint(path));
        return client;
    }

    private static (int, bool) Ending(ProgramResult result) => (result.ExitCode, result.Error.Contains(Took, StringComparison.Ordinal));

    private static double Now() => (DateTimeOffset.UtcNow - DateTimeOffset.UnixEpoch).TotalSeconds;

    // All but the times.
    private static string[] Json(ProgramResult result) =>
        [$"{result.ExitCode} {result.Error}", .. JsonNode.Parse(result.Output)!.AsObject().Where(member => member.Key is not ("elapsed_seconds" or "timing")).Select(member => $"{member.Key}: {member.Value?.ToJsonString()}")];
}
