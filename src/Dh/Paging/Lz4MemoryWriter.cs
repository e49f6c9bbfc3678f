using System.IO.Hashing;
using Dh.Linux;
using K4os.Compression.LZ4;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>Compresses a memory file; takes a few MiB of memory for that.</summary>
internal static class Lz4MemoryWriter
{
    // A tenth smaller and faster to decode than the fast level, for a second more in a preparation; the levels above gain next to nothing.
    private const LZ4Level Level = LZ4Level.L03_HC;
    private const int BatchLength = 64;
    private const int Threads = 2;
    private const long PageSize = (long)GuestRegion.NormalPageSize;

    /// <summary>Writes the compressed file.</summary>
    /// <param name="memoryPath">The memory file; what are its holes stay holes.</param>
    /// <param name="path">The file to make.</param>
    /// <param name="cancellationToken">Gives up; a file that means nothing is left.</param>
    /// <exception cref="IOException">The one cannot be read, or the other not be written.</exception>
    public static void Write(string memoryPath, string path, CancellationToken cancellationToken = default)
    {
        using var memory = File.OpenHandle(memoryPath);
        using var file = File.OpenHandle(path, FileMode.CreateNew, FileAccess.Write);
        long memoryLength = RandomAccess.GetLength(memory);
        var extents = WholePages(SparseFile.GetDataExtents(memory, memoryLength));
        int[] numbers = [.. Lz4MemoryFile.BlocksOf(extents)];
        var blocks = new Lz4Block[numbers.Length];
        var batch = new Slot[Math.Min(BatchLength, numbers.Length)];
        for (int i = 0; i < batch.Length; i++)
        {
            batch[i] = new Slot();
        }

        long at = Lz4MemoryFile.HeadLength(extents.Count, blocks.Length);
        var threads = new ParallelOptions { MaxDegreeOfParallelism = Threads, CancellationToken = cancellationToken };
        for (int first = 0; first < numbers.Length; first += batch.Length)
        {
            int count = Math.Min(batch.Length, numbers.Length - first);
            for (int i = 0; i < count; i++)
            {
                batch[i].Read(memory, numbers[first + i], memoryLength);
            }

            Parallel.For(0, count, threads, i => batch[i].Compress());
            for (int i = 0; i < count; i++)
            {
                var bytes = batch[i].Result;
                RandomAccess.Write(file, bytes, at);
                blocks[first + i] = new Lz4Block(numbers[first + i], at, bytes.Length, XxHash3.HashToUInt64(bytes));
                at += bytes.Length;
            }
        }

        RandomAccess.Write(file, new Lz4MemoryFile(memoryLength, extents, blocks).ToBytes(), 0);
    }

    /// <summary>The pages that hold data: a file system's blocks may be smaller.</summary>
    private static List<FileExtent> WholePages(IReadOnlyList<FileExtent> extents)
    {
        var pages = new List<FileExtent>();
        foreach (var extent in extents)
        {
            long start = extent.Offset / PageSize * PageSize, end = (extent.End + PageSize - 1) / PageSize * PageSize;
            if (pages.Count > 0 && start <= pages[^1].End)
            {
                start = pages[^1].Offset;
                pages.RemoveAt(pages.Count - 1);
            }

            pages.Add(new FileExtent(start, end - start));
        }

        return pages;
    }

    /// <summary>A block on its way.</summary>
    private sealed class Slot
    {
        private readonly byte[] _plain = new byte[Lz4MemoryFile.BlockSize];
        private readonly byte[] _compressed = new byte[Lz4MemoryFile.BlockSize];
        private int _plainLength;
        private int _compressedLength;

        /// <summary>What goes into the file: the block as it is, if it does not get smaller.</summary>
        public ReadOnlySpan<byte> Result => _compressedLength > 0 ? _compressed.AsSpan(0, _compressedLength) : _plain.AsSpan(0, _plainLength);

        public void Read(SafeFileHandle memory, int number, long memoryLength)
        {
            _plainLength = Lz4MemoryFile.DecodedLength(number, memoryLength);
            if (!Lz4MemoryFile.TryRead(memory, _plain.AsSpan(0, _plainLength), (long)number * Lz4MemoryFile.BlockSize))
            {
                throw new EndOfStreamException($"The memory file ends in its block {number}.");
            }
        }

        public void Compress() => _compressedLength = LZ4Codec.Encode(_plain.AsSpan(0, _plainLength), _compressed.AsSpan(0, _plainLength - 1), Level);
    }
}
