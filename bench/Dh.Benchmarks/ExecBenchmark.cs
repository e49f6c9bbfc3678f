using System.Collections;
using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using Dh.Linux;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// The program as a user runs it, against a snapshot that the same run prepares: a whole run as ratio to the cold boot of the same image,
/// what the program itself takes before the VMM starts and after the result, the start of the program alone, and its own memory.
/// </summary>
/// <remarks>
/// The program is spawned with posix_spawn, its output goes into a socket that is read after its end, and its end is seen by its pidfd, so
/// that little beside it is measured; <c>/bin/true</c>, started in the same way, says how much that is. Stages come from <c>DH_TRACE</c>,
/// whose clock is this program's.
/// </remarks>
internal static partial class ExecBenchmark
{
    private const int Rounds = 21;
    private const double MinimalSpeedup = 25;
    private const double MaximalOutsideMs = 15;
    internal const double MaximalEndMs = 5;
    private const double MaximalVersionMs = 5;
    private const double MaximalAnonymousMib = 30;
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);
    internal static readonly string Dh = Repository.PathOf("bin/dh");
    private static readonly string[] Hello = ["exec", "-c", "print('hello')"];

    public static async Task<bool> RunAsync()
    {
        var report = new PromiseReport("The program", $"Medians of {Rounds} runs, {Environment.ProcessorCount} CPUs. `dh exec -c \"print('hello')\"` against one boot of the same image just before. Made by `Dh.Benchmarks exec`.");
        double bootMs = await MeasureBootAsync();
        var floors = new List<double>();
        var versions = new List<double>();
        var runs = new List<double>();
        var starts = new List<double>();
        var results = new List<double>();
        var ends = new List<double>();
        var anonymousMib = new List<double>();
        for (int round = -2; round < Rounds; round++)
        {
            var floor = Run("/bin/true", []);
            var version = Run(Dh, ["--version"]);
            var run = Run(Dh, Hello);
            var traced = Run(Dh, Hello, ("DH_TRACE", "1"));
            double mib = await MeasureAnonymousMibAsync();
            if (round < 0)
            {
                continue; // the first ones fill the page cache
            }

            var marks = Marks(traced.Output);
            floors.Add(floor.Milliseconds);
            versions.Add(version.Milliseconds);
            runs.Add(run.Milliseconds);
            starts.Add(Milliseconds(traced.Started, marks["vmm-start"]));
            results.Add(Milliseconds(marks["result"], traced.Ended));
            ends.Add(Milliseconds(marks["printed"], traced.Ended));
            anonymousMib.Add(mib);
        }

        double outside = Median(starts) + Median(results), speedup = bootMs / Median(runs);
        report.Row("cold boot until the runner is ready, not even running code", $"{bootMs:0} ms");
        report.Row("`dh exec`, whole", $"{Median(runs):0} ms, {speedup:0.0} times faster", $">= {MinimalSpeedup} times", speedup >= MinimalSpeedup);
        report.Row("`dh exec` outside the VMM, together", $"{outside:0.0} ms", $"<= {MaximalOutsideMs} ms", outside <= MaximalOutsideMs);
        report.Row("- process start to VMM start", $"{Median(starts):0.0} ms");
        report.Row("- result to exit", $"{Median(results):0.0} ms");
        report.Row("result printed to exit of `dh`", $"{Median(ends):0.0} ms", $"<= {MaximalEndMs} ms", Median(ends) <= MaximalEndMs);
        report.Row("`dh --version`", $"{Median(versions):0.0} ms", $"<= {MaximalVersionMs} ms", Median(versions) <= MaximalVersionMs);
        report.Row("- `/bin/true`, the floor of this way to measure", $"{Median(floors):0.0} ms");
        report.Row(
            "anonymous memory of `dh` during a run", $"{Median(anonymousMib):0.0} MiB", $"<= {MaximalAnonymousMib} MiB", Median(anonymousMib) <= MaximalAnonymousMib);
        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/exec.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    /// <summary>Prepares the snapshot anew: the boot that is compared with is one of this hour and this load.</summary>
    private static async Task<double> MeasureBootAsync()
    {
        var dh = new DhProgram(DhHome.Default.Path);
        var prepared = await dh.RunAsync(["vm", "prepare", "--force"], timeLimit: TimeSpan.FromMinutes(10));
        if (prepared.ExitCode != 0)
        {
            throw new InvalidOperationException($"dh vm prepare ended with {prepared.ExitCode}: {prepared.Error}");
        }

        using var status = JsonDocument.Parse((await dh.RunAsync(["vm", "status", "--json"])).Output);
        return status.RootElement.GetProperty("snapshots")[0].GetProperty("boot_seconds").GetDouble() * 1000;
    }

    /// <summary>Spawns a program and waits for its end; what it wrote is read afterwards, and must fit into a socket's buffer.</summary>
    internal static Finished Run(string path, string[] arguments, params ReadOnlySpan<(string Name, string Value)> variables)
    {
        var environment = Environment.GetEnvironmentVariables().Cast<DictionaryEntry>()
            .Where(variable => !((string)variable.Key).StartsWith("DH_", StringComparison.Ordinal))
            .ToDictionary(variable => (string)variable.Key, variable => (string)variable.Value!);
        environment["DH_HOME"] = DhHome.Default.Path;
        foreach (var (name, value) in variables)
        {
            environment[name] = value;
        }

        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (theirs)
        using (var output = new Socket(ours) { ReceiveTimeout = (int)Limit.TotalMilliseconds })
        {
            long started = Stopwatch.GetTimestamp();
            using var child = ChildProcess.Start(path, arguments, environment, [(1, theirs), (2, theirs)]);
            bool inTime = child.PidFd.WaitForExit(Limit);
            long ended = Stopwatch.GetTimestamp();
            if (!inTime)
            {
                _ = child.PidFd.SendSignal(PidFd.SigKill);
            }

            child.PidFd.Reap();
            byte[] buffer = new byte[64 << 10];
            string text = output.Available > 0 ? Encoding.UTF8.GetString(buffer, 0, output.Receive(buffer)) : "";
            return inTime && (arguments != Hello || text.StartsWith("hello\n", StringComparison.Ordinal))
                ? new Finished(started, ended, text)
                : throw new InvalidOperationException($"{path} {string.Join(' ', arguments)} failed: {text}");
        }
    }

    /// <summary>The code waits for a line, so that the program's memory can be read while its machine lives.</summary>
    private static async Task<double> MeasureAnonymousMibAsync()
    {
        using var waiting = new DhProgram(DhHome.Default.Path).Start(["exec", "-c", "print('there', flush=True); input()"]);
        await waiting.StandardOutput.ReadLineAsync();
        string line = (await File.ReadAllLinesAsync($"/proc/{waiting.Id}/status")).First(text => text.StartsWith("RssAnon:", StringComparison.Ordinal));
        await waiting.StandardInput.WriteLineAsync();
        await waiting.WaitForExitAsync();
        return double.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) / 1024;
    }

    internal static Dictionary<string, long> Marks(string output) => MarkPattern().Matches(output)
        .ToDictionary(match => match.Groups[1].Value, match => long.Parse(match.Groups[2].Value, CultureInfo.InvariantCulture) / (1_000_000_000 / Stopwatch.Frequency));

    internal static double Milliseconds(long from, long to) => Stopwatch.GetElapsedTime(from, to).TotalMilliseconds;

    internal static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);

    [GeneratedRegex(@"^trace: (\S+) (\d+)$", RegexOptions.Multiline)]
    private static partial Regex MarkPattern();

    /// <summary>A program that has ended; times in <see cref="Stopwatch"/> ticks.</summary>
    internal readonly record struct Finished(long Started, long Ended, string Output)
    {
        public double Milliseconds => ExecBenchmark.Milliseconds(Started, Ended);
    }
}
