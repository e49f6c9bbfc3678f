using System.IO.Hashing;
using Dh.Linux;
using K4os.Compression.LZ4;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>One thread's way to compressed memory: a buffer that holds the blocks of the last read.</summary>
/// <param name="path">The file, for messages.</param>
/// <param name="file">The file, which is the source's.</param>
/// <param name="tables">Its tables.</param>
internal sealed class Lz4Reader(string path, SafeFileHandle file, Lz4MemoryFile tables) : IMemoryReader
{
    private const int BlockSize = Lz4MemoryFile.BlockSize;

    /// <summary>The most that one read returns.</summary>
    private const int MaxLength = (int)GuestRegion.HugePageSize;

    // One block more than a read returns, because a read need not begin where a block does.
    private readonly MemoryMapping _decoded = MemoryMapping.Buffer(MaxLength + BlockSize);
    private readonly byte[] _compressed = new byte[BlockSize];
    private int _first;
    private int _end;

    /// <inheritdoc/>
    public bool IsMapped => false;

    /// <inheritdoc/>
    public nuint Read(long offset, ref ulong length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, tables.MemoryLength);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(length, (ulong)(tables.MemoryLength - offset));
        length = Math.Min(length, MaxLength);
        return _decoded.Address + (nuint)Decode(offset, (int)length);
    }

    /// <summary>Copies contents.</summary>
    /// <param name="offset">Offset in guest memory.</param>
    /// <param name="destination">Where to.</param>
    /// <returns>The bytes that were copied: all, or at least 2 MiB; none at the end of memory.</returns>
    /// <exception cref="PageServerException">The contents cannot be read; the message names the file.</exception>
    public int CopyTo(long offset, Span<byte> destination)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, tables.MemoryLength);
        int length = (int)Math.Min(tables.MemoryLength - offset, Math.Min(destination.Length, MaxLength));
        _decoded.Span.Slice(Decode(offset, length), length).CopyTo(destination);
        return length;
    }

    /// <inheritdoc/>
    public void Dispose() => _decoded.Dispose();

    /// <summary>Brings the blocks of a range into the buffer.</summary>
    /// <returns>Where in the buffer the range begins.</returns>
    private int Decode(long offset, int length)
    {
        int first = (int)(offset / BlockSize), end = (int)((offset + length + BlockSize - 1) / BlockSize);
        if (first < _first || end > _end)
        {
            _end = _first = 0; // nothing is there until all is
            var decoded = _decoded.Span;
            int index = tables.IndexOf(first);
            for (int number = first; number < end; number++)
            {
                var target = decoded.Slice((number - first) * BlockSize, Lz4MemoryFile.DecodedLength(number, tables.MemoryLength));
                if (index < tables.Blocks.Length && tables.Blocks[index].Number == number)
                {
                    Decode(tables.Blocks[index++], target);
                }
                else
                {
                    target.Clear();
                }
            }

            (_first, _end) = (first, end);
        }

        return (int)(offset - ((long)_first * BlockSize));
    }

    private void Decode(Lz4Block block, Span<byte> target)
    {
        var compressed = _compressed.AsSpan(0, block.Length);
        try
        {
            if (!Lz4MemoryFile.TryRead(file, compressed, block.Offset))
            {
                throw Damaged(block, "is cut");
            }
        }
        catch (IOException e)
        {
            throw Damaged(block, $"cannot be read ({e.Message.TrimEnd('.')})", e);
        }

        if (XxHash3.HashToUInt64(compressed) != block.Hash)
        {
            throw Damaged(block, "is not what was written");
        }

        if (block.Length == target.Length)
        {
            compressed.CopyTo(target);
        }
        else if (LZ4Codec.Decode(compressed, target) != target.Length)
        {
            throw Damaged(block, "cannot be decoded");
        }
    }

    private PageServerException Damaged(Lz4Block block, string how, Exception? inner = null) =>
        Lz4MemoryFile.Damaged(path, $"its block {block.Number} at byte {block.Offset} {how}", inner);
}
