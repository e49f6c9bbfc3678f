using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>Reads guest memory, or a file.</summary>
/// <param name="offset">Offset in it.</param>
/// <param name="buffer">Where to.</param>
/// <returns>Bytes that were read; 0 at its end.</returns>
internal delegate int ReadAt(long offset, Span<byte> buffer);

/// <summary>
/// The file that holds a working set and its pages, packed: reading it is reading in sequence (docs/snapshot-format.md, "working-set").
/// </summary>
internal sealed class WorkingSetFile
{
    /// <summary>Pages are hashed in chunks of this length, so that each can be checked when it is needed.</summary>
    public const int ChunkLength = 256 << 10;

    private const int HeaderLength = 96;
    private const int Version = 1;
    private const int SnapshotIdOffset = 48;
    private const int SnapshotIdLength = 32;
    private const int RunLength = 16;
    private const int PageSize = (int)GuestRegion.NormalPageSize;

    private WorkingSetFile(WorkingSet set, long pagesOffset, ulong[] chunkHashes)
    {
        Set = set;
        PagesOffset = pagesOffset;
        ChunkHashes = chunkHashes;
    }

    private static ReadOnlySpan<byte> Magic => "DHWKSET\n"u8;

    /// <summary>What it holds.</summary>
    public WorkingSet Set { get; }

    /// <summary>Where in the file the packed pages begin.</summary>
    public long PagesOffset { get; }

    /// <summary>XxHash3 of each chunk of the packed pages.</summary>
    public ulong[] ChunkHashes { get; }

    /// <summary>Writes a working set beside the file that is there, and replaces that in one step.</summary>
    /// <param name="path">The file.</param>
    /// <param name="set">The working set.</param>
    /// <param name="memory">Where its pages are.</param>
    /// <exception cref="IOException">It cannot be written; the old file is as it was.</exception>
    public static void Write(string path, WorkingSet set, ReadAt memory)
    {
        string draft = $"{path}.{Guid.NewGuid():N}.draft";
        try
        {
            using (var file = File.OpenHandle(draft, FileMode.CreateNew, FileAccess.Write))
            {
                long tables = (set.Touched.Count + set.Written.Count) * (long)RunLength;
                long chunks = (set.TouchedBytes + ChunkLength - 1) / ChunkLength;
                long pagesOffset = (HeaderLength + tables + (chunks * sizeof(ulong)) + PageSize - 1) / PageSize * PageSize;
                byte[] head = new byte[pagesOffset];
                int at = HeaderLength;
                foreach (var run in set.Touched.Concat(set.Written))
                {
                    BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at), run.Offset);
                    BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(at + sizeof(long)), run.Length);
                    at += RunLength;
                }

                foreach (ulong hash in WritePages(file, pagesOffset, set.Touched, memory))
                {
                    BinaryPrimitives.WriteUInt64LittleEndian(head.AsSpan(at), hash);
                    at += sizeof(ulong);
                }

