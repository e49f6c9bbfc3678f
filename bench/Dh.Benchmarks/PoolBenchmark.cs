using System.Diagnostics;
using System.Text.Json;
using Dh.Guest;
using Dh.Pool;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// Pooled runs: the whole program against one that restores on its own, against the same code in a ready sandbox through the library, and
/// against a cold boot; and how many runs a second a pool gives against a bare loop of restores.
/// </summary>
internal static class PoolBenchmark
{
    private const int Rounds = 41;
    private const int Size = 4;
    private const int Clients = 8;
    private const double MaximalAboveLibraryMs = 6;
    private const double MinimalAgainstUnpooled = 8;
    private const double MinimalAgainstBoot = 250;
    private const double MaximalHandOutMs = 0.3;
    private const double MinimalThroughput = 0.9;
    private const int DeephavenSize = 2;
    private const double MaximalDeephavenMs = 25;
    private static readonly TimeSpan ThroughputTime = TimeSpan.FromSeconds(15);
    private static readonly string[] Hello = ["exec", "--template", "python", "-c", "print('hello')"];
    private static readonly ExecutionRequest HelloRequest = new() { Source = "print('hello')", IsLast = true };
    private static readonly SandboxOptions Options = new();

    public static async Task<bool> RunAsync()
    {
        var report = new PromiseReport("The pool", $"Medians of {Rounds} runs, {Environment.ProcessorCount} CPUs, a pool of {Size}, all of it ready before each run. Made by `Dh.Benchmarks pool`.");
        var snapshot = new SnapshotStore(DhHome.Default).FindNewest("python") ?? throw new InvalidOperationException("There is no python snapshot: run `dh vm prepare`.");
        var unpooled = new List<double>();
        var pooled = new List<double>();
        var library = new List<double>();
        double handOutMs, perSecond;
        await using (await BenchmarkPool.StartAsync(Size, "--template", "python"))
        {
            for (int round = -2; round < Rounds; round++)
            {
                await BenchmarkPool.WaitReadyAsync(Size);
                double alone = Run(("DH_NO_POOL", "1"));
                double ready = await RunReadyAsync(snapshot);
                await BenchmarkPool.WaitReadyAsync(Size);
                double fromPool = Run(BenchmarkPool.Environment);
                if (round >= 0)
                {
                    unpooled.Add(alone);
                    library.Add(ready);
                    pooled.Add(fromPool);
                }
            }

            handOutMs = (await BenchmarkPool.StatusAsync()).GetProperty("wait_p50_ms").GetDouble();
            perSecond = await MeasurePooledThroughputAsync();
        }

        double bareLoop = await MeasureRestoresAsync(snapshot);
        double hello = ExecBenchmark.Median(pooled), above = hello - ExecBenchmark.Median(library);
        double faster = ExecBenchmark.Median(unpooled) / hello, thanBoot = snapshot.Manifest.BootSeconds * 1000 / hello;
        report.Row("`dh exec`, pooled, whole", $"{hello:0.0} ms");
        report.Row("- above the same code in a ready sandbox through the library", $"{above:0.0} ms", $"<= {MaximalAboveLibraryMs} ms", above <= MaximalAboveLibraryMs);
        report.Row("- the ready sandbox", $"{ExecBenchmark.Median(library):0.0} ms");
        report.Row("- against one that restores on its own", $"{faster:0.0} times faster ({ExecBenchmark.Median(unpooled):0} ms)", $">= {MinimalAgainstUnpooled} times", faster >= MinimalAgainstUnpooled);
        report.Row("- against the snapshot's own cold boot", $"{thanBoot:0} times faster", $">= {MinimalAgainstBoot} times", thanBoot >= MinimalAgainstBoot);
        report.Row("handing out a ready sandbox, inside the daemon", $"{handOutMs:0.000} ms", $"<= {MaximalHandOutMs} ms", handOutMs <= MaximalHandOutMs);
        report.Row($"runs a second, {Clients} clients", $"{perSecond:0.0}, {perSecond / bareLoop:0.00} of the restores a second of a bare loop ({bareLoop:0.0})", $">= {MinimalThroughput}", perSecond / bareLoop >= MinimalThroughput);
        await MeasureDeephavenAsync(report);
        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/pool.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    private static double Run(params ReadOnlySpan<(string, string)> variables) => ExecBenchmark.Run(ExecBenchmark.Dh, Hello, variables).Milliseconds;

    /// <summary>The run itself, in a sandbox that is prepared as a pool prepares one.</summary>
    private static async Task<double> RunReadyAsync(Snapshot snapshot)
    {
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, Options);
        var machine = new SandboxMachines.SandboxMachine(new SandboxMachines(Options), sandbox);
        await machine.WarmUpAsync(CancellationToken.None);
        await Task.Delay(TimeSpan.FromMilliseconds(200)); // it waits for its run, as in a pool
        return (await sandbox.ExecuteAsync(HelloRequest, new Nowhere())).Elapsed.TotalMilliseconds;
    }

