using System.Diagnostics;
using System.Text.Json;
using System.Text.Json.Nodes;
using Dh.Guest;
using Dh.IntegrationTests.Guests;
using Dh.Paging;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Drivers;

/// <summary>
/// What every driver keeps, whatever its VMM: memory as it was, the code's own output and exit code, a clear end for every failure, and nothing
/// left behind. The code is Python for the drivers whose guests run it; a fake guest plays it.
/// </summary>
public abstract class DriverContract
{
    private const string Exit = "import sys; print('hello'); sys.exit(7)";
    private const string Value = "6 * 7";
    private const string Upper = "import sys; print(sys.stdin.read().upper())";
    private const string Forever = "print('started', flush=True)\nwhile True: pass";

    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    /// <summary>The program, with a home that has one snapshot of <c>python</c>.</summary>
    protected abstract DhProgram Dh { get; }

    /// <summary>How the VMM's process is called.</summary>
    protected abstract string VmmName { get; }

    /// <summary>The VMM's program, where it is not the one in <c>PATH</c>.</summary>
    protected virtual VmmPrograms Programs => VmmPrograms.Default;

    /// <summary>Tells a guest that cannot run code what the code does.</summary>
    protected virtual void Play(string code, Func<FakeGuestRun, Task<int>> program)
    {
    }

    /// <summary>Makes restores take longer than a millisecond for certain, where they might not.</summary>
    protected virtual void SlowDown()
    {
    }

    private DhHome Home => new(Dh.Home);

    private Snapshot Prepared => new SnapshotStore(Home).FindNewest("python")!;

    [Theory(Timeout = 120_000)]
    [InlineData("eager")]
    [InlineData("prefetch")]
    [InlineData("lazy")]
    [InlineData("file")]
    public async Task Output_and_exit_code_are_the_codes_own_under_every_policy(string policy)
    {
        PlayPrograms();
        Assert.Equal(new ProgramResult(7, "hello\n", ""), await Dh.ExecAsync(Exit, "--memory-policy", policy));
        await AssertNothingLeftAsync($"a run with {policy}");
    }

    [Fact(Timeout = 120_000)]
    public async Task The_value_of_the_last_expression_is_printed()
    {
        PlayPrograms();
        Assert.Equal(new ProgramResult(0, "42\n", ""), await Dh.ExecAsync(Value));
    }

    [Fact(Timeout = 120_000)]
    public async Task Standard_input_reaches_the_code()
    {
        PlayPrograms();
        string text = string.Concat(Enumerable.Repeat("some input\n", 20_000));
        Assert.Equal(new ProgramResult(0, text.ToUpperInvariant() + "\n", ""), await Dh.RunAsync(["exec", "-c", Upper], text));
    }

    [Fact(Timeout = 120_000)]
    public async Task An_interrupt_ends_the_code_with_130()
    {
        using var process = await StartForeverAsync();
        Assert.Equal(130, await Processes.EndAsync(process, "INT"));
        await AssertNothingLeftAsync("an interrupt");
    }

    [Fact(Timeout = 120_000)]
    public async Task A_timeout_ends_the_code_with_3()
    {
        PlayPrograms();
        var result = await Dh.ExecAsync(Forever, "--timeout", "1");
        Assert.Equal((3, "started\n"), (result.ExitCode, result.Output));
        await AssertNothingLeftAsync("a timeout");
    }

    [Theory(Timeout = 120_000)]
    [InlineData(0)]
    [InlineData(20)]
    [InlineData(60)]
    [InlineData(150)]
    public async Task A_VMM_that_is_killed_while_it_restores_is_a_failure(int delayMs)
    {
        PlayPrograms();
        using var process = Dh.Start(["exec", "--memory-policy", "eager", "-c", Forever]);
        int vmm = await Processes.WaitForDescendantAsync(process.Id, VmmName, Cancellation);
        await Task.Delay(delayMs, Cancellation);
        await Processes.SignalAsync(vmm, "KILL");
        string error = await process.StandardError.ReadToEndAsync(Cancellation);
        await process.WaitForExitAsync(Cancellation);
        Assert.Equal(125, process.ExitCode);
        Assert.StartsWith("dh: ", error, StringComparison.Ordinal);
        Assert.Contains(" ended ", error, StringComparison.Ordinal);
        await AssertNothingLeftAsync("the death of the VMM");
    }

