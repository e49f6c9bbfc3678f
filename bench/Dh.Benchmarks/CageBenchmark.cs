using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>What the cage and the late lock cost a restore: the same snapshot with and without them, in turn, in one process.</summary>
internal static class CageBenchmark
{
    private const int Rounds = 121;
    private const double MaximalMs = 6;

    public static async Task<bool> RunAsync()
    {
        var home = DhHome.Default;
        var snapshot = new SnapshotStore(home).FindNewest("python") ?? throw new InvalidOperationException("There is no python snapshot: run `dh vm prepare`.");
        var report = new PromiseReport(
            "The cage", $"Medians of {Rounds} restores each, in turn, of a {snapshot.Manifest.MemoryMib} MiB Python guest with {snapshot.Manifest.Accelerator}, {Environment.ProcessorCount} CPUs. Made by `Dh.Benchmarks cage`.");
        foreach (var policy in (MemoryPolicy[])[MemoryPolicy.Prefetch, MemoryPolicy.File])
        {
            var caged = new List<(double Restore, double Run)>();
            var plain = new List<(double Restore, double Run)>();
            for (int round = -3; round < Rounds; round++)
            {
                // Which comes first changes, too.
                bool withFirst = round % 2 == 0;
                var first = await MeasureAsync(snapshot, home, policy, caged: withFirst);
                var second = await MeasureAsync(snapshot, home, policy, caged: !withFirst);
                var (with, without) = withFirst ? (first, second) : (second, first);
                if (round >= 0)
                {
                    caged.Add(with);
                    plain.Add(without);
                }
            }

            string name = policy.ToString().ToLowerInvariant();
            // Of pairs, not of medians: what else the machine does changes from minute to minute.
            double more = Medians.Median(caged.Zip(plain, (with, without) => with.Restore - without.Restore));
            report.Row($"{name}: restore, without a cage", $"{Medians.Median(plain.Select(run => run.Restore)):0.0} ms");
            report.Row($"{name}: restore, caged and locked", $"{Medians.Median(caged.Select(run => run.Restore)):0.0} ms, {Medians.Median(caged.Select(run => run.Restore)) / Medians.Median(plain.Select(run => run.Restore)):0.00} times");
            report.Row($"{name}: what the cage takes of a restore", $"{more:0.0} ms", $"<= {MaximalMs} ms", more <= MaximalMs);
            report.Row($"{name}: `print('hello')` after it, without and with", $"{Medians.Median(plain.Select(run => run.Run)):0.0} and {Medians.Median(caged.Select(run => run.Run)):0.0} ms");
        }

        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/cage.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    private static async Task<(double Restore, double Run)> MeasureAsync(Snapshot snapshot, DhHome home, MemoryPolicy policy, bool caged)
    {
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = home, MemoryPolicy = policy, Caged = caged });
        if (caged != Isolation.IsCaged(sandbox.Cage))
        {
            throw new InvalidOperationException($"This host grants no complete cage: {string.Join(", ", sandbox.Cage.Where(layer => !layer.IsOn))}");
        }

        var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = "print('hello')" }, new CapturedText());
        return (sandbox.RestoreTime.TotalMilliseconds, result.Elapsed.TotalMilliseconds);
    }
}
