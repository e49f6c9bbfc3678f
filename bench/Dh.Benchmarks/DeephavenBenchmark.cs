using System.Globalization;
using System.Text;
using Dh.Guest;
using Dh.Linux;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// A Deephaven engine, restored, against its own cold boot, which the snapshot's manifest tells: the program as a user runs it, and the memory
/// that clones take. The policies are measured in turn, in every round.
/// </summary>
internal static class DeephavenBenchmark
{
    private const int Rounds = 5;
    private const int Clones = 4;
    private const string Hello = "print('hello')";
    private const string Table = "print(1+1)\nt = empty_table(5).update(['x = i'])\nprint(t.to_string())";
    private static readonly string Dh = Repository.PathOf("bin/dh");

    public static async Task<bool> RunAsync()
    {
        var snapshot = new SnapshotStore(DhHome.Default).FindNewest("deephaven")
            ?? throw new InvalidOperationException("There is no snapshot of Deephaven: run `dh vm prepare --version 41.1`, with --wheelhouse DIR where there is no index.");
        double bootMs = snapshot.Manifest.BootSeconds * 1000;
        double hello = Median(Rounds, () => Exec(snapshot, Hello, "prefetch", cold: false));
        var warm = Alternate(snapshot, cold: false);
        var cold = Alternate(snapshot, cold: true);
        double prefetchMib = await PrivateMibAsync(snapshot, MemoryPolicy.Prefetch), fileMib = await PrivateMibAsync(snapshot, MemoryPolicy.File);

        string load = (await File.ReadAllTextAsync("/proc/loadavg")).Split(' ')[0];
        var report = new StringBuilder()
            .AppendLine("# Deephaven").AppendLine()
            .AppendLine(CultureInfo.InvariantCulture, $"Deephaven {snapshot.Manifest.Version}, {snapshot.Manifest.MemoryMib} MiB, {snapshot.Manifest.DataBytes >> 20} MiB of them data; {snapshot.Manifest.Accelerator}, {Environment.ProcessorCount} CPUs. Medians of {Rounds} whole runs of `dh exec`; ratios are medians of the rounds'.")
            .AppendLine(CultureInfo.InvariantCulture, $"\"a table\": `1+1`, then `empty_table(5).update(['x = i'])` printed and shown. Load average when it ended: {load}. Made by `make bench-deephaven`.")
            .AppendLine().AppendLine("| what | measured | promise | |").AppendLine("| --- | --- | --- | --- |");
        bool passed = true;
        Row("cold boot until the engine is warm", $"{bootMs / 1000:0.0} s", $"-", true);
        Row("`print('hello')`, against cold boot", $"{hello:0} ms, {bootMs / hello:0} times faster", $">= 150 times", bootMs / hello >= 150);
        Row("a table, prefetch", $"{warm.Prefetch:0} ms, {bootMs / warm.Prefetch:0} times faster", $">= 150 times", bootMs / warm.Prefetch >= 150);
        Row("a table, file", $"{warm.File:0} ms", $"-", true);
        Row("a table, prefetch by file", $"{warm.Ratio:0.00}", $"<= 0.95", warm.Ratio <= 0.95);
        Row("a table, files out of the page cache, prefetch by file", $"{cold.Prefetch:0} ms by {cold.File:0} ms: {cold.Ratio:0.00}", $"<= 0.50", cold.Ratio <= 0.5);
        Row("private memory of each of 4 clones after that, prefetch", $"{prefetchMib:0} MiB", $"<= 130 MiB", prefetchMib <= 130);
        Row("private memory of each of 4 clones after that, file", $"{fileMib:0} MiB", $"<= 80 MiB", fileMib <= 80);
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/deephaven.md"), report.ToString());
        Console.Write(report);
        return passed;

        void Row(string what, FormattableString measured, FormattableString promise, bool held)
        {
            passed &= held;
            string verdict = promise.Format == "-" ? "" : held ? "PASS" : "FAIL";
            report.AppendLine(CultureInfo.InvariantCulture, $"| {what} | {FormattableString.Invariant(measured)} | {FormattableString.Invariant(promise)} | {verdict} |");
        }
    }

    private static (double Prefetch, double File, double Ratio) Alternate(Snapshot snapshot, bool cold)
    {
        var prefetch = new List<double>();
        var file = new List<double>();
        for (int round = cold ? 0 : -1; round < Rounds; round++)
        {
            double one = Exec(snapshot, Table, "prefetch", cold), other = Exec(snapshot, Table, "file", cold);
            if (round >= 0)
            {
                prefetch.Add(one);
                file.Add(other);
            }
        }

        return (Median(prefetch), Median(file), Median([.. prefetch.Zip(file, (one, other) => one / other)]));
    }

    private static double Exec(Snapshot snapshot, string code, string policy, bool cold)
    {
        if (cold)
        {
            foreach (string path in (string[])[snapshot.MemoryPath, snapshot.WorkingSetPath])
            {
                using var file = File.OpenHandle(path);
                SparseFile.DropFromPageCache(file);
            }
        }

        return ExecBenchmark.Run(Dh, ["exec", "--version", snapshot.Manifest.Version, "--memory-policy", policy, "-c", code]).Milliseconds;
    }

    /// <summary>
    /// What is private to a VMM when several have run the same: Private_Clean and Private_Dirty of smaps_rollup, with all of the memory that
    /// this process has made for it in place of what the VMM has mapped of that.
    /// </summary>
    private static async Task<double> PrivateMibAsync(Snapshot snapshot, MemoryPolicy policy)
    {
        var sandboxes = new List<Sandbox>();
        try
        {
            for (int i = 0; i < Clones; i++)
            {
                var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { MemoryPolicy = policy, Installation = new Installation(Repository.PathOf("bin")) });
                sandboxes.Add(sandbox);
                var output = new CapturedText();
                var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = Table }, output);
                if (result.ExitCode != 0)
                {
                    throw new InvalidOperationException($"The code ended with {result.ExitCode}: {output.Text}");
                }
            }

            return Median([.. sandboxes.Select(sandbox => PrivateMib(sandbox.VmmProcessId))]) + (BackingMib() / Clones);
        }
        finally
        {
            foreach (var sandbox in sandboxes)
            {
                await sandbox.DisposeAsync();
            }
        }
    }

    private static double PrivateMib(int process) =>
        MibOf($"/proc/{process}/smaps_rollup", "Private_Clean:", "Private_Dirty:") - MibOf($"/proc/{process}/status", "RssShmem:");

    private static double MibOf(string path, params string[] fields) => File.ReadLines(path)
        .Where(line => fields.Any(field => line.StartsWith(field, StringComparison.Ordinal)))
        .Sum(line => double.Parse(line.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture)) / 1024;

    /// <summary>What the files take that page servers of this process have made guest memory of.</summary>
    private static double BackingMib()
    {
        double bytes = 0;
        foreach (string link in Directory.EnumerateFiles("/proc/self/fd").Where(link => new FileInfo(link).LinkTarget?.StartsWith("/memfd:guest-memory", StringComparison.Ordinal) == true))
        {
            using var file = File.OpenHandle(link);
            bytes += SparseFile.GetDataExtents(file, RandomAccess.GetLength(file)).Sum(extent => extent.Length);
        }

        return bytes / (1 << 20);
    }

    private static double Median(int rounds, Func<double> measure) => Median([.. Enumerable.Range(0, rounds).Select(_ => measure())]);

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