    [Fact(Timeout = 120_000)]
    public async Task A_VMM_that_is_killed_while_code_runs_is_a_failure()
    {
        using var process = await StartForeverAsync();
        await Processes.SignalAsync(await Processes.WaitForDescendantAsync(process.Id, VmmName, Cancellation), "KILL");
        string error = await process.StandardError.ReadToEndAsync(Cancellation);
        await process.WaitForExitAsync(Cancellation);
        Assert.Equal(125, process.ExitCode);
        Assert.StartsWith("dh: The microVM ended while code ran (killed by signal 9).", error, StringComparison.Ordinal);
        await AssertNothingLeftAsync("the death of the VMM");
    }

    [Fact(Timeout = 120_000)]
    public async Task A_program_that_is_killed_at_any_moment_leaves_nothing()
    {
        PlayPrograms();
        int seed = Random.Shared.Next();
        var random = new Random(seed);
        for (int i = 0; i < 10; i++)
        {
            using var process = Dh.Start(["exec", "-c", Forever]);
            await Task.Delay(random.Next(0, 300), Cancellation);
            process.Kill();
            await process.WaitForExitAsync(Cancellation);
            await AssertNothingLeftAsync($"seed {seed}, kill {i}");
        }
    }

    [Theory(Timeout = 120_000)]
    [InlineData(MemoryPolicy.Eager)]
    [InlineData(MemoryPolicy.Lazy)]
    public async Task A_page_server_that_fails_takes_the_VMM_with_it(MemoryPolicy policy)
    {
        PlayPrograms();
        using var damaged = new TempDir();
        var snapshot = await DamagedAsync(damaged);
        var failure = await Assert.ThrowsAnyAsync<DhException>(async () =>
        {
            await using var sandbox = await Sandbox.RestoreAsync(snapshot, Options(policy), Cancellation);
            await sandbox.ExecuteAsync(new ExecutionRequest { Source = Value }, new CapturedText(), Cancellation);
        });
        Assert.Equal(DhErrorReason.PageServer, failure.Reason);
        Assert.Contains(snapshot.MemoryPath, failure.Message, StringComparison.Ordinal);
        await AssertNothingLeftAsync("the failure of the page server");
    }

    [Fact(Timeout = 120_000)]
    public async Task A_restore_that_takes_too_long_is_a_failure()
    {
        SlowDown();
        var failure = await Assert.ThrowsAnyAsync<DhException>(async () =>
        {
            await using var sandbox = await Sandbox.RestoreAsync(Prepared, Options(MemoryPolicy.Eager, TimeSpan.FromMilliseconds(1)), Cancellation);
        });
        Assert.Contains("within 0", failure.Message, StringComparison.Ordinal);
        await AssertNothingLeftAsync("a restore that took too long");
    }

    [Fact(Timeout = 120_000)]
    public async Task A_restore_that_is_given_up_leaves_nothing()
    {
        int seed = Random.Shared.Next();
        var random = new Random(seed);
        for (int i = 0; i < 10; i++)
        {
            using var patience = new CancellationTokenSource(TimeSpan.FromMilliseconds(random.Next(0, 200)));
            try
            {
                await using var sandbox = await Sandbox.RestoreAsync(Prepared, Options(), patience.Token);
            }
            catch (OperationCanceledException)
            {
                Assert.True(patience.IsCancellationRequested, $"seed {seed}, restore {i}");
            }

            await AssertNothingLeftAsync($"seed {seed}, restore {i}");
        }
    }

    [Fact(Timeout = 120_000)]
    public async Task Runs_leave_no_descriptor_behind()
    {
        PlayPrograms();
        await RunAsync(); // the first one brings in what stays
        int before = await OpenDescriptors.SettleAsync(0, TimeSpan.FromMilliseconds(200));
        for (int i = 0; i < 4; i++)
        {
            await RunAsync();
        }

        Assert.InRange(await OpenDescriptors.SettleAsync(before, Bound), 0, before);

        async Task RunAsync()
        {
            await using var sandbox = await Sandbox.RestoreAsync(Prepared, Options(), Cancellation);
            Assert.Equal("42", (await sandbox.ExecuteAsync(new ExecutionRequest { Source = Value }, new CapturedText(), Cancellation)).ResultRepr);
        }
    }

