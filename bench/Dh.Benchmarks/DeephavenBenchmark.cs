using System.Diagnostics;
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
/// that clones take. The policies are measured in turn, in every round, each round beginning with the next: prefetch, file, and the VMM's
/// mapping of the memory file alone, without the pages that a recorded run has written and that <c>file</c> copies while the VMM starts.
/// </summary>
internal static class DeephavenBenchmark
{
    private const int Rounds = 15;
    private const int Clones = 4;
    private const string Hello = "print('hello')";
    private const string Table = "print(1+1)\nt = empty_table(5).update(['x = i'])\nprint(t.to_string())";
    private static readonly string Dh = Repository.PathOf("bin/dh");

    public static async Task<bool> RunAsync()
    {
        var snapshot = new SnapshotStore(DhHome.Default).FindNewest("deephaven")
            ?? throw new InvalidOperationException("There is no snapshot of Deephaven: run `dh vm prepare --version 41.1`, with --wheelhouse DIR where there is no index.");
        double bootMs = snapshot.Manifest.BootSeconds * 1000;
        double hello = Median(Rounds, () => Exec(snapshot, Hello, "prefetch", DhHome.Default.Path, cold: false).Milliseconds);
        double end = Median(Rounds, () =>
        {
            var run = Exec(snapshot, Table, "prefetch", DhHome.Default.Path, cold: false, ("DH_TRACE", "1"));
            return ExecBenchmark.Milliseconds(ExecBenchmark.Marks(run.Output)["printed"], run.Ended);
        });
        // Beside the snapshots: hard links do not leave a file system.
        var plainHome = new DhHome(Path.Combine(DhHome.Default.Path, "without-working-set"));
        LinkWithoutWorkingSet(snapshot, plainHome);
        var warm = Alternate(snapshot, plainHome.Path, cold: false);
        var cold = Alternate(snapshot, plainHome.Path, cold: true);
        Directory.Delete(plainHome.Path, recursive: true);
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
        Row("a table, the memory file mapped and nothing more", $"{warm.Plain:0} ms", $"-", true);
        Row("a table, prefetch by file", $"{warm.ByFile:0.00}", $"<= 0.95", warm.ByFile <= 0.95);
        Row("a table, prefetch by the mapping alone", $"{warm.ByPlain:0.00}", $"<= 0.95", warm.ByPlain <= 0.95);
        Row("a table, files out of the page cache, prefetch by file", $"{cold.Prefetch:0} ms by {cold.File:0} ms: {cold.ByFile:0.00}", $"<= 0.50", cold.ByFile <= 0.5);
        Row("a table, files out of the page cache, prefetch by the mapping alone", $"{cold.Prefetch:0} ms by {cold.Plain:0} ms: {cold.ByPlain:0.00}", $"<= 0.50", cold.ByPlain <= 0.5);
        Row("result printed to exit of `dh`, prefetch", $"{end:0.0} ms", $"<= {ExecBenchmark.MaximalEndMs} ms", end <= ExecBenchmark.MaximalEndMs);
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

    private static (double Prefetch, double File, double Plain, double ByFile, double ByPlain) Alternate(Snapshot snapshot, string plainHome, bool cold)
    {
        (string Policy, string Home, List<double> Times)[] ways = [("prefetch", DhHome.Default.Path, []), ("file", DhHome.Default.Path, []), ("file", plainHome, [])];
        Array.ForEach(ways, way => Exec(snapshot, Table, way.Policy, way.Home, cold)); // what brings everything else near
        for (int round = 0; round < Rounds; round++)
        {
            for (int i = 0; i < ways.Length; i++)
            {
                var (policy, home, times) = ways[(round + i) % ways.Length];
                times.Add(Exec(snapshot, Table, policy, home, cold).Milliseconds);
            }
        }

        var (prefetch, file, plain) = (ways[0].Times, ways[1].Times, ways[2].Times);
        return (Median(prefetch), Median(file), Median(plain), Ratio(file), Ratio(plain));

        double Ratio(List<double> others) => Median([.. prefetch.Zip(others, (one, other) => one / other)]);
    }

    /// <summary>A home in which the snapshot is the same but for its working set.</summary>
    private static void LinkWithoutWorkingSet(Snapshot snapshot, DhHome home)
    {
        string snapshots = Path.Combine(home.SnapshotsDirectory, $"{snapshot.Manifest.Template}-{snapshot.Manifest.Version}"), linked = Path.Combine(snapshots, "linked");
        if (Directory.Exists(home.Path))
        {
            Directory.Delete(home.Path, recursive: true); // of a benchmark that was ended
        }

        Directory.CreateDirectory(linked);
        using var link = Process.Start("ln", [.. Directory.EnumerateFiles(snapshot.Directory).Where(path => path != snapshot.WorkingSetPath), linked]);
        link.WaitForExit();
        File.CreateSymbolicLink(Path.Combine(snapshots, "current"), "linked");
    }

    private static ExecBenchmark.Finished Exec(Snapshot snapshot, string code, string policy, string home, bool cold, params (string Name, string Value)[] variables)
    {
        if (cold)
        {
            foreach (string path in (string[])[snapshot.MemoryPath, snapshot.WorkingSetPath])
            {
                using var file = File.OpenHandle(path);
                SparseFile.DropFromPageCache(file);
            }
        }

        var run = ExecBenchmark.Run(Dh, ["exec", "--version", snapshot.Manifest.Version, "--memory-policy", policy, "-c", code], [("DH_HOME", home), .. variables]);
        if (run.Output.StartsWith("dh: ", StringComparison.Ordinal))
        {
            throw new InvalidOperationException(run.Output);
        }

        // The launcher takes the machine apart when dh has ended: not beside the next run.
        string runs = new DhHome(home).RunDirectory;
        if (!SpinWait.SpinUntil(() => !Directory.EnumerateDirectories(runs).Any(), TimeSpan.FromSeconds(10)))
        {
            throw new InvalidOperationException($"A run is left in {runs}.");
        }

        return run;
    }

    /// <summary>What is private to a VMM when several have run the same: Private_Clean and Private_Dirty of smaps_rollup.</summary>
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

            return Median([.. sandboxes.Select(sandbox => PrivateMib(sandbox.VmmProcessId))]);
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
        MibOf($"/proc/{process}/smaps_rollup", "Private_Clean:", "Private_Dirty:");

    private static double MibOf(string path, params string[] fields) => File.ReadLines(path)
        .Where(line => fields.Any(field => line.StartsWith(field, StringComparison.Ordinal)))
        .Sum(line => double.Parse(line.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture)) / 1024;

    private static double Median(int rounds, Func<double> measure) => Median([.. Enumerable.Range(0, rounds).Select(_ => measure())]);

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
