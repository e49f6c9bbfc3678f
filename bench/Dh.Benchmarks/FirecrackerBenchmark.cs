using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using Dh.IntegrationTests.Firecracker;
using Dh.TestSupport;
using Dh.Vmm.Firecracker;

namespace Dh.Benchmarks;

/// <summary>
/// What a run under Firecracker takes before Firecracker's own work begins, measured over one that is played: from the start of the program
/// until the request that loads the snapshot is taken, and what a request costs beside its two system calls.
/// </summary>
internal static class FirecrackerBenchmark
{
    private const int Rounds = 51;
    private const int Calls = 2000;
    private const double MaximalStartMs = 12;
    private const double MaximalCallMs = 1.5;
    private const string Code = "6 * 7";
    private const string Body = "{}";

    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(10);

    public static async Task<bool> RunAsync()
    {
        var report = new PromiseReport(
            "Firecracker", $"Medians of {Rounds} runs and {Calls} calls, {Environment.ProcessorCount} CPUs, over a program that plays Firecracker (test/fake-firecracker). Made by `Dh.Benchmarks firecracker`.");
        using var fake = new FakeFirecracker();
        fake.Guest.Programs[Code] = run =>
        {
            run.ResultRepr = "42";
            return Task.FromResult(0);
        };
        var (floors, vmmStarts, loads) = await MeasureStartsAsync(fake);
        report.Row("`dh` start to the load request taken", $"{ExecBenchmark.Median(loads):0.0} ms", $"<= {MaximalStartMs} ms", ExecBenchmark.Median(loads) <= MaximalStartMs);
        report.Row("- of it until Firecracker's own start is behind it", $"{ExecBenchmark.Median(vmmStarts):0.0} ms");
        report.Row("- `/bin/true`, the floor of this way to measure", $"{ExecBenchmark.Median(floors):0.0} ms");
        var (bare, client) = await MeasureCallsAsync(fake);
        double overhead = ExecBenchmark.Median(client) - ExecBenchmark.Median(bare);
        report.Row("a request through the API client, beside a bare exchange of the same bytes", $"{overhead:0.000} ms", $"<= {MaximalCallMs} ms", overhead <= MaximalCallMs);
        report.Row("- the whole request", $"{ExecBenchmark.Median(client):0.000} ms");
        report.Row("- the bare exchange", $"{ExecBenchmark.Median(bare):0.000} ms");
        string text = report.ToString();
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/firecracker.md"), text);
        Console.Write(text);
        return report.Passed;
    }

    private static async Task<(List<double> Floors, List<double> VmmStarts, List<double> Loads)> MeasureStartsAsync(FakeFirecracker fake)
    {
        using var home = new TempDir();
        await FakeSnapshot.MakeAsync(new DhHome(home.Path), fake);
        List<double> floors = [], vmmStarts = [], loads = [];
        for (int round = -3; round < Rounds; round++)
        {
            int noted = fake.Notes().Count;
            var floor = ExecBenchmark.Run("/bin/true", []);
            var run = ExecBenchmark.Run(ExecBenchmark.Dh, ["exec", "-c", Code], ("DH_HOME", home.Path), ("DH_FIRECRACKER", fake.ProgramPath));
            if (run.Output != "42\n")
            {
                throw new InvalidOperationException($"dh exec failed: {run.Output}");
            }

            if (round < 0)
            {
                continue; // the first ones fill the page cache, and find out Firecracker's version
            }

            var notes = fake.Notes().Skip(noted).ToList();
            floors.Add(floor.Milliseconds);
            vmmStarts.Add(ExecBenchmark.Milliseconds(run.Started, notes.Single(note => note.Text == "listening").Time));
            loads.Add(ExecBenchmark.Milliseconds(run.Started, notes.Single(note => note.Text.StartsWith("PUT /snapshot/load ", StringComparison.Ordinal)).Time));
        }

        return (floors, vmmStarts, loads);
    }

    /// <summary>The same request, by turns through the client and as bytes on a blocking socket.</summary>
    private static async Task<(List<double> Bare, List<double> Client)> MeasureCallsAsync(FakeFirecracker fake)
    {
        using var process = await fake.StartAsync();
        string path = Path.Combine(process.Directory, "api.sock");
        using var api = await FirecrackerApi.ConnectAsync(
            path, Limit, new TaskCompletionSource<Vmm.VmmExit>().Task, process.Kill, () => Task.FromResult("."), () => "", CancellationToken.None);
        using var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await socket.ConnectAsync(new UnixDomainSocketEndPoint(path));
        byte[] request = Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"PUT /entropy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {Body.Length}\r\n\r\n{Body}"));
        byte[] answer = new byte[4096];
        List<double> bare = [], client = [];
        for (int call = -100; call < Calls; call++)
        {
            long start = Stopwatch.GetTimestamp();
            int length = Exchange(socket, request, answer);
            long between = Stopwatch.GetTimestamp();
            await api.PutAsync("/entropy", Body, Limit, CancellationToken.None);
            long end = Stopwatch.GetTimestamp();
            if (!answer.AsSpan(0, length).StartsWith("HTTP/1.1 204 "u8))
            {
                throw new InvalidOperationException(Encoding.ASCII.GetString(answer, 0, length));
            }

            if (call >= 0)
            {
                bare.Add(ExecBenchmark.Milliseconds(start, between));
                client.Add(ExecBenchmark.Milliseconds(between, end));
            }
        }

        return (bare, client);
    }

    /// <summary>One write, and one blocking read, which takes all of so short an answer.</summary>
    private static int Exchange(Socket socket, byte[] request, byte[] answer)
    {
        _ = socket.Send(request);
        return socket.Receive(answer);
    }
}
