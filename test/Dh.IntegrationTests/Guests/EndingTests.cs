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
    public async Task An_interrupt_ends_the_code_with_130()
    {
        using var own = new OwnHome(prepared);
        using var process = own.Dh.Start(["exec", "-c", "print('started', flush=True)\nwhile True: pass"]);
        Assert.Equal("started", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        await Processes.SignalAsync(process.Id, "INT");
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(130, process.ExitCode);
        await own.AssertNothingLeftAsync("an interrupt");
    }
}
