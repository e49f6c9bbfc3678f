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
    private const int WarmRounds = 15;
    private const int ColdRounds = 5;
    private const int BlockSize = 64 << 10;

    /// <summary>A VMM takes at least this long from its start to its handshake; the page server starts with it.</summary>
    private static readonly TimeSpan VmmStart = TimeSpan.FromMilliseconds(40);

    private readonly TempDir _directory = new();
    private readonly GuestTrace _trace;
    private readonly string _memory;
    private readonly string _workingSet;
    private readonly string _tracePath;
    private readonly string _blockSize = BlockSize.ToString(CultureInfo.InvariantCulture);

    private MemoryBenchmark(GuestTrace trace)
    {
        _trace = trace;
        _memory = trace.Snapshot.MemoryPath;
        _workingSet = trace.Snapshot.WorkingSetPath;
        _tracePath = _directory["trace"];
        trace.WriteTo(_tracePath);
    }

    public static async Task<bool> RunAsync()
    {
        using var benchmark = new MemoryBenchmark(await GuestTrace.RecordAsync());
        return await benchmark.MeasureAsync();
    }

    public void Dispose() => _directory.Dispose();

    private async Task<bool> MeasureAsync()
    {
        var ways = Ways();
        for (int round = -2; round < WarmRounds; round++)
        {
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
            foreach (var way in ways)
            {
                DropFromPageCache();
                way.Cold.Add(await way.Measure());
            }
        }

        var serving = await ServingCost.MeasureAsync(OpenServed, _trace);
        var report = new MemoryReport(_trace, ways, serving, WarmRounds, ColdRounds, VmmStart);
        await report.WriteAsync();
        return report.Passed;
    }

    private List<MemoryWay> Ways()
    {
        string all = Runs("all", DataExtents()), written = Runs("written", _trace.WorkingSet.Set.Written);
        string packed = _directory["packed"];
        GuestTrace.WriteRuns(packed, _trace.WorkingSet.Set.Touched, _trace.WorkingSet.PagesOffset);
        return
        [
            new(MemoryWay.Memcpy, () => ReplayAsync("memcpy", all)),
            new(MemoryWay.CCopy(1), () => ReplayAsync("c-copy", _memory, all, "1")),
            new(MemoryWay.CCopy(2), () => ReplayAsync("c-copy", _memory, all, "2")),
            new(MemoryWay.Eager(1), () => ServeAsync(PopulationPolicy.Eager, 1, headStart: false)),
            new(MemoryWay.Eager(2), () => ServeAsync(PopulationPolicy.Eager, 2, headStart: false)),
            new(MemoryWay.CPrefetch(1), () => ReplayAsync("c-prefetch", _workingSet, packed, "1", _blockSize)),
            new(MemoryWay.CPrefetch(2), () => ReplayAsync("c-prefetch", _workingSet, packed, "2", _blockSize)),
            new(MemoryWay.Prefetch(1), () => ServeAsync(PopulationPolicy.Prefetch, 1, headStart: true)),
            new(MemoryWay.Prefetch(2), () => ServeAsync(PopulationPolicy.Prefetch, 2, headStart: true)),
            new(MemoryWay.PrefetchAtOnce, () => ServeAsync(PopulationPolicy.Prefetch, 2, headStart: false)),
            new(MemoryWay.CLazy, () => ReplayAsync("c-lazy", _blockSize)),
            new(MemoryWay.Lazy, () => ServeAsync(PopulationPolicy.Lazy, 1, headStart: true)),
            new(MemoryWay.File, () => ReplayAsync("file")),
            new(MemoryWay.FilePrefaulted, () => ReplayAsync("file-prefault", written)),
            new(MemoryWay.FilePopulated, () => ReplayAsync("file-populate")),
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
        using var client = ReplayClient.Start([_tracePath, _memory, .. mode]);
        await Task.Delay(VmmStart); // as idle a machine as the page server finds
        var (start, end) = client.Map();
        var replay = client.Replay(_trace.Pages.Count);
        return new Sample((end - start) / 1e6, (end - start + replay.End - replay.Start) / 1e6, replay);
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
            await Task.Delay(VmmStart);
            start = Stopwatch.GetTimestamp();
        }

        await using var server = PageServer.Start(client.Connection, OpenSource(policy), new PageServerOptions { Policy = policy, Workers = workers, BlockSize = BlockSize });
        if (headStart)
        {
            await Task.Delay(VmmStart);
            (start, _) = client.Map();
        }

        var result = await server.WaitPopulatedAsync();
        double populated = headStart ? result.PopulationTime.TotalMilliseconds : Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        var replay = client.Replay(_trace.Pages.Count);
        return new Sample(populated, (replay.End - start) / 1e6, replay);
    }

    private (ReplayClient Client, IMemorySource Source) OpenServed() => (StartServed(), OpenSource(PopulationPolicy.Lazy));

    private ReplayClient StartServed() => ReplayClient.Start(_tracePath, _memory, "uffd", "3");

    private IMemorySource OpenSource(PopulationPolicy policy)
    {
        var memory = SparseFileSource.Open(_memory);
        return policy == PopulationPolicy.Prefetch ? WorkingSetSource.Open(memory, _workingSet, _trace.Snapshot.Manifest.Id) : memory;
    }

    private void DropFromPageCache()
    {
        foreach (string path in (string[])[_memory, _workingSet])
        {
            using var file = File.OpenHandle(path);
            SparseFile.DropFromPageCache(file);
        }
    }
}
