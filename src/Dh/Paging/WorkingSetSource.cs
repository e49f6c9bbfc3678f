using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>
/// A snapshot's memory whose working set is packed in a file of its own: that is read in sequence, and checked against its hashes, chunk by
/// chunk, before a page of it is used. All else comes from the memory file.
/// </summary>
public sealed class WorkingSetSource : IMemorySource
{
    private readonly IMemorySource _memory;
    private readonly string _path;
    private readonly SafeFileHandle _file;
    private readonly MemoryMapping? _mapping;
    private readonly WorkingSetFile _workingSet;
    private readonly Run[] _runs;
    private readonly long[] _offsets;
    private readonly int[] _indexes;
    private readonly MemoryMapping? _zeros;
    private readonly bool[] _checked;
    private volatile bool _damaged;

    private WorkingSetSource(IMemorySource memory, string path, SafeFileHandle file, WorkingSetFile workingSet)
    {
        _memory = memory;
        _path = path;
        _file = file;
        _workingSet = workingSet;
        _checked = new bool[workingSet.ChunkHashes.Length];
        long packed = 0;
        var runs = new List<Run>(workingSet.Set.Touched.Count);
        foreach (var run in workingSet.Set.Touched)
        {
            runs.Add(new Run(run.Offset, run.End, packed));
            packed += run.Length;
        }

        var zeros = Holes(workingSet.Set.Written, memory.DataExtents);
        runs.AddRange(zeros.Select(run => new Run(run.Offset, run.End, Run.Zeros)));
        _runs = [.. runs];
        _offsets = [.. runs.Select(run => run.Offset)];
        _indexes = [.. Enumerable.Range(0, _offsets.Length)];
        Array.Sort(_offsets, _indexes);
        PrefetchExtents = [.. workingSet.Set.Touched, .. zeros];
        _zeros = zeros.Count > 0 ? MemoryMapping.Buffer((int)GuestRegion.HugePageSize) : null;
        _mapping = packed > 0 ? MemoryMapping.OfFile(file, workingSet.PagesOffset + packed) : null;
    }

    /// <inheritdoc/>
    public string Path => _memory.Path;

    /// <inheritdoc/>
    public long Length => _memory.Length;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> DataExtents => _memory.DataExtents;

    /// <summary>What recorded runs touched, and the holes that they wrote: a guest takes those for something new.</summary>
    public IReadOnlyList<FileExtent> PrefetchExtents { get; }

    /// <summary>Opens a working set over a snapshot's memory.</summary>
    /// <param name="memory">The memory; this source owns it from now on, unless this throws.</param>
    /// <param name="path">The working set's file.</param>
    /// <param name="snapshotId">The snapshot that it must be of: its manifest's id, or <see cref="WorkingSet.IdentityOf"/>.</param>
    /// <exception cref="PageServerException">The working set cannot be used: a guest does without.</exception>
    public static WorkingSetSource Open(IMemorySource memory, string path, string snapshotId)
    {
        ArgumentNullException.ThrowIfNull(memory);
        var workingSet = WorkingSetFile.Read(path, snapshotId, memory.Length);
        SafeFileHandle? file = null;
        try
        {
            file = File.OpenHandle(path);
            return new WorkingSetSource(memory, path, file, workingSet);
        }
        catch (Exception e)
        {
            file?.Dispose();
            throw e is IOException or UnauthorizedAccessException ? WorkingSetFile.Damaged(path, e.Message, e) : e;
        }
    }

    /// <summary>Reads a whole working set and checks it against its hashes.</summary>
    /// <param name="path">The working set's file.</param>
    /// <param name="snapshotId">The snapshot that it must be of.</param>
    /// <param name="memoryLength">Bytes of that snapshot's memory.</param>
    /// <exception cref="PageServerException">It cannot be used; the message names the file.</exception>
    internal static void Verify(string path, string snapshotId, long memoryLength)
    {
        var workingSet = WorkingSetFile.Read(path, snapshotId, memoryLength);
        using var file = File.OpenHandle(path);
        byte[] buffer = new byte[WorkingSetFile.ChunkLength];
        for (int chunk = 0; chunk < workingSet.ChunkHashes.Length; chunk++)
        {
            if (!workingSet.HasGoodChunk(file, chunk, buffer))
            {
                throw WorkingSetFile.Damaged(path, $"its pages from byte {workingSet.PagesOffset + ((long)chunk * WorkingSetFile.ChunkLength)} on are damaged");
            }
        }
    }

    /// <inheritdoc/>
    public IMemoryReader OpenReader() => new Reader(this, _memory.OpenReader());

