using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.Json;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// The program as a user runs it, against the newest prepared snapshot: a whole run as ratio to the cold boot that the same snapshot took,
/// the start of the program alone, what passes between the printed result and the program's end, and its own memory.
/// </summary>
internal static class ExecBenchmark
{
    private const int Rounds = 11;

    public static async Task RunAsync()
    {
        var dh = new DhProgram(DhHome.Default.Path);
        using var status = JsonDocument.Parse((await dh.RunAsync(["vm", "status", "--json"])).Output);
        double bootMs = status.RootElement.GetProperty("snapshots")[0].GetProperty("boot_seconds").GetDouble() * 1000;

        var versions = new List<double>();
        var runs = new List<double>();
        var ends = new List<double>();
        var anonymousKib = new List<double>();
        for (int i = 0; i < Rounds; i++)
        {
            long start = Stopwatch.GetTimestamp();
            await dh.RunAsync(["--version"]);
            versions.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);

            start = Stopwatch.GetTimestamp();
            using var process = dh.Start(["exec", "-c", "print('hello')"]);
            process.StandardInput.Close();
            await process.StandardOutput.ReadLineAsync();
            long printed = Stopwatch.GetTimestamp();
            await process.WaitForExitAsync();
            ends.Add(Stopwatch.GetElapsedTime(printed).TotalMilliseconds);
            runs.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);

            // The code waits for a line, so that the program's memory can be read while its machine lives.
            using var waiting = dh.Start(["exec", "-c", "print('there', flush=True); input()"]);
            await waiting.StandardOutput.ReadLineAsync();
            anonymousKib.Add(AnonymousKib(waiting.Id));
            await waiting.StandardInput.WriteLineAsync();
            await waiting.WaitForExitAsync();
        }

        double run = Median(runs);
        var table = new StringBuilder()
            .AppendLine("# The program").AppendLine()
            .AppendLine(CultureInfo.InvariantCulture, $"Medians of {Rounds} runs, {Environment.ProcessorCount} CPUs. `dh exec -c \"print('hello')\"` against the boot of the same image on this machine.").AppendLine()
            .AppendLine("| what | measured | promise |")
            .AppendLine("| --- | --- | --- |")
            .AppendLine(CultureInfo.InvariantCulture, $"| cold boot until the runner is ready | {bootMs:0} ms | - |")
            .AppendLine(CultureInfo.InvariantCulture, $"| `dh exec`, whole | {run:0} ms, {bootMs / run:0.0} times faster | >= 25 times |")
            .AppendLine(CultureInfo.InvariantCulture, $"| output read to the end of `dh` | {Median(ends):0.0} ms | <= 5 ms from the result |")
            .AppendLine(CultureInfo.InvariantCulture, $"| `dh --version` | {Median(versions):0.0} ms | <= 5 ms |")
            .AppendLine(CultureInfo.InvariantCulture, $"| anonymous memory of `dh` during a run | {Median(anonymousKib) / 1024:0.0} MiB | <= 30 MiB |");
        string path = Repository.PathOf("bench/results/exec.md");
        await File.WriteAllTextAsync(path, table.ToString());
        Console.Write(table);
    }

    private static double AnonymousKib(int pid)
    {
        string line = File.ReadLines($"/proc/{pid}/status").First(text => text.StartsWith("RssAnon:", StringComparison.Ordinal));
        return double.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture);
    }

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
