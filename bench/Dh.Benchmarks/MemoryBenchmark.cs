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

    /// <summary>A VMM takes at least this long from its start to its handshake, and a core; the page server starts with it.</summary>
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
        var report = new MemoryReport(_traces, ways, serving, compressed, WarmRounds, ColdRounds, VmmStart);
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
            new(MemoryWay.EagerBacked, () => ServeBackedAsync(PopulationPolicy.Eager, OpenSource(PopulationPolicy.Eager))),
            new(MemoryWay.EagerCompressed, () => ServeBackedAsync(PopulationPolicy.Eager, Lz4Source.Open(_compressed))),
            new(MemoryWay.CPrefetch(1), () => ReplayAsync("c-prefetch", _workingSet, packed, "1", _blockSize)),
            new(MemoryWay.Prefetch(1), () => ServeAsync(PopulationPolicy.Prefetch, 1, headStart: true)),
            new(MemoryWay.CPrefetch(2), () => ReplayAsync("c-prefetch", _workingSet, packed, "2", _blockSize)),
            new(MemoryWay.Prefetch(2), () => ServeAsync(PopulationPolicy.Prefetch, 2, headStart: true)),
            new(MemoryWay.PrefetchBacked, () => ServeBackedAsync(PopulationPolicy.Prefetch, OpenSource(PopulationPolicy.Prefetch))),
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
        await StartVmmAsync(); // as busy a machine as the page server finds
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
            await StartVmmAsync();
            start = Stopwatch.GetTimestamp();
        }

        await using var server = PageServer.Start(client.Connection, OpenSource(policy), new PageServerOptions { Policy = policy, Workers = workers, BlockSize = BlockSize });
        if (headStart)
        {
            await StartVmmAsync();
            _ = client.Map();
        }

        var result = await server.WaitPopulatedAsync();
        double populated = headStart ? result.PopulationTime.TotalMilliseconds : Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        return new Sample(populated, client.Replay(_trace.Pages.Count));
    }

    /// <summary>The same with memory that the page server fills before the client maps it.</summary>
    private async Task<Sample> ServeBackedAsync(PopulationPolicy policy, IMemorySource source)
    {
        var backing = MemoryFile.CreateSealed("guest-memory", source.Length);
        using var client = ReplayClient.Start([PathOf(_trace), _memory, "uffd-backed", ReplayClient.SocketDescriptor, ReplayClient.BackingDescriptor], backing);
        await using var server = PageServer.Start(client.Connection, source, new PageServerOptions { Policy = policy, Backing = backing, BlockSize = BlockSize });
        await StartVmmAsync();
        _ = client.Map();
        var result = await server.WaitPopulatedAsync();
        return new Sample(result.PopulationTime.TotalMilliseconds, client.Replay(_trace.Pages.Count));
    }

    /// <summary>Keeps a core busy for as long as a VMM does until its handshake.</summary>
    private static Task StartVmmAsync() => Task.Factory.StartNew(
        () =>
        {
            for (long start = Stopwatch.GetTimestamp(); Stopwatch.GetElapsedTime(start) < VmmStart;)
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
