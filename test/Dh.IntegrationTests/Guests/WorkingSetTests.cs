using Dh.Guest;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>Working sets as a user meets them.</summary>
public sealed class WorkingSetTests(PreparedHome prepared) : IDisposable
{
    private readonly CopyOfHome _copy = new(prepared);

    private string WorkingSet => _copy.FileOf("working-set");

    [Fact(Timeout = 120_000)]
    public async Task A_recording_of_ones_own_code_brings_its_pages_first()
    {
        const string Own = "import ipaddress, tarfile, smtplib; print(ipaddress.ip_address('::1'))";
        long before = await OnDemandAsync(Own);
        var recorded = await _copy.Dh.RunAsync(["vm", "record", "-c", Own]);
        Assert.True(recorded.ExitCode == 0, recorded.Error);
        Assert.Matches(@"^python 3\.11: the working set is \d+\.\d MiB in \d+ runs\n$", recorded.Output);
        Assert.InRange(await OnDemandAsync(Own), 0, before - 1);

        var broken = await _copy.Dh.RunAsync(["vm", "record", "-c", "raise SystemExit(3)"]);
        Assert.Equal((125, ""), (broken.ExitCode, broken.Output));
        Assert.Contains("exit code 3; nothing was recorded", broken.Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("header", 20)]
    [InlineData("pages", -1000)]
    [InlineData("cut", 0)]
    [InlineData("not a working set", 0)]
    public async Task One_that_cannot_be_used_is_passed_over_with_one_line(string damage, int at)
    {
        byte[] bytes = await File.ReadAllBytesAsync(WorkingSet, TestContext.Current.CancellationToken);
        switch (damage)
        {
            case "cut":
                bytes = bytes[..^4096];
                break;
            case "not a working set":
                bytes = "hello"u8.ToArray();
                break;
            default:
                bytes[at < 0 ? bytes.Length + at : at] ^= 1;
                break;
        }

        await File.WriteAllBytesAsync(WorkingSet, bytes, TestContext.Current.CancellationToken);
        // The policy file reads the tables only.
        foreach (string noUffd in (string[])(damage == "pages" ? [""] : ["", "1"]))
        {
            var result = await _copy.Dh.RunAsync(["exec", "-c", "6 * 7"], environment: new Dictionary<string, string> { ["DH_VM_NO_UFFD"] = noUffd });
            Assert.Equal((0, "42\n"), (result.ExitCode, result.Output));
            Assert.Matches($@"^dh: [^\n]*{WorkingSet}[^\n]*dh vm record[^\n]*\n$", result.Error);
        }

        Assert.Equal(0, (await _copy.Dh.RunAsync(["vm", "record"])).ExitCode);
        Assert.Equal(new ProgramResult(0, "42\n", ""), await _copy.Dh.ExecAsync("6 * 7"));
    }

    [Fact]
    public async Task A_memory_file_that_shrinks_under_a_run_ends_it_with_the_files_name()
    {
        // Touches more and more of what the snapshot has, until something is missing.
        const string Code = """
            print('started', flush=True)
            import sys; sys.stdin.readline()
            for name in sorted(sys.stdlib_module_names - {'this', 'antigravity', 'idlelib'}):
                try: __import__(name)
                except BaseException: pass
            """;
        using var process = _copy.Dh.Start(["exec", "--memory-policy", "lazy", "-c", Code]);
        Assert.Equal("started", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        using (var memory = new FileStream(_copy.FileOf("memory"), FileMode.Open, FileAccess.Write))
        {
            memory.SetLength(4096);
        }

        try
        {
            await process.StandardInput.WriteLineAsync();
            process.StandardInput.Close();
        }
        catch (IOException)
        {
            // It has ended already: the guest's own work has touched what is missing.
        }

        string error = await process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(125, process.ExitCode);
        Assert.Matches($@"^dh: Memory file {_copy.FileOf("memory")} could not be read at offset \d+: it was truncated while it was in use\.", error);
        await OwnHome.AssertNothingLeftAsync(_copy.Dh, "a run whose memory file shrank");
    }

    public void Dispose() => _copy.Dispose();

    /// <summary>What a run of the code took from the memory file after it had begun, in bytes.</summary>
    private async Task<long> OnDemandAsync(string code)
    {
        var snapshot = new SnapshotStore(_copy.Home).FindNewest("python")!;
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = _copy.Home }, TestContext.Current.CancellationToken);
        await sandbox.ExecuteAsync(new ExecutionRequest { Source = code }, new NoOutput(), TestContext.Current.CancellationToken);
        return sandbox.PageServerStatistics!.Value.CopiedBytes - sandbox.Population!.CopiedBytes;
    }

    private sealed class NoOutput : IOutputSink
    {
        public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken) => ValueTask.CompletedTask;
    }
}
