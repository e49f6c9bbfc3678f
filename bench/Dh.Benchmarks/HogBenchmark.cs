using System.Diagnostics;
using System.Globalization;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>What pooled runs take beside one that takes all that it can get, against what they take alone.</summary>
internal static class HogBenchmark
{
    private const int Size = 4;
    private const double MaximalRatio = 2;

    private static readonly (string Name, string Code)[] Hogs =
    [
        ("two processes that compute", "import os\nos.fork()\nwhile True: pass"),
        ("endless output", "while True: print('x' * 1000)"),
        ("forks whose ends are waited for", "import os\nwhile True:\n    if (child := os.fork()) == 0: os._exit(0)\n    os.waitpid(child, 0)"),
        ("endless forks", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    ];

    public static async Task<bool> RunAsync()
    {
        int count = int.Parse(Environment.GetEnvironmentVariable("HOG_COUNT") ?? "200", CultureInfo.InvariantCulture);
        var report = new PromiseReport(
            "A hog in the pool", $"{count} pooled runs of `print('hello')`, one after the other, a pool of {Size}, {Environment.ProcessorCount} CPUs; beside them one run of the same pool that takes all that it can get. Made by `Dh.Benchmarks hog`.");
        await using (await BenchmarkPool.StartAsync(Size, "--template", "python"))
        {
            Measure(count / 10);
            double[] usual = Measure(count);
            report.Row("p50, p99 without a hog", $"{At(usual, 0.5):0} ms, {At(usual, 0.99):0} ms");
            foreach (var (name, code) in Hogs)
            {
                double[] times;
                int starts;
                await using (var hog = new Hog(code))
                {
                    await Task.Delay(TimeSpan.FromSeconds(3));
                    if ((await BenchmarkPool.StatusAsync()).GetProperty("running").GetInt32() != 1)
                    {
                        throw new InvalidOperationException($"{name}: the hog does not run in the pool.");
                    }

                    times = Measure(count);
                    starts = hog.Starts;
                }

                double ratio = At(times, 0.99) / At(usual, 0.99);
                report.Row($"p50, p99 beside {name}", $"{At(times, 0.5):0} ms, {At(times, 0.99):0} ms: p99 {ratio:0.00} times{(starts > 1 ? $" (started {starts} times: its guest ends it)" : "")}", $"< {MaximalRatio} times", ratio < MaximalRatio);
            }
        }

        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/hog.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    private static double[] Measure(int count) =>
        [.. Enumerable.Range(0, count).Select(_ => ExecBenchmark.Run(ExecBenchmark.Dh, ["exec", "--template", "python", "-c", "print('hello')"], BenchmarkPool.Environment).Milliseconds).Order()];

    private static double At(double[] sorted, double part) => sorted[(int)Math.Min(sorted.Length - 1, sorted.Length * part)];

    /// <summary>A run that takes all that it can get, and is begun again when its guest has ended it.</summary>
    private sealed class Hog : IAsyncDisposable
    {
        private readonly CancellationTokenSource _stop = new();
        private readonly Task _running;

        public Hog(string code) => _running = RunAsync(code);

        public int Starts { get; private set; }

        public async ValueTask DisposeAsync()
        {
            await _stop.CancelAsync();
            await _running;
            _stop.Dispose();
        }

        private async Task RunAsync(string code)
        {
            while (!_stop.IsCancellationRequested)
            {
                // The shell only opens /dev/null: exec makes it dh.
                var start = new ProcessStartInfo("/bin/sh", ["-c", "exec \"$0\" exec --template python -c \"$1\" > /dev/null 2>&1 < /dev/null", ExecBenchmark.Dh, code]);
                start.Environment["DH_HOME"] = DhHome.Default.Path;
                start.Environment[BenchmarkPool.Environment.Name] = BenchmarkPool.Environment.Value;
                using var process = Process.Start(start)!;
                Starts++;
                try
                {
                    await process.WaitForExitAsync(_stop.Token);
                }
                catch (OperationCanceledException)
                {
                    process.Kill();
                    await process.WaitForExitAsync();
                }
            }
        }
    }
}
