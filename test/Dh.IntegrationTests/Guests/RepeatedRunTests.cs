using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.IntegrationTests.Guests;

/// <summary>Runs in a guest that has had one before, and the run after which there is none.</summary>
public sealed class RepeatedRunTests(PreparedHome prepared)
{
    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    [Fact(Timeout = 60_000)]
    public async Task Every_run_has_all_the_CPUs()
    {
        const string Code = """
            import os, subprocess, threading
            def cpus(process=0): return sorted(os.sched_getaffinity(process))
            found = []
            thread = threading.Thread(target=lambda: found.append(cpus()))
            thread.start()
            thread.join()
            child = subprocess.run(["python3", "-c", "import os; print(sorted(os.sched_getaffinity(0)))"], capture_output=True, text=True)
            print(cpus(), found, child.stdout.strip(), cpus(os.getppid()))
            """;
        await using var sandbox = await Sandbox.RestoreAsync(
            new SnapshotStore(prepared.Home).FindNewest("python")!, new SandboxOptions { Home = prepared.Home }, Cancellation);
        Assert.Equal("[0, 1] [[0, 1]] [0, 1] [0, 1]\n", await RunAsync(Code));
        Assert.Equal("[0, 1] [[0, 1]] [0, 1] [0]\n", await RunAsync(Code)); // its process has waited where the runner is
        Assert.Equal("[0, 1] [[0, 1]] [0, 1] [0]\n", await RunAsync(Code));

        async Task<string> RunAsync(string code)
        {
            var output = new CapturedText();
            Assert.Equal(0, (await sandbox.ExecuteAsync(new ExecutionRequest { Source = code }, output, Cancellation)).ExitCode);
            return output.Text;
        }
    }

    [Theory(Timeout = 60_000)]
    [InlineData("print('last')", 0)]
    [InlineData("import os; os.write(1, b'last\\n'); os._exit(3)", 3)]
    public async Task A_guest_refuses_code_after_the_last_run(string code, int exitCode)
    {
        await using var guest = await BareGuest.RestoreAsync(prepared.Home, "python", Cancellation);
        using var session = new GuestSession(new SocketTransport(guest.Channel));
        await session.GreetAsync(BareGuest.TimeLimit, Cancellation);
        var output = new CapturedText();
        Assert.Equal(exitCode, (await session.ExecuteAsync(new ExecutionRequest { Source = code, IsLast = true }, output, Cancellation)).ExitCode);
        Assert.Equal("last\n", output.Text);

        using var next = GuestSession.Resume(new SocketTransport(guest.Channel), lastId: 1);
        var refusal = await Assert.ThrowsAsync<DhException>(() => next.ExecuteAsync(new ExecutionRequest { Source = "1" }, output, Cancellation));
        Assert.Equal("The guest broke its protocol: it refused the code: exec after the last one.", refusal.Message);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(false)]
    [InlineData(true)]
    public async Task What_code_leaves_behind_does_not_delay_its_result(bool isLast)
    {
        const string Code = """
            import os, subprocess, threading
            for command in "while :; do :; done", "exec yes", "exec yes >&2":
                subprocess.Popen(["sh", "-c", command])
            threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
            os.write(1, b"done\n")
            """;
        await using var sandbox = await Sandbox.RestoreAsync(
            new SnapshotStore(prepared.Home).FindNewest("python")!, new SandboxOptions { Home = prepared.Home }, Cancellation);
        var output = new CapturedText();
        Assert.Equal(0, (await sandbox.ExecuteAsync(new ExecutionRequest { Source = Code, IsLast = isLast }, output, Cancellation)).ExitCode);
        Assert.Contains("done\n", output.Text, StringComparison.Ordinal);
        var next = sandbox.ExecuteAsync(new ExecutionRequest { Source = "1" }, output, Cancellation);
        if (isLast)
        {
            await Assert.ThrowsAsync<InvalidOperationException>(() => next);
        }
        else
        {
            Assert.Equal(0, (await next).ExitCode);
        }
    }
}
