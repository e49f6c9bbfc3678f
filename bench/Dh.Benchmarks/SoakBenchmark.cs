using System.Collections.Concurrent;
using System.Diagnostics;
using System.Globalization;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>Pooled runs, thousands of them: that 200 clones share nothing, how many a second, how long they take, and that the daemon does not grow. <c>SOAK_COUNT</c> says how many (10,000).</summary>
internal static class SoakBenchmark
{
    private const int Size = 4;
    private const int Clients = 4;
    private const int Parts = 10;
    private const int Clones = 200;
    private const long MaximalGrowthKib = 1024;
    private const double MaximalClockErrorMs = 50;
    private const int ClockExchanges = 8;
    private static readonly DhProgram Program = new(DhHome.Default.Path);

    /// <summary>
    /// How the first instruction finds the wall clock, told again and again as time passes: an answer lies between what the host's clock says
    /// before it asks and after, and the closest of some answers says how far off that clock was.
    /// </summary>
    private static readonly string CloneCode = $"""
        import time; set_at = time.time() - time.monotonic()
        {CloneGenerators.Code}
        import sys; sys.stdout.flush()
        for _ in range({ClockExchanges}):
            sys.stdin.readline()
            print(set_at + time.monotonic(), flush=True)
        """;

    public static async Task<bool> RunAsync()
    {
        int count = int.Parse(Environment.GetEnvironmentVariable("SOAK_COUNT") ?? "10000", CultureInfo.InvariantCulture);
        var report = new PromiseReport("Soak", $"{count} pooled runs of `print('hello')` by {Clients} clients, a pool of {Size}, {Environment.ProcessorCount} CPUs. Made by `Dh.Benchmarks soak`.");
        var times = new ConcurrentBag<double>();
        var parts = new List<(int Descriptors, long AnonymousKib, int Directories)>();
        double seconds;
        await using (await BenchmarkPool.StartAsync(Size, "--template", "python"))
        {
            CompareClones(report);
        }

        await using (await BenchmarkPool.StartAsync(Size, "--template", "python"))
        {
            int daemon = (await BenchmarkPool.StatusAsync()).GetProperty("process_id").GetInt32();
            long start = Stopwatch.GetTimestamp();
            for (int part = 0; part < Parts; part++)
            {
                int left = count / Parts;
                await Task.WhenAll(Enumerable.Range(0, Clients).Select(_ => Task.Run(() =>
                {
                    while (Interlocked.Decrement(ref left) >= 0)
                    {
                        times.Add(ExecBenchmark.Run(ExecBenchmark.Dh, ["exec", "--template", "python", "-c", "print('hello')"], BenchmarkPool.Environment).Milliseconds);
                    }
                })));
                await BenchmarkPool.WaitReadyAsync(Size);
                parts.Add((
                    Directory.EnumerateFileSystemEntries($"/proc/{daemon}/fd").Count(), AnonymousKib(daemon), Directory.EnumerateDirectories(DhHome.Default.RunDirectory).Count()));
                Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{times.Count} runs: {parts[^1]}"));
            }

            seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            var status = await BenchmarkPool.StatusAsync();
            bool each = status.GetProperty("handed_out").GetInt64() == times.Count && status.GetProperty("failed").GetInt64() == 0;
            report.Row("runs that got a sandbox of the pool, and sandboxes that failed", $"{status.GetProperty("handed_out").GetInt64()} of {times.Count}, {status.GetProperty("failed").GetInt64()}", $"all, none", each);
        }

        double[] sorted = [.. times.Order()];
        double At(double part) => sorted[(int)Math.Min(sorted.Length - 1, sorted.Length * part)];
        long growth = parts[^1].AnonymousKib - parts[^2].AnonymousKib;
        report.Row("runs a second", $"{times.Count / seconds:0.0}");
        report.Row("whole run: p50, p99, p99.9", $"{At(0.5):0} ms, {At(0.99):0} ms, {At(0.999):0} ms");
        report.Row("daemon's descriptors, after the first and the last tenth", $"{parts[0].Descriptors}, {parts[^1].Descriptors}", $"no more", parts[^1].Descriptors <= parts[0].Descriptors);
        report.Row("daemon's anonymous memory, growth in the last tenth", $"{growth} KiB (of {parts[^1].AnonymousKib})", $"<= {MaximalGrowthKib} KiB", growth <= MaximalGrowthKib);
        report.Row("run directories, after the first and the last tenth", $"{parts[0].Directories}, {parts[^1].Directories}", $"{Size}", parts[^1].Directories == Size);
        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/soak.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    private static void CompareClones(PromiseReport report)
    {
        var lines = new ConcurrentBag<string[]>();
        double error = 0, uncertainty = 0;
        Parallel.For(0, Clones, new ParallelOptions { MaxDegreeOfParallelism = Clients }, _ =>
        {
            using var run = Program.Start(["exec", "--template", "python", "-c", CloneCode]);
            lines.Add(ReadLine(run).Split(' '));
            (double least, double most) = (double.NegativeInfinity, double.PositiveInfinity);
            for (int exchange = 0; exchange < ClockExchanges; exchange++)
            {
                double before = Now();
                run.StandardInput.WriteLine();
                double clock = double.Parse(ReadLine(run), CultureInfo.InvariantCulture);
                (least, most) = (Math.Max(least, clock - Now()), Math.Min(most, clock - before));
            }

            run.WaitForExit();
            lock (lines)
            {
                error = Math.Max(error, Math.Max(Math.Abs(least), Math.Abs(most)) * 1000);
                uncertainty = Math.Max(uncertainty, (most - least) * 1000);
            }
        });
        var alike = CloneGenerators.Alike(lines);
        report.Row($"equal values of {lines.Count} clones, {CloneGenerators.Names.Count} generators", $"{(alike.Count == 0 ? "none" : string.Join(", ", alike))}", $"none", alike.Count == 0 && lines.Count == Clones);
        report.Row("their wall clocks at the first instruction, against the host's", $"off by {error:0.0} ms at most (seen to {uncertainty:0.0} ms)", $"<= {MaximalClockErrorMs} ms", error <= MaximalClockErrorMs);
    }

    private static string ReadLine(Process run) =>
        run.StandardOutput.ReadLine() ?? throw new InvalidOperationException($"A clone ended before it had answered: {run.StandardError.ReadToEnd()}");

    private static double Now() => (DateTimeOffset.UtcNow - DateTimeOffset.UnixEpoch).TotalSeconds;

    private static long AnonymousKib(int process) => long.Parse(
        File.ReadLines($"/proc/{process}/status").First(line => line.StartsWith("RssAnon:", StringComparison.Ordinal)).Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture);
}
