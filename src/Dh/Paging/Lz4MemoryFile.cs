using System.Buffers.Binary;
using System.IO.Hashing;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>
/// The tables of a file that holds guest memory in LZ4 blocks: what is data, and where each block lies (docs/snapshot-format.md, "memory.lz4").
/// </summary>
internal sealed class Lz4MemoryFile
{
    /// <summary>Bytes of guest memory in a block, aligned: what a fault brings by default.</summary>
    public const int BlockSize = 64 << 10;

    /// <summary>Bytes before the tables.</summary>
    public const int HeaderLength = 64;

    private const int Version = 1;
    private const int HashedHeaderLength = HeaderLength - sizeof(ulong);
    private const int ExtentEntryLength = 16;
    private const int BlockEntryLength = 24;
    private const int PageSize = (int)GuestRegion.NormalPageSize;

    /// <summary>The most that a machine can have (<see cref="Preparation.PreparationOptions.MemoryMib"/>).</summary>
    private const long MaxMemoryLength = 1L << 40;

    /// <summary>Makes the tables of a file.</summary>
    /// <param name="memoryLength">Bytes of guest memory.</param>
    /// <param name="dataExtents">What is data: whole pages, in order.</param>
    /// <param name="blocks">The blocks that hold any of it, in order.</param>
    public Lz4MemoryFile(long memoryLength, IReadOnlyList<FileExtent> dataExtents, Lz4Block[] blocks)
    {
        MemoryLength = memoryLength;
        DataExtents = dataExtents;
        Blocks = blocks;
    }

    private static ReadOnlySpan<byte> Magic => "DHMLZ4\r\n"u8;

    /// <summary>Bytes of guest memory.</summary>
    public long MemoryLength { get; }

    /// <summary>What is data: whole pages, in order.</summary>
    public IReadOnlyList<FileExtent> DataExtents { get; }

    /// <summary>The blocks that hold data, in the order of memory and of the file.</summary>
    public Lz4Block[] Blocks { get; }

    /// <summary>Bytes of header and tables of a file.</summary>
    /// <param name="extents">How many data extents it has.</param>
    /// <param name="blocks">How many blocks.</param>
    public static long HeadLength(long extents, long blocks) => HeaderLength + (extents * ExtentEntryLength) + (blocks * BlockEntryLength);

    /// <summary>Bytes of guest memory in a block: less than others only in the last one.</summary>
    /// <param name="number">The block's number: its offset in guest memory divided by <see cref="BlockSize"/>.</param>
    /// <param name="memoryLength">Bytes of guest memory.</param>
    public static int DecodedLength(int number, long memoryLength) => (int)Math.Min(BlockSize, memoryLength - ((long)number * BlockSize));

    /// <summary>The numbers of the blocks that hold data, in order.</summary>
    /// <param name="extents">What is data, in order.</param>
    public static IEnumerable<int> BlocksOf(IEnumerable<FileExtent> extents)
    {
        int next = 0;
        foreach (var extent in extents)
        {
            for (next = Math.Max(next, (int)(extent.Offset / BlockSize)); (long)next * BlockSize < extent.End; next++)
            {
                yield return next;
            }
        }
    }

    /// <summary>The index of a block in <see cref="Blocks"/>, or of the first one behind it.</summary>
    /// <param name="number">The block's number.</param>
    public int IndexOf(int number)
    {
        int low = 0, high = Blocks.Length;
        while (low < high)
        {
            int middle = low + ((high - low) / 2);
            (low, high) = Blocks[middle].Number < number ? (middle + 1, high) : (low, middle);
        }

        return low;
    }

