namespace Dh.Benchmarks;

/// <summary>One way in which guest memory comes back, and what it took.</summary>
/// <param name="Name">Its name in the report.</param>
/// <param name="Measure">Measures it once.</param>
internal sealed record MemoryWay(string Name, Func<Task<Sample>> Measure)
{
    public const string Memcpy = "C: memcpy of all data into resident memory";
    public const string PrefetchAtOnce = "page server, prefetch, 2 workers, no head start";
    public const string EagerRestore = "page server, eager, 2 workers, opened before";
    public const string EagerBeside = "page server, eager, beside a VMM that starts";
    public const string EagerCompressed = "page server, eager, beside a VMM that starts, LZ4";
    public const string PrefetchBeside = "page server, prefetch, beside a VMM that starts";
    public const string CLazy = "C: lazy, 64 KiB";
    public const string Lazy = "page server, lazy, 64 KiB";
    public const string File = "file: private mapping";
    public const string FilePrefaulted = "file, written pages prefaulted";
    public const string FilePopulated = "file: private mapping, MAP_POPULATE";

    /// <summary>Runs with the files in the page cache.</summary>
    public List<Sample> Warm { get; } = [];

    /// <summary>Runs with the files dropped from the page cache.</summary>
    public List<Sample> Cold { get; } = [];

    /// <summary>The least that an eager page server has to do.</summary>
    public static string CCopy(int threads) => $"C: UFFDIO_COPY of all data, {Count(threads, "thread")}";

    /// <summary>The least that a prefetching page server has to do.</summary>
    public static string CPrefetch(int threads) => $"C: UFFDIO_COPY of the working set, {Count(threads, "thread")}";

    public static string Eager(int workers) => $"page server, eager, {Count(workers, "worker")}";

    public static string Prefetch(int workers) => $"page server, prefetch, {Count(workers, "worker")}";

    private static string Count(int count, string what) => count == 1 ? $"1 {what}" : $"{count} {what}s";
}

/// <summary>One run.</summary>
/// <param name="PopulationMs">Until the guest could run.</param>
/// <param name="Replay">The touching.</param>
internal sealed record Sample(double PopulationMs, Replay Replay)
{
    /// <summary>Both. What lies between is the two processes' talk about it, which a VMM and its guest do not have.</summary>
    public double TotalMs => PopulationMs + ReplayMs;

    public double ReplayMs => (Replay.End - Replay.Start) / 1e6;

    public double PrivateMib => Replay.PrivateBytes / 1048576.0;
}

/// <summary>Medians.</summary>
internal static class Medians
{
    public static double Median(this IEnumerable<Sample> samples, Func<Sample, double> value) => Median(samples.Select(value));

    /// <summary>The median of the rounds' ratios: two runs of one round met the same machine, those of different rounds may not have.</summary>
    public static double MedianRatio(this IEnumerable<Sample> samples, IEnumerable<Sample> by, Func<Sample, double> value) =>
        Median(samples.Zip(by, (sample, other) => value(sample) / value(other)));

    public static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return sorted[sorted.Length / 2];
    }
}
