using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>However a run ends, nothing of it is left.</summary>
public sealed class EndingTests(PreparedHome prepared)
{
    private static readonly TimeSpan CleanUpLimit = TimeSpan.FromSeconds(1);

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
        using (var kill = Process.Start("/bin/kill", ["-INT", $"{process.Id}"]))
        {
            await kill.WaitForExitAsync(TestContext.Current.CancellationToken);
        }

        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(130, process.ExitCode);
        await own.AssertNothingLeftAsync("an interrupt");
    }

    /// <summary>A DH_HOME with the prepared snapshots and a run directory of its own, so that other tests' machines are not seen.</summary>
    private sealed class OwnHome : IDisposable
    {
        private readonly TempDir _directory = new();

        public OwnHome(PreparedHome prepared)
        {
            Directory.CreateSymbolicLink(_directory["vm"], Path.Combine(prepared.Home.Path, "vm"));
            Dh = new DhProgram(_directory.Path);
        }

        public DhProgram Dh { get; }

        public void Dispose() => _directory.Dispose();

        public async Task AssertNothingLeftAsync(string after)
        {
            long start = Stopwatch.GetTimestamp();
            string left;
            while ((left = Left()).Length > 0 && Stopwatch.GetElapsedTime(start) < CleanUpLimit)
            {
                await Task.Delay(10);
            }

            Assert.True(left.Length == 0, $"After {after}: {left}");
        }

        private string Left()
        {
            string run = new DhHome(_directory.Path).RunDirectory;
            var directories = Directory.Exists(run) ? Directory.EnumerateDirectories(run) : [];
            // The launcher's command line names the run directory; so nothing that runs may name it.
            var processes = Directory.EnumerateDirectories("/proc")
                .Where(process => int.TryParse(Path.GetFileName(process), out _))
                .Where(process => CommandLine(process).Contains(run, StringComparison.Ordinal));
            return string.Join(", ", directories.Concat(processes));
        }

        private static string CommandLine(string process)
        {
            try
            {
                return File.ReadAllText(Path.Combine(process, "cmdline"));
            }
            catch (IOException)
            {
                return ""; // it has just ended
            }
        }
    }
}
