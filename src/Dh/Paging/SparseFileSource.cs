using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>A snapshot's memory file: mapped, its holes skipped.</summary>
public sealed class SparseFileSource : IMemorySource
{
    /// <summary>What is mapped between two looks at whether the population begins, which would have to wait: some tenths of a millisecond.</summary>
    private const long ReadAheadPiece = 1 << 20;

    private readonly MemoryMapping _mapping;

    private SparseFileSource(string path, MemoryMapping mapping, IReadOnlyList<FileExtent> extents)
    {
        Path = path;
        _mapping = mapping;
        DataExtents = extents;
    }

    /// <inheritdoc/>
    public string Path { get; }

    /// <inheritdoc/>
    public long Length => _mapping.Length;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> DataExtents { get; }

    /// <summary>Opens and maps a memory file.</summary>
    /// <param name="path">The file; a multiple of 4,096 bytes long.</param>
    /// <exception cref="PageServerException">It is missing, empty, or no memory file.</exception>
    public static SparseFileSource Open(string path)
    {
        try
        {
            using SafeFileHandle file = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.Read | FileShare.Delete);
            long length = RandomAccess.GetLength(file);
            if (length == 0 || length % (long)GuestRegion.NormalPageSize != 0)
            {
                throw new PageServerException($"Memory file {path} is {length} bytes long, which is no whole number of pages: it is truncated or no memory file.");
            }

            return new SparseFileSource(path, MemoryMapping.OfFile(file, length), SparseFile.GetDataExtents(file, length));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new PageServerException($"Memory file {path} cannot be opened: {e.Message}", e);
        }
    }

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> PrefetchExtents => [];

    /// <inheritdoc/>
    public IMemoryReader OpenReader() => new Reader(_mapping);

    /// <inheritdoc/>
    public void ReadAhead(Func<bool> enough)
    {
        ArgumentNullException.ThrowIfNull(enough);
        foreach (var extent in DataExtents)
        {
            for (long at = extent.Offset; at < extent.End; at += ReadAheadPiece)
            {
                if (enough() || !_mapping.TryPopulate(at, Math.Min(ReadAheadPiece, extent.End - at)))
                {
                    return;
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _mapping.Dispose();

    private sealed class Reader(MemoryMapping mapping) : IMemoryReader
    {
        public bool IsMapped => true;

        public nuint Read(long offset, ref ulong length)
        {
            ArgumentOutOfRangeException.ThrowIfNegative(offset);
            ArgumentOutOfRangeException.ThrowIfGreaterThan((ulong)offset + length, (ulong)mapping.Length);
            return mapping.Address + (nuint)offset;
        }

        public void Dispose()
        {
            // The mapping is the source's.
        }
    }
}
