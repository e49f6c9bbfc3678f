using System.Globalization;
using System.Text;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>The tables, and what of it is promised.</summary>
internal sealed class MemoryReport
{
    private const double Mib = 1 << 20;

    private readonly IReadOnlyList<MemoryWay> _ways;
    private readonly StringBuilder _text = new();

    /// <param name="traces">What was touched.</param>
    /// <param name="ways">What was measured.</param>
    /// <param name="serving">What serving costs beside time.</param>
    /// <param name="compressed">Whole restores from compressed memory.</param>
    /// <param name="warmRounds">Runs of each way from the page cache.</param>
    /// <param name="coldRounds">Runs of each way with the files dropped from it.</param>
    /// <param name="handshake">After how much time a VMM that starts sends its handshake.</param>
    /// <param name="vmmStart">After how much time its machine can run.</param>
    public MemoryReport(IReadOnlyList<GuestTrace> traces, IReadOnlyList<MemoryWay> ways, ServingCost serving, CompressedRestore compressed, int warmRounds, int coldRounds, TimeSpan handshake, TimeSpan vmmStart)
    {
        _ways = ways;
        var trace = traces[0];
        int pages = trace.Pages.Count, written = trace.Pages.Count(page => page.IsWritten), readFirst = trace.Pages.Count(page => page is { IsRead: true, IsWritten: true });
        var set = trace.WorkingSet.Set;
        Line($"# Guest memory").Line($"");
        Line($"How the memory of a Python guest of {set.MemoryLength >> 20} MiB comes back. A C program touches the pages that the guest was seen to touch, in its order: those of {traces.Count} runs in turn, {pages} pages ({pages / 256.0:0.0} MiB) in the first; {written} of them it writes, {readFirst} of those after a read; {pages - trace.DataPages} are holes of the memory file, whose order is not known: they come last.");
        Line($"The working set ({set.TouchedBytes / Mib:0.0} MiB in {set.Touched.Count} runs) is of earlier runs of the same code. {Environment.ProcessorCount} CPUs; load average when it ended: {File.ReadAllText("/proc/loadavg").Split(' ')[0]}. Made by `make bench-memory`.").Line($"");
        Line($"- *population*: until the guest could run. *replay*: the touching. *total*: both. *times C*: the total by that of one thread of C that copies all data.");
        Line($"- prefetch and lazy: and \"opened before\": the page server is opened {handshake.TotalMilliseconds:0} ms before the handshake, as QEMU takes that long until it sends one, and a core is busy meanwhile; the clock starts when the handshake waits in the socket. Their C loops have the source mapped and read.");
        Line($"- \"beside a VMM that starts\": the same, but the core stays busy until {vmmStart.TotalMilliseconds:0} ms after the start, when QEMU's machine can run, and the clock starts then: what is copied before costs nobody time.");
        Line($"- \"file, written pages prefaulted\": the memory file is mapped, and a thread of the VMM begins to copy the written pages, when the VMM starts, as `dh`'s preload library does it.");
        Line($"- eager, and \"no head start\": the clock starts before the source is opened; the handshake waits already. So does the clock of C.");
        Line($"- *slow accesses*: those to data that took more than 2 us, which somebody had to serve. *private*: memory afterwards that no other guest shares.").Line($"");
        Table($"From the page cache, medians of {warmRounds}", way => way.Warm);
        Table($"The memory file and the working set dropped from the page cache before each run, medians of {coldRounds}", way => way.Cold);
        Line($"![total time by policy](memory.svg)").Line($"");
        Promises(serving, compressed);
    }

    /// <summary>Whether all promises were held.</summary>
    public bool Passed { get; private set; } = true;

    /// <summary>Prints it, and writes it and the chart to bench/results/.</summary>
    public async Task WriteAsync()
    {
        Console.Write(_text);
        await File.WriteAllTextAsync(Repository.PathOf("bench/results/memory.md"), _text.ToString());
        var bars = _ways.Select(way => new Bar(way.Name, way.Warm.Median(sample => sample.TotalMs), way.Cold.Median(sample => sample.TotalMs)));
        await File.WriteAllTextAsync(
            Repository.PathOf("bench/results/memory.svg"), BarChart.Draw("Until a Python guest has its memory and has touched its pages, ms", ("from the page cache", "from the disk"), [.. bars]));
    }