                WriteHeader(head, set, pagesOffset, XxHash3.HashToUInt64(head.AsSpan(HeaderLength, at - HeaderLength)));
                RandomAccess.Write(file, head, 0);
            }

            if (!OperatingSystem.IsWindows())
            {
                File.SetUnixFileMode(draft, UnixFileMode.UserRead);
            }

            Files.Sync(draft);
            Files.Rename(draft, path);
            Files.Sync(Path.GetDirectoryName(path)!);
        }
        finally
        {
            File.Delete(draft);
        }
    }

    /// <summary>Reads all but the pages, and checks that the set is one of this snapshot and can be true.</summary>
    /// <param name="path">The file.</param>
    /// <param name="snapshotId">The snapshot that it must be of.</param>
    /// <param name="memoryLength">Bytes of that snapshot's memory.</param>
    /// <exception cref="PageServerException">It is damaged, of another version, or of another snapshot: a guest does without.</exception>
    public static WorkingSetFile Read(string path, string snapshotId, long memoryLength)
    {
        try
        {
            using var file = File.OpenHandle(path);
            return Parse(path, (offset, buffer) => RandomAccess.Read(file, buffer, offset), RandomAccess.GetLength(file), snapshotId, memoryLength);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Damaged(path, e.Message, e);
        }
    }

    /// <summary>Whether a chunk of the pages is there and has the hash that it should have.</summary>
    /// <param name="file">The file, open.</param>
    /// <param name="chunk">Which chunk.</param>
    /// <param name="buffer">At least <see cref="ChunkLength"/> bytes.</param>
    public bool HasGoodChunk(SafeFileHandle file, int chunk, byte[] buffer)
    {
        long from = (long)chunk * ChunkLength;
        int length = (int)Math.Min(ChunkLength, Set.TouchedBytes - from), read = 0;
        try
        {
            for (int got; read < length && (got = RandomAccess.Read(file, buffer.AsSpan(read, length - read), PagesOffset + from + read)) > 0;)
            {
                read += got;
            }

            return read == length && XxHash3.HashToUInt64(buffer.AsSpan(0, length)) == ChunkHashes[chunk];
        }
        catch (IOException)
        {
            return false; // as good as a wrong hash: the pages are not there
        }
    }

    /// <summary>Reads all but the pages from whatever holds the file's bytes; takes no more memory than the file has bytes, whatever it says.</summary>
    /// <param name="path">The file, for messages.</param>
    /// <param name="read">Reads the file's bytes.</param>
    /// <param name="length">How many these are.</param>
    /// <param name="snapshotId">The snapshot that it must be of.</param>
    /// <param name="memoryLength">Bytes of that snapshot's memory.</param>
    /// <exception cref="PageServerException">It is damaged, of another version, or of another snapshot: a guest does without.</exception>
    public static WorkingSetFile Parse(string path, ReadAt read, long length, string snapshotId, long memoryLength)
    {
        byte[] header = new byte[HeaderLength];
        if (read(0, header) < HeaderLength || !header.AsSpan().StartsWith(Magic))
        {
            throw Damaged(path, "it is no working set");
        }

        if (BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(8)) is var version && version != Version)
        {
            throw Damaged(path, $"it has version {version}, this dh reads {Version}");
        }

        if (BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(88)) != XxHash3.HashToUInt64(header.AsSpan(0, 88)))
        {
            throw Damaged(path, "its header's hash is wrong");
        }

        string id = Encoding.UTF8.GetString(header.AsSpan(SnapshotIdOffset, SnapshotIdLength)).TrimEnd('\0');
        long recordedLength = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(16));
        if (id != snapshotId || recordedLength != memoryLength)
        {
            throw Damaged(path, $"it belongs to snapshot {id} with {recordedLength} bytes of memory");
        }

        if (BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(12)) is var pageSize && pageSize != PageSize)
        {
            throw Damaged(path, $"its pages have {pageSize} bytes");
        }

        return ReadTables(path, read, header, length);
    }

    /// <summary>The failure of a working set: a guest does without.</summary>
    public static PageServerException Damaged(string path, string why, Exception? inner = null) =>
        new($"Working set {path} cannot be used: {why}. Run `dh vm record` to make a new one.", inner) { WorkingSetDamaged = true };

    private static WorkingSetFile ReadTables(string path, ReadAt read, ReadOnlySpan<byte> header, long length)
    {
        long touched = BinaryPrimitives.ReadUInt32LittleEndian(header[24..]), written = BinaryPrimitives.ReadUInt32LittleEndian(header[28..]);
        long memoryLength = BinaryPrimitives.ReadInt64LittleEndian(header[16..]);
        long pagesOffset = BinaryPrimitives.ReadInt64LittleEndian(header[32..]), pagesLength = BinaryPrimitives.ReadInt64LittleEndian(header[40..]);
        long chunks = pagesLength is >= 0 and < long.MaxValue / 2 ? (pagesLength + ChunkLength - 1) / ChunkLength : -1;
        long tablesLength = ((touched + written) * RunLength) + (chunks * sizeof(ulong));
        if (pagesOffset < 0 || pagesLength % PageSize != 0 || pagesOffset % PageSize != 0 || chunks < 0 || length != pagesOffset + pagesLength || HeaderLength + tablesLength > pagesOffset
            || tablesLength > Array.MaxLength)
        {
            throw Damaged(path, $"it has {length} bytes, which is not what its header says: it was cut or grew");
        }

        byte[] tables = new byte[tablesLength];
        if (read(HeaderLength, tables) != tables.Length || XxHash3.HashToUInt64(tables) != BinaryPrimitives.ReadUInt64LittleEndian(header[80..]))
        {
            throw Damaged(path, "its tables' hash is wrong");
        }

        var runs = new FileExtent[touched + written];
        for (int i = 0; i < runs.Length; i++)
        {
            runs[i] = new FileExtent(BinaryPrimitives.ReadInt64LittleEndian(tables.AsSpan(i * RunLength)), BinaryPrimitives.ReadInt64LittleEndian(tables.AsSpan((i * RunLength) + sizeof(long))));
        }

        ulong[] hashes = new ulong[chunks];
        for (int i = 0; i < hashes.Length; i++)
        {
            hashes[i] = BinaryPrimitives.ReadUInt64LittleEndian(tables.AsSpan((runs.Length * RunLength) + (i * sizeof(ulong))));
        }

        string id = Encoding.UTF8.GetString(header.Slice(SnapshotIdOffset, SnapshotIdLength)).TrimEnd('\0');
        FileExtent[] touchedRuns = runs[..(int)touched], writtenRuns = runs[(int)touched..];
        if (!AreRuns(touchedRuns, memoryLength) || !AreRuns(writtenRuns, memoryLength) || touchedRuns.Sum(run => run.Length) != pagesLength)
        {
            throw Damaged(path, "its runs overlap, or lie outside of guest memory");
        }

        return new WorkingSetFile(new WorkingSet(id, memoryLength, touchedRuns, writtenRuns), pagesOffset, hashes);
    }

    private static bool AreRuns(IReadOnlyList<FileExtent> runs, long memoryLength)
    {
        long end = 0;
        foreach (var run in runs.OrderBy(run => run.Offset))
        {
            if (run.Offset < end || run.Length <= 0 || run.Offset % PageSize != 0 || run.Length % PageSize != 0 || run.Length > memoryLength - run.Offset)
            {
                return false;
            }

            end = run.End;
        }

        return true;
    }

    private static void WriteHeader(Span<byte> header, WorkingSet set, long pagesOffset, ulong tablesHash)
    {
        Magic.CopyTo(header);
        BinaryPrimitives.WriteInt32LittleEndian(header[8..], Version);
        BinaryPrimitives.WriteInt32LittleEndian(header[12..], PageSize);
        BinaryPrimitives.WriteInt64LittleEndian(header[16..], set.MemoryLength);
        BinaryPrimitives.WriteInt32LittleEndian(header[24..], set.Touched.Count);
        BinaryPrimitives.WriteInt32LittleEndian(header[28..], set.Written.Count);
        BinaryPrimitives.WriteInt64LittleEndian(header[32..], pagesOffset);
        BinaryPrimitives.WriteInt64LittleEndian(header[40..], set.TouchedBytes);
        if (!Encoding.UTF8.TryGetBytes(set.SnapshotId, header.Slice(SnapshotIdOffset, SnapshotIdLength), out _))
        {
            throw new ArgumentException($"A snapshot's id has at most {SnapshotIdLength} bytes: {set.SnapshotId}", nameof(set));
        }

        BinaryPrimitives.WriteUInt64LittleEndian(header[80..], tablesHash);
        BinaryPrimitives.WriteUInt64LittleEndian(header[88..], XxHash3.HashToUInt64(header[..88]));
    }

    private static List<ulong> WritePages(SafeFileHandle file, long offset, IReadOnlyList<FileExtent> runs, ReadAt memory)
    {
        var hashes = new List<ulong>();
        byte[] chunk = new byte[ChunkLength];
        int filled = 0;
        foreach (var run in runs)
        {
            for (long at = run.Offset; at < run.End;)
            {
                int read = memory(at, chunk.AsSpan(filled, (int)Math.Min(chunk.Length - filled, run.End - at)));
                if (read == 0)
                {
                    throw new EndOfStreamException($"The memory file ends at {at}, in the middle of the working set.");
                }

                at += read;
                filled += read;
                if (filled == chunk.Length)
                {
                    Flush();
                }
            }
        }

        if (filled > 0)
        {
            Flush();
        }

        return hashes;

        void Flush()
        {
            hashes.Add(XxHash3.HashToUInt64(chunk.AsSpan(0, filled)));
            RandomAccess.Write(file, chunk.AsSpan(0, filled), offset);
            offset += filled;
            filled = 0;
        }
    }
}
