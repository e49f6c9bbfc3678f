using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// The eager page server against a bare UFFDIO_COPY loop in C (bench/copy_loop.c). Each run has a client of its own, whose handshake waits
/// in the socket when the clock starts; the clock runs from the opening of the memory file until the regions are released. The runs are
/// interleaved, so that a slow moment of the machine meets all of them.
/// </summary>
internal static class PopulationBenchmark
{
    private const long Length = 512L << 20;
    private const int Runs = 15;
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);
    private static readonly int[] Workers = [1, 2];

    public static async Task RunAsync()
    {
        using var directory = new TempDir();
        // Runs of up to 16 MiB, half of the file data, in the page cache: what a snapshot looks like that was just made.
        string file = SparseFileBuilder.Write(directory["memory"], Length, maxRunPages: 4096);
        var times = Workers.ToDictionary(workers => workers, _ => (C: new List<double>(), Server: new List<double>(), Copying: new List<double>()));
        long copied = 0;
        for (int run = -2; run < Runs; run++)
        {
            foreach (int workers in Workers)
            {
                double c = MeasureC(file, workers);
                var (server, result) = await MeasureServerAsync(file, workers);
                copied = result.CopiedBytes;
                if (run >= 0)
                {
                    times[workers].C.Add(c);
                    times[workers].Server.Add(server);
                    times[workers].Copying.Add(result.PopulationTime.TotalMilliseconds);
                }
            }
        }

        var report = new StringBuilder();
        report.AppendLine("# Population").AppendLine();
        report.AppendLine(CultureInfo.InvariantCulture,
            $"The eager page server against a bare UFFDIO_COPY loop in C: {Length >> 20} MiB, {copied >> 20} MiB of them data, in the page cache; medians of {Runs} interleaved runs; {Environment.ProcessorCount} cores.");
        report.AppendLine("Both clocks run from the opening of the memory file to the release. `ratio` is C's time divided by the page server's: 1 is as fast as C. Made by `Dh.Benchmarks population`.").AppendLine();
        report.AppendLine("| workers | C, ms | page server, ms | ratio | its population alone, ms | promise |").AppendLine("| --- | --- | --- | --- | --- | --- |");
        foreach (int workers in Workers)
        {
            var (c, server, copying) = times[workers];
            report.AppendLine(CultureInfo.InvariantCulture,
                $"| {workers} | {Median(c):0.0} | {Median(server):0.0} | {Median(c) / Median(server):0.00} | {Median(copying):0.0} | {(workers == 1 ? "0.95" : "0.90")} |");
        }

        Console.Write(report);
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/population.md"), report.ToString());
    }

    private static async Task<(double Milliseconds, PopulationResult Result)> MeasureServerAsync(string file, int workers)
    {
        var (client, connection) = StartClient();
        using (client)
        {
            long start = Stopwatch.GetTimestamp();
            await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = workers });
            var result = await server.WaitPopulatedAsync();
            double elapsed = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
            End(client);
            return (elapsed, result);
        }
    }

    private static double MeasureC(string file, int workers)
    {
        var (client, connection) = StartClient();
        using (client)
        using (connection)
        {
            string microseconds = Run("copy_loop", ["3", file, workers.ToString(CultureInfo.InvariantCulture)], connection, out var loop);
            using (loop)
            {
                End(client);
                if (!loop.WaitAndReap(Limit) || microseconds.Length == 0)
                {
                    throw new InvalidOperationException("copy_loop failed");
                }
            }

            return int.Parse(microseconds, CultureInfo.InvariantCulture) / 1000.0;
        }
    }

    /// <summary>Starts a client and returns when its handshake waits in the socket.</summary>
    private static (ChildProcess Client, SafeSocketHandle Connection) StartClient()
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (theirs)
        {
            var (console, remote) = UnixSockets.CreatePair(UnixSocketKind.Stream);
            using (remote)
            using (var lines = new Socket(console) { ReceiveTimeout = (int)Limit.TotalMilliseconds })
            {
                // Its input stays open in nobody's hands but its own: it ends when it is killed.
                var client = ChildProcess.Start(
                    Path.Combine(AppContext.BaseDirectory, "guest-memory-client"),
                    ["fd", "3", "normal", Length.ToString(CultureInfo.InvariantCulture)],
                    new Dictionary<string, string>(),
                    [(0, theirs), (1, remote), (3, theirs)]);
                string text = "";
                byte[] buffer = new byte[256];
                while (!text.Contains("sent\n", StringComparison.Ordinal))
                {
                    int length = lines.Receive(buffer);
                    text += length > 0 ? Encoding.ASCII.GetString(buffer, 0, length) : throw new InvalidOperationException("guest-memory-client failed");
                }

                return (client, ours);
            }
        }
    }

    private static string Run(string program, string[] arguments, SafeSocketHandle connection, out ChildProcess child)
    {
        var (console, remote) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (remote)
        using (var output = new Socket(console) { ReceiveTimeout = (int)Limit.TotalMilliseconds })
        {
            child = ChildProcess.Start(Path.Combine(AppContext.BaseDirectory, program), arguments, new Dictionary<string, string>(), [(1, remote), (3, connection)]);
            remote.Dispose();
            byte[] buffer = new byte[256];
            return Encoding.ASCII.GetString(buffer, 0, output.Receive(buffer)).Trim();
        }
    }

    private static void End(ChildProcess client)
    {
        _ = client.PidFd.SendSignal(PidFd.SigKill);
        _ = client.WaitAndReap(Limit);
    }

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