    private void Table(string title, Func<MemoryWay, List<Sample>> samples)
    {
        double c = samples(Way(MemoryWay.CCopy(1))).Median(sample => sample.TotalMs);
        Line($"## {title}").Line($"");
        Line($"| way | population, ms | replay, ms | total, ms | times C | slow accesses | p50, us | p99, us | max, us | private, MiB |");
        Line($"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        foreach (var way in _ways)
        {
            double Of(Func<Sample, double> value) => samples(way).Median(value);
            double total = Of(sample => sample.TotalMs);
            Line($"| {way.Name} | {Of(sample => sample.PopulationMs):0.0} | {Of(sample => sample.ReplayMs):0.0} | {total:0.0} | {total / c:0.00} | {Of(sample => sample.Replay.Slow):0} | {Of(sample => sample.Replay.P50):0} | {Of(sample => sample.Replay.P99):0} | {Of(sample => sample.Replay.Max):0} | {Of(sample => sample.PrivateMib):0.0} |");
        }

        Line($"");
    }

    private void Promises(ServingCost serving, CompressedRestore compressed)
    {
        Line($"## Promises").Line($"").Line($"Each figure is the median of the rounds' ratios. A *restore* is that of a real microVM with all its memory until its guest answers.").Line($"").Line($"| what | measured | promise | |").Line($"| --- | --- | --- | --- |");
        AtLeast("speed of eager, 1 worker, by C's loop", 0.95, Warm(MemoryWay.CCopy(1), MemoryWay.Eager(1), Population));
        AtLeast("speed of eager, 2 workers, by C's loop", 0.90, Warm(MemoryWay.CCopy(2), MemoryWay.Eager(2), Population));
        Promise("restore from LZ4 by that from the memory file, from the page cache", $"{compressed.WarmMs.Compressed:0} ms by {compressed.WarmMs.Plain:0} ms: {compressed.Warm:0.00}", $"<= 1.50", compressed.Warm <= 1.5);
        Promise("the same, from the disk", $"{compressed.ColdMs.Compressed:0} ms by {compressed.ColdMs.Plain:0} ms: {compressed.Cold:0.00}", $"<= 1.00", compressed.Cold <= 1);
        AtMost("population of prefetch, 1 worker, by C's loop over the same pages", 1.1, Warm(MemoryWay.Prefetch(1), MemoryWay.CPrefetch(1), Population));
        AtMost("population of prefetch, 2 workers, by C's loop over the same pages", 1.1, Warm(MemoryWay.Prefetch(2), MemoryWay.CPrefetch(2), Population));
        AtMost("total of prefetch by that of a private mapping, from the page cache", 0.7, Warm(MemoryWay.PrefetchBeside, MemoryWay.File, Total));
        AtMost("total of prefetch by that of a private mapping, from the disk", 0.4, Cold(MemoryWay.PrefetchBeside, MemoryWay.File, Total));
        AtMost("median of a single fault by that of a handler in C, 64 KiB", 1.3, Warm(MemoryWay.Lazy, MemoryWay.CLazy, sample => sample.Replay.P50));
        AtMost("total of file with written pages prefaulted by that of a private mapping", 0.95, Warm(MemoryWay.FilePrefaulted, MemoryWay.File, Total));
        AtMost("private memory of file with written pages prefaulted by that of prefetch", 0.65, Warm(MemoryWay.FilePrefaulted, MemoryWay.PrefetchBeside, sample => sample.PrivateMib));
        Promise("allocations while faults are served", $"{serving.AllocatedBytes} bytes in {serving.Faults} faults", $"0 per fault", serving.AllocatedBytes < serving.Faults);
        Promise("CPU time of an idle page server in 2 s", $"{serving.IdleNanoseconds} ns, woken {serving.IdleWakeups} times", $"0", serving is { IdleNanoseconds: 0, IdleWakeups: 0 });

        static double Total(Sample sample) => sample.TotalMs;
        static double Population(Sample sample) => sample.PopulationMs;
    }

    private double Warm(string name, string by, Func<Sample, double> value) => Way(name).Warm.MedianRatio(Way(by).Warm, value);

    private double Cold(string name, string by, Func<Sample, double> value) => Way(name).Cold.MedianRatio(Way(by).Cold, value);

    private MemoryWay Way(string name) => _ways.Single(way => way.Name == name);

    private void AtLeast(string what, double limit, double measured) => Promise(what, $"{measured:0.00}", $">= {limit:0.00}", measured >= limit);

    private void AtMost(string what, double limit, double measured) => Promise(what, $"{measured:0.00}", $"<= {limit:0.00}", measured <= limit);

    private void Promise(string what, FormattableString measured, FormattableString promise, bool held)
    {
        Passed &= held;
        Line($"| {what} | {FormattableString.Invariant(measured)} | {FormattableString.Invariant(promise)} | {(held ? "PASS" : "FAIL")} |");
    }

    private MemoryReport Line(FormattableString line)
    {
        _text.AppendLine(line.ToString(CultureInfo.InvariantCulture));
        return this;
    }
}
