using System.Globalization;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>The pages of a snapshot's memory that recorded runs needed.</summary>
/// <param name="SnapshotId">The snapshot.</param>
/// <param name="MemoryLength">Bytes of guest memory.</param>
/// <param name="Touched">What was touched, coalesced into runs, in the order of the first touch.</param>
/// <param name="Written">What was written, coalesced into runs, in the order of the addresses.</param>
public sealed record WorkingSet(string SnapshotId, long MemoryLength, IReadOnlyList<FileExtent> Touched, IReadOnlyList<FileExtent> Written)
{
    private const long PageSize = (long)GuestRegion.NormalPageSize;

    /// <summary>What a working set of a memory file without a manifest is recognised by: the file's length and the time of its last change.</summary>
    /// <param name="memoryPath">The memory file.</param>
    public static string IdentityOf(string memoryPath)
    {
        var file = new FileInfo(memoryPath);
        return string.Create(CultureInfo.InvariantCulture, $"{file.Length:x}-{file.LastWriteTimeUtc.Ticks:x}");
    }

    /// <summary>Writes the set, with its pages, to a file; a file that is there is replaced in one step.</summary>
    /// <param name="path">The file.</param>
    /// <param name="memoryPath">The memory file that holds the pages.</param>
    /// <exception cref="IOException">It cannot be written; the old file is as it was.</exception>
    public void WriteTo(string path, string memoryPath)
    {
        using var memory = File.OpenHandle(memoryPath);
        WorkingSetFile.Write(path, this, (offset, buffer) => RandomAccess.Read(memory, buffer, offset));
    }

    /// <summary>Bytes that were touched.</summary>
    public long TouchedBytes { get; } = Touched.Sum(run => run.Length);

    /// <summary>
    /// Combines recordings: pages that at least half of them touched, in the order of the mean of their first touches; pages that at least
    /// half of them wrote.
    /// </summary>
    /// <param name="snapshotId">The snapshot that all were recorded of.</param>
    /// <param name="memoryLength">Bytes of guest memory.</param>
    /// <param name="recordings">For each recorded run the offsets of the touched pages, in the order of the first touch.</param>
    /// <param name="written">For each observed run the offsets of the written pages.</param>
    public static WorkingSet Combine(string snapshotId, long memoryLength, IReadOnlyList<IReadOnlyList<long>> recordings, IReadOnlyList<IReadOnlyCollection<long>> written)
    {
        ArgumentNullException.ThrowIfNull(recordings);
        ArgumentNullException.ThrowIfNull(written);
        var touches = new Dictionary<long, (int Count, double Ranks)>();
        foreach (var recording in recordings)
        {
            var seen = new HashSet<long>();
            foreach (long page in recording)
            {
                if (seen.Add(page))
                {
                    var (count, ranks) = touches.GetValueOrDefault(page);
                    touches[page] = (count + 1, ranks + seen.Count);
                }
            }
        }

        var ordered = touches.Where(touch => touch.Value.Count * 2 >= recordings.Count).ToDictionary(touch => touch.Key, touch => touch.Value.Ranks / touch.Value.Count);
        var frequent = written.SelectMany(pages => pages.Distinct()).CountBy(page => page).Where(page => page.Value * 2 >= written.Count).Select(page => page.Key);
        return new WorkingSet(snapshotId, memoryLength, [.. Coalesce(ordered.Keys).OrderBy(FirstTouch)], [.. Coalesce(frequent)]);

        // A run is as early as the earliest of its pages.
        double FirstTouch(FileExtent run)
        {
            double first = double.MaxValue;
            for (long page = run.Offset; page < run.End; page += PageSize)
            {
                first = Math.Min(first, ordered[page]);
            }

            return first;
        }
    }

    private static List<FileExtent> Coalesce(IEnumerable<long> pages)
    {
        var runs = new List<FileExtent>();
        foreach (long page in pages.Order())
        {
            if (runs.Count > 0 && runs[^1].End == page)
            {
                runs[^1] = runs[^1] with { Length = runs[^1].Length + PageSize };
            }
            else
            {
                runs.Add(new FileExtent(page, PageSize));
            }
        }

        return runs;
    }
}
