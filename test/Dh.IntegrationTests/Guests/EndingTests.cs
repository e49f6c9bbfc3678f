using System.Diagnostics;
using Dh.Linux;

namespace Dh.IntegrationTests.Guests;

/// <summary>However a run ends, nothing of it is left.</summary>
public sealed class EndingTests(PreparedHome prepared)
{
    [Fact]
    public async Task Killed_fifty_times_at_random_moments_it_leaves_nothing()
    {
        int seed = Random.Shared.Next();
        var random = new Random(seed);
        using var own = new OwnHome(prepared);
        for (int i = 0; i < 50; i++)
        {
            using var process = own.Dh.Start(["exec", "-c", "import time; time.sleep(30)"]);
            await Task.Delay(random.Next(0, 400), TestContext.Current.CancellationToken);
            process.Kill();
            await process.WaitForExitAsync(TestContext.Current.CancellationToken);
            await own.AssertNothingLeftAsync($"seed {seed}, kill {i}");
        }
    }

    [Fact]
    public async Task After_a_run_the_launcher_removes_everything()
    {
        using var own = new OwnHome(prepared);
        Assert.Equal(0, (await own.Dh.ExecAsync("1")).ExitCode);
        await own.AssertNothingLeftAsync("a normal end");
    }

    [Fact]
    public async Task What_it_cannot_remove_of_a_dead_run_when_it_begins_it_removes_when_it_ends()
    {
        using var own = new OwnHome(prepared);
        string runs = DhHome.EnsurePrivate(new DhHome(own.Dh.Home).RunDirectory), dead = Path.Combine(runs, "dead");
        Directory.CreateDirectory(dead);
        Process process;
        using (FileLock.TryAcquire(Path.Combine(runs, ".lock"), shared: true)) // as a launcher has it that makes its directory
        {
            process = own.Dh.Start(["exec", "-c", "print('started', flush=True); input()"]);
            Assert.Equal("started", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
            Assert.True(Directory.Exists(dead));
        }

        using (process)
        {
            await process.StandardInput.WriteLineAsync();
            await process.WaitForExitAsync(TestContext.Current.CancellationToken);
            Assert.Equal(0, process.ExitCode);
        }

        await own.AssertNothingLeftAsync("a run beside a dead one");
    }

    [Fact]
    public async Task An_interrupt_ends_the_code_with_130()
    {
        using var own = new OwnHome(prepared);
        using var process = own.Dh.Start(["exec", "-c", "print('started', flush=True)\nwhile True: pass"]);
        Assert.Equal("started", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        Assert.Equal(130, await Processes.EndAsync(process, "INT"));
        await own.AssertNothingLeftAsync("an interrupt");
    }
}
