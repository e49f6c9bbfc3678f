using Dh.Guest;
using Dh.Images;
using Dh.Linux;
using Dh.Paging;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>Which pages a real guest touches, in which order, and which of them it writes.</summary>
/// <param name="Snapshot">The guest's snapshot.</param>
/// <param name="WorkingSet">Its working set, of another run of the same code.</param>
/// <param name="Pages">
/// The pages. First those that hold data, in the order of their first touch; then those that are holes, which no page server is asked for:
/// of them it is known that they were written, not when.
/// </param>
/// <param name="DataPages">How many of them hold data.</param>
internal sealed record GuestTrace(Snapshot Snapshot, WorkingSetFile WorkingSet, IReadOnlyList<PageAccess> Pages, int DataPages)
{
    private const long PageSize = (long)GuestRegion.NormalPageSize;

    /// <summary>Runs the template's code to record some times more, in the newest Python snapshot: no two runs touch quite the same pages.</summary>
    public static async Task<IReadOnlyList<GuestTrace>> RecordAsync(int runs)
    {
        var installation = new Installation(Repository.PathOf("bin"));
        var snapshot = new SnapshotStore(DhHome.Default).List().FirstOrDefault(candidate => candidate.Manifest.Template == "python" && !candidate.IsCompressed)
            ?? throw new InvalidOperationException("There is no uncompressed snapshot of Python: run `dh vm prepare`.");
        var set = WorkingSetFile.Read(snapshot.WorkingSetPath, snapshot.Manifest.Id, snapshot.Machine.MemoryBytes);
        using var memory = SparseFileSource.Open(snapshot.MemoryPath);
        _ = await RunAsync(snapshot, installation); // what serves it is compiled then
        var traces = new List<GuestTrace>();
        for (int i = 0; i < runs; i++)
        {
            traces.Add(Of(snapshot, set, memory.DataExtents, await RunAsync(snapshot, installation)));
        }

        return traces;
    }

    private static GuestTrace Of(Snapshot snapshot, WorkingSetFile set, IReadOnlyList<FileExtent> dataExtents, IReadOnlyList<TouchedPage> touched)
    {
        // What was written is known of another run only: of that, what this one has not touched counts where this one cannot tell.
        var written = PagesOf(set.Set.Written).ToHashSet();
        written.ExceptWith(PagesOf(dataExtents).Except(touched.Select(page => page.Offset)));
        return new GuestTrace(
            snapshot,
            set,
            [
                .. touched.Select(page => new PageAccess(page.Offset, !page.IsWrite, page.IsWrite || written.Contains(page.Offset))),
                .. written.Except(touched.Select(page => page.Offset)).Order().Select(offset => new PageAccess(offset, IsRead: false, IsWritten: true)),
            ],
            touched.Count);
    }

    private static async Task<IReadOnlyList<TouchedPage>> RunAsync(Snapshot snapshot, Installation installation)
    {
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { MemoryPolicy = MemoryPolicy.Lazy, Record = true, Installation = installation });
        var output = new CapturedText();
        var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = Template.Find("python", installation.TemplatesDirectory).RecordCode }, output);
        return result.ExitCode == 0
            ? [.. sandbox.StopRecording(result).DistinctBy(page => page.Offset)]
            : throw new InvalidOperationException($"The code to record ended with {result.ExitCode}: {output.Text}");
    }

    /// <summary>Writes the pages as bench/memory_replay.c reads them.</summary>
    public void WriteTo(string path) =>
        WriteNumbers(path, Pages.Select((page, index) => page.Offset | (page.IsRead ? 1L : 0) | (page.IsWritten ? 2L : 0) | (index >= DataPages ? 4L : 0)));

    /// <summary>Writes runs as bench/memory_replay.c reads them.</summary>
    /// <param name="path">The file.</param>
    /// <param name="runs">Stretches of guest memory, in this order.</param>
    /// <param name="packedAt">Where in the file that holds them they follow each other; null when they are where they are in guest memory.</param>
    /// <param name="zeros">Stretches that hold zeros, which come last.</param>
    public static void WriteRuns(string path, IReadOnlyList<FileExtent> runs, long? packedAt = null, IEnumerable<FileExtent>? zeros = null)
    {
        var numbers = new List<long>();
        foreach (var run in runs)
        {
            numbers.AddRange([run.Offset, packedAt ?? run.Offset, run.Length]);
            packedAt += run.Length;
        }

        foreach (var run in zeros ?? [])
        {
            numbers.AddRange([run.Offset, -1, run.Length]);
        }

        WriteNumbers(path, numbers);
    }

    private static IEnumerable<long> PagesOf(IReadOnlyList<FileExtent> runs)
    {
        foreach (var run in runs)
        {
            for (long page = run.Offset; page < run.End; page += PageSize)
            {
                yield return page;
            }
        }
    }

    private static void WriteNumbers(string path, IEnumerable<long> numbers)
    {
        using var file = new BinaryWriter(File.Create(path));
        foreach (long number in numbers)
        {
            file.Write(number);
        }
    }
}

/// <summary>What a guest does with a page.</summary>
/// <param name="Offset">Its offset in the memory file.</param>
/// <param name="IsRead">Whether it is read first.</param>
/// <param name="IsWritten">Whether it is written, then or at once.</param>
internal readonly record struct PageAccess(long Offset, bool IsRead, bool IsWritten);