    /// <summary>Checks the pages' hashes, which brings them near.</summary>
    /// <param name="enough">Asked before every chunk.</param>
    public void ReadAhead(Func<bool> enough)
    {
        ArgumentNullException.ThrowIfNull(enough);
        byte[] buffer = new byte[WorkingSetFile.ChunkLength];
        for (int chunk = 0; chunk < _checked.Length && !enough(); chunk++)
        {
            if (!TryCheck(chunk, buffer))
            {
                return; // the worker that needs it says so
            }
        }

        for (long at = _workingSet.PagesOffset; _mapping is not null && at < _mapping.Length && !enough(); at += WorkingSetFile.ChunkLength)
        {
            _ = _mapping.TryPopulate(at, Math.Min(WorkingSetFile.ChunkLength, _mapping.Length - at));
        }

        if (_zeros is not null && !enough())
        {
            _ = _zeros.TryPopulate(0, _zeros.Length);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _mapping?.Dispose();
        _zeros?.Dispose();
        _file.Dispose();
        _memory.Dispose();
    }

    /// <inheritdoc/>
    public void EndPopulation() => _mapping?.Depopulate();

    /// <summary>Which parts of runs hold no data.</summary>
    /// <param name="runs">The runs, in order.</param>
    /// <param name="dataExtents">What holds data, in order.</param>
    private static List<FileExtent> Holes(IReadOnlyList<FileExtent> runs, IReadOnlyList<FileExtent> dataExtents)
    {
        var holes = new List<FileExtent>();
        int next = 0;
        foreach (var run in runs)
        {
            long from = run.Offset;
            while (next < dataExtents.Count && dataExtents[next].End <= from)
            {
                next++;
            }

            for (int i = next; from < run.End; i++)
            {
                var data = i < dataExtents.Count ? dataExtents[i] : new FileExtent(run.End, 0);
                if (data.Offset > from)
                {
                    holes.Add(new FileExtent(from, Math.Min(data.Offset, run.End) - from));
                }

                from = Math.Max(from, data.End);
            }
        }

        return holes;
    }

    /// <summary>The run that an offset is in, or one that it is not in when it is in none; -1 when it lies before all of them.</summary>
    private int IndexOf(long offset)
    {
        int position = Array.BinarySearch(_offsets, offset);
        position = position < 0 ? ~position - 1 : position;
        return position < 0 ? -1 : _indexes[position];
    }

    private bool TryCheck(int chunk, byte[] buffer)
    {
        if (Volatile.Read(ref _checked[chunk]))
        {
            return true;
        }

        bool good = _workingSet.HasGoodChunk(_file, chunk, buffer);
        Volatile.Write(ref _checked[chunk], good);
        return good;
    }

    /// <summary>A run and where its contents are.</summary>
    /// <param name="Offset">Its start in guest memory.</param>
    /// <param name="End">Its end.</param>
    /// <param name="Packed">Where among the packed pages, or <see cref="Zeros"/>.</param>
    private readonly record struct Run(long Offset, long End, long Packed)
    {
        public const long Zeros = -1;
    }

    private sealed class Reader(WorkingSetSource source, IMemoryReader memory) : IMemoryReader
    {
        private byte[]? _buffer;
        private int _next;
        private long _lastOffset = -1;
        private long _lastChunk = -1;

        public bool IsMapped => memory.IsMapped;

        public nuint Read(long offset, ref ulong length)
        {
            // Mostly runs are read one after the other.
            var runs = source._runs;
            int index = _next < runs.Length && runs[_next].Offset == offset ? _next : source.IndexOf(offset);
            if (index < 0 || runs[index].End < offset + (long)length)
            {
                return memory.Read(offset, ref length);
            }

            _next = index + 1;
            if (runs[index].Packed == Run.Zeros)
            {
                length = Math.Min(length, (ulong)source._zeros!.Length);
                return source._zeros.Address;
            }

            long at = runs[index].Packed + (offset - runs[index].Offset), lastChunk = (at + (long)length - 1) / WorkingSetFile.ChunkLength;
            bool isSame = lastChunk == _lastChunk && offset != _lastOffset;
            (_lastChunk, _lastOffset) = (lastChunk, offset);
            if (source._damaged)
            {
                return memory.Read(offset, ref length);
            }

            if (!isSame)
            {
                Check(at / WorkingSetFile.ChunkLength, lastChunk);
            }

            return source._mapping!.Address + (nuint)(source._workingSet.PagesOffset + at);
        }

        public void Dispose() => memory.Dispose();

        /// <summary>
        /// Checks chunks when this reader comes to them, and again when the same bytes are asked for once more, as when they could not be
        /// copied: the file may have been cut since they were checked.
        /// </summary>
        /// <exception cref="PageServerException">They are damaged; whoever asks again gets the memory file's pages.</exception>
        private void Check(long chunk, long lastChunk)
        {
            string? why = RandomAccess.GetLength(source._file) < source._mapping!.Length ? "it was cut while it was in use" : null;
            for (; why is null && chunk <= lastChunk; chunk++)
            {
                if (!source.TryCheck((int)chunk, _buffer ??= new byte[WorkingSetFile.ChunkLength]))
                {
                    why = $"its pages from byte {source._workingSet.PagesOffset + (chunk * WorkingSetFile.ChunkLength)} on are damaged";
                }
            }

            if (why is not null)
            {
                source._damaged = true;
                throw WorkingSetFile.Damaged(source._path, why);
            }
        }
    }
}
