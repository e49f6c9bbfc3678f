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
    private readonly long[] _runOffsets;
    private readonly (FileExtent Run, long Packed)[] _runs;
    private readonly bool[] _checked;
    private volatile bool _damaged;

    private WorkingSetSource(IMemorySource memory, string path, SafeFileHandle file, WorkingSetFile workingSet)
    {
        _memory = memory;
        _path = path;
        _file = file;
        _workingSet = workingSet;
        _checked = new bool[workingSet.ChunkHashes.Length];
        _runs = new (FileExtent, long)[workingSet.Set.Touched.Count];
        _runOffsets = new long[_runs.Length];
        long packed = 0;
        for (int i = 0; i < _runs.Length; i++)
        {
            var run = workingSet.Set.Touched[i];
            _runs[i] = (run, packed);
            _runOffsets[i] = run.Offset;
            packed += run.Length;
        }

        Array.Sort(_runOffsets, _runs);
        _mapping = packed > 0 ? MemoryMapping.OfFile(file, workingSet.PagesOffset + packed) : null;
    }

    /// <inheritdoc/>
    public string Path => _memory.Path;

    /// <inheritdoc/>
    public long Length => _memory.Length;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> DataExtents => _memory.DataExtents;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> PrefetchExtents => _workingSet.Set.Touched;

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

        if (!enough())
        {
            _ = _mapping?.TryPopulate(_workingSet.PagesOffset, _mapping.Length - _workingSet.PagesOffset);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _mapping?.Dispose();
        _file.Dispose();
        _memory.Dispose();
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

    private sealed class Reader(WorkingSetSource source, IMemoryReader memory) : IMemoryReader
    {
        private byte[]? _buffer;
        private long _lengthCheckedAt = -1;

        public nuint Read(long offset, ref ulong length)
        {
            int index = Array.BinarySearch(source._runOffsets, offset);
            index = index < 0 ? ~index - 1 : index;
            if (index < 0 || source._damaged || source._runs[index].Run.End < offset + (long)length)
            {
                return memory.Read(offset, ref length);
            }

            // The file may have been cut since its chunks were checked. That is looked at once in some milliseconds: a call for each run, of
            // which there are thousands, would cost as much as copying a megabyte.
            long now = Environment.TickCount64;
            bool isCut = now != _lengthCheckedAt && RandomAccess.GetLength(source._file) < source._mapping!.Length;
            _lengthCheckedAt = now;
            if (isCut)
            {
                source._damaged = true;
                throw WorkingSetFile.Damaged(source._path, "it was cut while it was in use");
            }

            var (run, packed) = source._runs[index];
            long at = packed + (offset - run.Offset);
            for (int chunk = (int)(at / WorkingSetFile.ChunkLength); chunk <= (at + (long)length - 1) / WorkingSetFile.ChunkLength; chunk++)
            {
                if (!source.TryCheck(chunk, _buffer ??= new byte[WorkingSetFile.ChunkLength]))
                {
                    source._damaged = true; // whoever asks again gets the memory file's pages
                    throw WorkingSetFile.Damaged(source._path, $"its pages from byte {source._workingSet.PagesOffset + ((long)chunk * WorkingSetFile.ChunkLength)} on are damaged");
                }
            }

            return source._mapping!.Address + (nuint)(source._workingSet.PagesOffset + at);
        }

        public void Dispose() => memory.Dispose();
    }
}
