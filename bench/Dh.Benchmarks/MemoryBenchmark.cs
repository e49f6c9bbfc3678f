using System.Diagnostics;
using System.Globalization;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>
/// How guest memory comes back: the pages that a real guest touched are touched again, in the same order, by a C program
/// (bench/memory_replay.c) whose memory comes back in one way after the other. All ways are measured in turn, in every round, so that a slow
/// moment of the machine meets all of them; first from the page cache, then with the files dropped from it before each run.
/// </summary>
internal sealed class MemoryBenchmark : IDisposable
{
    private const int WarmRounds = 25;
    private const int Traces = 5;
    private const int ColdRounds = 7;
    private const int BlockSize = 64 << 10;

    /// <summary>QEMU takes this long from its start, with which the page server starts, until its handshake, and a core.</summary>
    private static readonly TimeSpan Handshake = TimeSpan.FromMilliseconds(11);

    /// <summary>And as long as this until its machine can run.</summary>
    private static readonly TimeSpan VmmStart = TimeSpan.FromMilliseconds(40);

    private readonly TempDir _directory = new();
    private readonly IReadOnlyList<GuestTrace> _traces;
    private GuestTrace _trace;
    private readonly string _memory;
    private readonly string _workingSet;
    private readonly string _compressed;
    private readonly string _blockSize = BlockSize.ToString(CultureInfo.InvariantCulture);

    private MemoryBenchmark(IReadOnlyList<GuestTrace> traces)
    {
        _traces = traces;
        _trace = traces[0];
        _memory = _trace.Snapshot.MemoryPath;
        _workingSet = _trace.Snapshot.WorkingSetPath;
        _compressed = _directory["memory.lz4"];
        Lz4MemoryWriter.Write(_memory, _compressed);
        foreach (var trace in traces)
        {
            trace.WriteTo(PathOf(trace));
        }
    }

    public static async Task<bool> RunAsync()
    {
        using var benchmark = new MemoryBenchmark(await GuestTrace.RecordAsync(Traces));
        return await benchmark.MeasureAsync();
    }

    public void Dispose() => _directory.Dispose();

    private async Task<bool> MeasureAsync()
    {
        var ways = Ways();
        for (int round = -2; round < WarmRounds; round++)
        {
            _trace = _traces[(round + 2) % Traces];
            foreach (var way in ways)
            {
                var sample = await way.Measure();
                if (round >= 0)
                {
                    way.Warm.Add(sample);
                }
            }
        }

        for (int round = 0; round < ColdRounds; round++)
        {
            _trace = _traces[round % Traces];
            foreach (var way in ways)
            {
                DropFromPageCache();
                way.Cold.Add(await way.Measure());
            }
        }

        var serving = await ServingCost.MeasureAsync(OpenServed, _trace);
        var compressed = await CompressedRestore.MeasureAsync(_trace.Snapshot);
        var report = new MemoryReport(_traces, ways, serving, compressed, WarmRounds, ColdRounds, Handshake, VmmStart);
        await report.WriteAsync();
        return report.Passed;
    }

    private List<MemoryWay> Ways()
    {
        string all = Runs("all", DataExtents()), written = Runs("written", _trace.WorkingSet.Set.Written);
        string packed = _directory["packed"];
        using var prefetched = OpenSource(PopulationPolicy.Prefetch);
        GuestTrace.WriteRuns(packed, _trace.WorkingSet.Set.Touched, _trace.WorkingSet.PagesOffset, prefetched.PrefetchExtents.Skip(_trace.WorkingSet.Set.Touched.Count));
        return
        [
            new(MemoryWay.Memcpy, () => ReplayAsync("memcpy", all)),
            new(MemoryWay.CCopy(1), () => ReplayAsync("c-copy", _memory, "1")),
            new(MemoryWay.Eager(1), () => ServeAsync(PopulationPolicy.Eager, 1, headStart: false)),
            new(MemoryWay.CCopy(2), () => ReplayAsync("c-copy", _memory, "2")),
            new(MemoryWay.Eager(2), () => ServeAsync(PopulationPolicy.Eager, 2, headStart: false)),
            new(MemoryWay.EagerRestore, () => ServeAsync(PopulationPolicy.Eager, 2, headStart: true)),
            new(MemoryWay.EagerBeside, () => ServeBesideAsync(PopulationPolicy.Eager, OpenSource(PopulationPolicy.Eager))),
            new(MemoryWay.EagerCompressed, () => ServeBesideAsync(PopulationPolicy.Eager, Lz4Source.Open(_compressed))),
            new(MemoryWay.CPrefetch(1), () => ReplayAsync("c-prefetch", _workingSet, packed, "1", _blockSize)),
            new(MemoryWay.Prefetch(1), () => ServeAsync(PopulationPolicy.Prefetch, 1, headStart: true)),
            new(MemoryWay.CPrefetch(2), () => ReplayAsync("c-prefetch", _workingSet, packed, "2", _blockSize)),
            new(MemoryWay.Prefetch(2), () => ServeAsync(PopulationPolicy.Prefetch, 2, headStart: true)),
            new(MemoryWay.PrefetchBeside, () => ServeBesideAsync(PopulationPolicy.Prefetch, OpenSource(PopulationPolicy.Prefetch))),
            new(MemoryWay.File, () => ReplayAsync("file")),
            new(MemoryWay.FilePrefaulted, () => ReplayAsync("file-prefault", written)),
            new(MemoryWay.FilePopulated, () => ReplayAsync("file-populate")),
            new(MemoryWay.PrefetchAtOnce, () => ServeAsync(PopulationPolicy.Prefetch, 2, headStart: false)),
            new(MemoryWay.CLazy, () => ReplayAsync("c-lazy", _blockSize)),
            new(MemoryWay.Lazy, () => ServeAsync(PopulationPolicy.Lazy, 1, headStart: true)),
        ];

        IReadOnlyList<FileExtent> DataExtents()
        {
            using var source = SparseFileSource.Open(_memory);
            return source.DataExtents;
        }

        string Runs(string name, IReadOnlyList<FileExtent> runs)
        {
            GuestTrace.WriteRuns(_directory[name], runs);
            return _directory[name];
        }
    }