    /// <summary>Makes the header and the tables, as they stand at the beginning of the file.</summary>
    public byte[] ToBytes()
    {
        byte[] head = new byte[HeadLength(DataExtents.Count, Blocks.Length)];
        int at = HeaderLength;
        foreach (var extent in DataExtents)
        {
            BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at), extent.Offset);
            BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at + 8), extent.Length);
            at += ExtentEntryLength;
        }

        foreach (var block in Blocks)
        {
            BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at), block.Offset);
            BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at + 8), block.Length);
            BinaryPrimitives.WriteUInt64LittleEndian(head.AsSpan(at + 16), block.Hash);
            at += BlockEntryLength;
        }

        Magic.CopyTo(head);
        BinaryPrimitives.WriteInt32LittleEndian(head.AsSpan(8), Version);
        BinaryPrimitives.WriteInt32LittleEndian(head.AsSpan(12), BlockSize);
        BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(16), MemoryLength);
        BinaryPrimitives.WriteInt32LittleEndian(head.AsSpan(24), DataExtents.Count);
        BinaryPrimitives.WriteInt32LittleEndian(head.AsSpan(28), Blocks.Length);
        BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(32), Blocks.Length > 0 ? Blocks[^1].End : head.Length);
        BinaryPrimitives.WriteUInt64LittleEndian(head.AsSpan(48), XxHash3.HashToUInt64(head.AsSpan(HeaderLength)));
        BinaryPrimitives.WriteUInt64LittleEndian(head.AsSpan(HashedHeaderLength), XxHash3.HashToUInt64(head.AsSpan(0, HashedHeaderLength)));
        return head;
    }

    /// <summary>Reads all but the blocks, and checks that it can be true.</summary>
    /// <param name="path">The file, for messages.</param>
    /// <param name="file">The file.</param>
    /// <exception cref="PageServerException">It is cut, damaged, or of another version.</exception>
    /// <exception cref="IOException">It cannot be read.</exception>
    public static Lz4MemoryFile Read(string path, SafeFileHandle file)
    {
        byte[] header = new byte[HeaderLength];
        long length = RandomAccess.GetLength(file);
        if (!TryRead(file, header, 0) || !header.AsSpan().StartsWith(Magic))
        {
            throw Damaged(path, "it is no compressed memory");
        }

        if (BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(8)) is var version && version != Version)
        {
            throw Damaged(path, $"it has version {version}, this dh reads {Version}");
        }

        if (BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(HashedHeaderLength)) != XxHash3.HashToUInt64(header.AsSpan(0, HashedHeaderLength)))
        {
            throw Damaged(path, "its header's hash is wrong");
        }

        if (BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(12)) is var blockSize && blockSize != BlockSize)
        {
            throw Damaged(path, $"its blocks have {blockSize} bytes, this dh reads {BlockSize}");
        }

        long memoryLength = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(16)), recordedLength = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(32));
        uint extentCount = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(24)), blockCount = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(28));
        if (memoryLength is <= 0 or > MaxMemoryLength || memoryLength % PageSize != 0)
        {
            throw Damaged(path, $"it records {memoryLength} bytes of memory");
        }

        long headLength = HeadLength(extentCount, blockCount);
        if (length != recordedLength || headLength > length || headLength > Array.MaxLength)
        {
            throw Damaged(path, $"it has {length} bytes, which is not what its header says: it was cut or grew");
        }

        byte[] tables = new byte[headLength - HeaderLength];
        if (!TryRead(file, tables, HeaderLength) || XxHash3.HashToUInt64(tables) != BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(48)))
        {
            throw Damaged(path, "its tables' hash is wrong");
        }

        int extentsLength = (int)extentCount * ExtentEntryLength;
        var extents = ReadExtents(path, tables.AsSpan(0, extentsLength), memoryLength);
        return new Lz4MemoryFile(memoryLength, extents, ReadBlocks(path, tables.AsSpan(extentsLength), extents, memoryLength, headLength, length));
    }

    /// <summary>The failure of a file.</summary>
    public static PageServerException Damaged(string path, string why, Exception? inner = null) =>
        new($"Compressed memory file {path} cannot be used: {why}. Run `dh vm prepare --force` to make a new snapshot.", inner);

    /// <summary>Reads bytes of a file; false when it ends before they do.</summary>
    public static bool TryRead(SafeFileHandle file, Span<byte> buffer, long offset)
    {
        int done = 0;
        for (int got; done < buffer.Length && (got = RandomAccess.Read(file, buffer[done..], offset + done)) > 0;)
        {
            done += got;
        }

        return done == buffer.Length;
    }

    private static FileExtent[] ReadExtents(string path, ReadOnlySpan<byte> table, long memoryLength)
    {
        var extents = new FileExtent[table.Length / ExtentEntryLength];
        long end = 0;
        for (int i = 0; i < extents.Length; i++)
        {
            var entry = table.Slice(i * ExtentEntryLength, ExtentEntryLength);
            var extent = new FileExtent(BinaryPrimitives.ReadInt64LittleEndian(entry), BinaryPrimitives.ReadInt64LittleEndian(entry[8..]));
            if (extent.Offset < end || extent.Offset > memoryLength || extent.Length <= 0 || extent.Length > memoryLength - extent.Offset
                || extent.Offset % PageSize != 0 || extent.Length % PageSize != 0)
            {
                throw Damaged(path, "its data extents overlap, or lie outside of guest memory");
            }

            extents[i] = extent;
            end = extent.End;
        }

        return extents;
    }

    /// <summary>Each block must begin where the one before it ends, and the last one end with the file: then none overlaps another.</summary>
    private static Lz4Block[] ReadBlocks(string path, ReadOnlySpan<byte> table, FileExtent[] extents, long memoryLength, long from, long to)
    {
        var blocks = new Lz4Block[table.Length / BlockEntryLength];
        int count = 0;
        foreach (int number in BlocksOf(extents))
        {
            if (count == blocks.Length)
            {
                throw Damaged(path, "it has fewer blocks than its data needs");
            }

            var entry = table.Slice(count * BlockEntryLength, BlockEntryLength);
            long offset = BinaryPrimitives.ReadInt64LittleEndian(entry), length = BinaryPrimitives.ReadInt64LittleEndian(entry[8..]);
            if (offset != from || length <= 0 || length > DecodedLength(number, memoryLength) || length > to - from)
            {
                throw Damaged(path, $"its block {number} lies at {offset} with {length} bytes, which cannot be");
            }

            blocks[count++] = new Lz4Block(number, offset, (int)length, BinaryPrimitives.ReadUInt64LittleEndian(entry[16..]));
            from = offset + length;
        }

        return count == blocks.Length && from == to ? blocks : throw Damaged(path, "it has more blocks than its data needs");
    }
}

/// <summary>A block of compressed memory.</summary>
/// <param name="Number">Its offset in guest memory, divided by <see cref="Lz4MemoryFile.BlockSize"/>.</param>
/// <param name="Offset">Where in the file it begins.</param>
/// <param name="Length">Its bytes in the file; as many as it has in memory when it is stored as it is.</param>
/// <param name="Hash">XxHash3 of those.</param>
internal readonly record struct Lz4Block(int Number, long Offset, int Length, ulong Hash)
{
    /// <summary>The first byte behind it.</summary>
    public long End => Offset + Length;
}