    private static async Task MeasureDeephavenAsync(PromiseReport report)
    {
        const string What = "`dh exec -c 1+1`, pooled, on Deephaven";
        if (new SnapshotStore(DhHome.Default).FindNewest("deephaven") is not { } snapshot)
        {
            report.Row(What, $"not measured: no snapshot is prepared");
            return;
        }

        var times = new List<double>();
        await using (await BenchmarkPool.StartAsync(DeephavenSize, "--version", snapshot.Manifest.Version))
        {
            for (int round = 0; round < Rounds; round++)
            {
                await BenchmarkPool.WaitReadyAsync(DeephavenSize);
                times.Add(ExecBenchmark.Run(ExecBenchmark.Dh, ["exec", "--version", snapshot.Manifest.Version, "-c", "1+1"], BenchmarkPool.Environment).Milliseconds);
            }
        }

        double median = ExecBenchmark.Median(times);
        report.Row(What, $"{median:0.0} ms", $"<= {MaximalDeephavenMs} ms", median <= MaximalDeephavenMs);
    }

    private static async Task<double> MeasurePooledThroughputAsync()
    {
        int runs = 0;
        long start = Stopwatch.GetTimestamp();
        await Task.WhenAll(Enumerable.Range(0, Clients).Select(_ => Task.Run(() =>
        {
            while (Stopwatch.GetElapsedTime(start) < ThroughputTime)
            {
                Run(BenchmarkPool.Environment);
                Interlocked.Increment(ref runs);
            }
        })));
        // What was ready before it began was not restored within the time.
        return (runs - Size) / Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    private static async Task<double> MeasureRestoresAsync(Snapshot snapshot)
    {
        int restores = 0;
        long start = Stopwatch.GetTimestamp();
        for (; Stopwatch.GetElapsedTime(start) < ThroughputTime; restores++)
        {
            await using var sandbox = await Sandbox.RestoreAsync(snapshot, Options);
            await sandbox.ExecuteAsync(HelloRequest, new Nowhere());
        }

        return restores / Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    private sealed class Nowhere : IOutputSink
    {
        public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken) => ValueTask.CompletedTask;
    }
}

/// <summary>The daemon that a benchmark runs against, started and ended as a user does it.</summary>
internal sealed class BenchmarkPool : IAsyncDisposable
{
    private static readonly DhProgram Program = new(DhHome.Default.Path);

    private BenchmarkPool()
    {
    }

    /// <summary>What a client's environment must have to look where the daemon is.</summary>
    public static (string Name, string Value) Environment => ("XDG_RUNTIME_DIR", "");

    public static async Task<BenchmarkPool> StartAsync(int size, params string[] options)
    {
        var started = await Program.RunAsync(["vm", "pool", "start", "--detach", "--size", $"{size}", .. options]);
        return started.ExitCode == 0 ? new BenchmarkPool() : throw new InvalidOperationException($"dh vm pool start ended with {started.ExitCode}: {started.Error}");
    }

    public static async Task<JsonElement> StatusAsync() =>
        JsonDocument.Parse((await Program.RunAsync(["vm", "pool", "status", "--json"])).Output).RootElement.GetProperty("pools")[0];

    /// <summary>Waits until all of it is ready, and nothing is being restored that would take the processors.</summary>
    public static async Task WaitReadyAsync(int size)
    {
        using var limit = new CancellationTokenSource(TimeSpan.FromMinutes(1));
        while (await StatusAsync() is var status && (status.GetProperty("ready").GetInt32() < size || status.GetProperty("starting").GetInt32() > 0))
        {
            await Task.Delay(50, limit.Token);
        }

        await Task.Delay(200, limit.Token);
    }

    public async ValueTask DisposeAsync() => await Program.RunAsync(["vm", "pool", "stop"]);
}