    /// <summary>The client alone, or with a handler in C in its own process.</summary>
    private async Task<Sample> ReplayAsync(params string[] mode)
    {
        using var client = ReplayClient.Start([PathOf(_trace), _memory, .. mode]);
        await SpinAsync(VmmStart); // as busy a machine as the page server finds
        var (start, end) = client.Map();
        var replay = client.Replay(_trace.Pages.Count);
        return new Sample((end - start) / 1e6, replay);
    }

    /// <summary>The client with a page server in this process.</summary>
    /// <param name="policy">What the page server places before.</param>
    /// <param name="workers">Its threads.</param>
    /// <param name="headStart">Whether it starts as long before the handshake as in a restore; else the handshake waits for it.</param>
    private async Task<Sample> ServeAsync(PopulationPolicy policy, int workers, bool headStart)
    {
        using var client = StartServed();
        long start = 0;
        if (!headStart)
        {
            _ = client.Map();
            await SpinAsync(VmmStart);
            start = Stopwatch.GetTimestamp();
        }

        await using var server = PageServer.Start(client.Connection, OpenSource(policy), new PageServerOptions { Policy = policy, Workers = workers, BlockSize = BlockSize });
        if (headStart)
        {
            await SpinAsync(Handshake);
            _ = client.Map();
        }

        var result = await server.WaitPopulatedAsync();
        double populated = headStart ? result.PopulationTime.TotalMilliseconds : Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        return new Sample(populated, client.Replay(_trace.Pages.Count));
    }

    /// <summary>The same, but the clock starts when the VMM's machine could run: until then the population costs nobody time.</summary>
    private async Task<Sample> ServeBesideAsync(PopulationPolicy policy, IMemorySource source)
    {
        using var client = StartServed();
        await using var server = PageServer.Start(client.Connection, source, new PageServerOptions { Policy = policy, BlockSize = BlockSize });
        await SpinAsync(Handshake);
        _ = client.Map();
        await SpinAsync(VmmStart - Handshake);
        long start = Stopwatch.GetTimestamp();
        _ = await server.WaitPopulatedAsync();
        return new Sample(Stopwatch.GetElapsedTime(start).TotalMilliseconds, client.Replay(_trace.Pages.Count));
    }

    /// <summary>Keeps a core busy, as a VMM does that starts.</summary>
    private static Task SpinAsync(TimeSpan time) => Task.Factory.StartNew(
        () =>
        {
            for (long start = Stopwatch.GetTimestamp(); Stopwatch.GetElapsedTime(start) < time;)
            {
                Thread.SpinWait(100);
            }
        },
        CancellationToken.None,
        TaskCreationOptions.LongRunning,
        TaskScheduler.Default);

    private string PathOf(GuestTrace trace) => _directory[string.Create(CultureInfo.InvariantCulture, $"trace-{_traces.Index().First(item => item.Item == trace).Index}")];

    private (ReplayClient Client, IMemorySource Source) OpenServed() => (StartServed(), OpenSource(PopulationPolicy.Lazy));

    private ReplayClient StartServed() => ReplayClient.Start([PathOf(_trace), _memory, "uffd", ReplayClient.SocketDescriptor]);

    private IMemorySource OpenSource(PopulationPolicy policy)
    {
        var memory = SparseFileSource.Open(_memory);
        return policy == PopulationPolicy.Prefetch ? WorkingSetSource.Open(memory, _workingSet, _trace.Snapshot.Manifest.Id) : memory;
    }

    private void DropFromPageCache()
    {
        foreach (string path in (string[])[_memory, _workingSet, _compressed])
        {
            using var file = File.OpenHandle(path);
            SparseFile.DropFromPageCache(file);
        }
    }
}