    [Fact(Timeout = 120_000)]
    public async Task Clones_run_side_by_side_and_one_outlives_the_other()
    {
        PlayPrograms();
        await using var second = await Sandbox.RestoreAsync(Prepared, Options(MemoryPolicy.Prefetch), Cancellation);
        await using (var first = await Sandbox.RestoreAsync(Prepared, Options(MemoryPolicy.Eager), Cancellation))
        {
            Assert.NotEqual(first.VmmProcessId, second.VmmProcessId);
            Assert.Equal("42", (await first.ExecuteAsync(new ExecutionRequest { Source = Value }, new CapturedText(), Cancellation)).ResultRepr);
        }

        for (int i = 0; i < 2; i++)
        {
            Assert.Equal("42", (await second.ExecuteAsync(new ExecutionRequest { Source = Value }, new CapturedText(), Cancellation)).ResultRepr);
        }
    }

    [Theory(Timeout = 120_000)]
    [InlineData(MemoryPolicy.Prefetch)]
    [InlineData(MemoryPolicy.Lazy)]
    public async Task The_launcher_keeps_the_userfaultfd_as_long_as_the_guest(MemoryPolicy policy)
    {
        await using var sandbox = await Sandbox.RestoreAsync(Prepared, Options(policy), Cancellation);
        string[] status = await File.ReadAllLinesAsync($"/proc/{sandbox.VmmProcessId}/status", Cancellation);
        string parent = status.Single(line => line.StartsWith("PPid:", StringComparison.Ordinal))["PPid:".Length..].Trim();
        while (!new DirectoryInfo($"/proc/{parent}/fd").EnumerateFiles().Any(file => file.LinkTarget == "anon_inode:[userfaultfd]"))
        {
            await Task.Delay(10, Cancellation);
        }
    }

    private Task AssertNothingLeftAsync(string after) => OwnHome.AssertNothingLeftAsync(Dh, after);

    private SandboxOptions Options(MemoryPolicy? policy = null, TimeSpan? timeLimit = null) =>
        new() { Home = Home, Programs = Programs, MemoryPolicy = policy, RestoreTimeLimit = timeLimit ?? Bound };

    private async Task<Process> StartForeverAsync()
    {
        PlayPrograms();
        var process = Dh.Start(["exec", "-c", Forever]);
        Assert.Equal("started", await process.StandardOutput.ReadLineAsync(Cancellation));
        return process;
    }

    private void PlayPrograms()
    {
        Play(Exit, async run =>
        {
            await run.PrintAsync("hello\n");
            return 7;
        });
        Play(Value, run =>
        {
            run.ResultRepr = "42";
            return Task.FromResult(0);
        });
        Play(Upper, async run =>
        {
            string text = (await run.ReadInputAsync()).ToUpperInvariant() + "\n";
            foreach (char[] part in text.Chunk(60_000))
            {
                await run.PrintAsync(new string(part));
            }

            return 0;
        });
        Play(Forever, async run =>
        {
            await run.PrintAsync("started\n");
            await Task.Delay(Timeout.InfiniteTimeSpan, run.Cancelled);
            return 0;
        });
    }

    /// <summary>A copy of the snapshot whose memory is compressed, with the last blocks of it destroyed: found out when they are read.</summary>
    private async Task<Snapshot> DamagedAsync(TempDir directory)
    {
        var from = Prepared;
        foreach (string name in (string[])[Snapshot.StateName, Snapshot.RootDiskName, Snapshot.KernelName, Snapshot.InitrdName])
        {
            File.Copy(Path.Combine(from.Directory, name), directory[name]);
        }

        string memory = directory[Snapshot.CompressedMemoryName];
        Lz4MemoryWriter.Write(from.MemoryPath, memory, Cancellation);
        var manifest = JsonNode.Parse(await File.ReadAllTextAsync(Path.Combine(from.Directory, Snapshot.ManifestName), Cancellation))!;
        manifest.AsObject().Remove("checksum");
        var files = manifest["files"]!.AsObject();
        files.Remove(Snapshot.MemoryName);
        files[Snapshot.CompressedMemoryName] = new JsonObject { ["length"] = new FileInfo(memory).Length, ["xx_hash3"] = "0000000000000000" };
        directory.Write(Snapshot.ManifestName, manifest.ToJsonString(new JsonSerializerOptions()));
        await using (var file = File.OpenWrite(memory))
        {
            file.Position = file.Length * 9 / 10;
            byte[] garbage = new byte[file.Length - file.Position];
            new Random(1).NextBytes(garbage);
            await file.WriteAsync(garbage, Cancellation);
        }

        return Snapshot.Open(directory.Path);
    }
}
