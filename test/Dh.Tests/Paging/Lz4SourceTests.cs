using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.Tests.Paging;

#pragma warning disable CA5394 // The same bytes in every run.
public sealed class Lz4SourceTests : IDisposable
{
    private const int PageSize = 4096;
    private const int BlockSize = 64 << 10;
    private const int HugePageSize = 2 << 20;
    private const int HeaderLength = 64;

    private readonly TempDir _directory = new();

    [Theory]
    [InlineData(1, 1)]
    [InlineData(2, 16)]
    [InlineData(3, 17)]
    [InlineData(4, 500)]
    [InlineData(5, 1600)]
    [InlineData(6, 3000)]
    public void Whatever_is_read_is_what_the_memory_file_holds(int seed, int pages)
    {
        var random = new Random(seed);
        for (int layout = 0; layout < 8; layout++)
        {
            var (path, memory) = Compress(random, pages);
            using var source = Lz4Source.Open(path);
            Assert.Equal((path, memory.Length), (source.Path, source.Length));
            Assert.Equal(DataExtents(_directory["memory"]), source.DataExtents);
            using var reader = ((IMemorySource)source).OpenReader();
            for (int i = 0; i < 40; i++)
            {
                int first = random.Next(pages), offset = first * PageSize, wanted = random.Next(1, pages - first + 1) * PageSize;
                ulong length = (ulong)wanted;
                var read = Bytes(reader.Read(offset, ref length), length);
                Assert.True(read.Length == wanted || read.Length is >= HugePageSize && read.Length < wanted, $"{read.Length} of {wanted} bytes");
                Assert.True(read.SequenceEqual(memory.AsSpan(offset, read.Length)), $"seed {seed}, layout {layout}: {offset}+{length} differs");
            }
        }
    }

    [Fact]
    public void Copied_contents_are_those_of_the_memory_file()
    {
        var (path, memory) = Compress(new Random(7), 1200);
        using var source = Lz4Source.Open(path);
        using var reader = source.OpenReader();
        byte[] copy = new byte[memory.Length];
        for (int at = 0, read = 1; read > 0; at += read)
        {
            read = reader.CopyTo(at, copy.AsSpan(at, Math.Min(copy.Length - at, 700_001)));
        }

        Assert.True(copy.AsSpan().SequenceEqual(memory));
        Assert.Throws<ArgumentOutOfRangeException>(() => reader.CopyTo(memory.Length + 1, copy));
        Assert.Throws<ArgumentOutOfRangeException>(() => Read(reader, memory.Length - PageSize, 2 * PageSize));
        Assert.Throws<ArgumentOutOfRangeException>(() => Read(reader, -PageSize, PageSize));
    }

    [Fact]
    public void A_file_with_nothing_but_holes_has_no_blocks()
    {
        using (var file = File.OpenHandle(_directory["memory"], FileMode.Create, FileAccess.Write))
        {
            RandomAccess.SetLength(file, 5 << 20);
        }

        Lz4MemoryWriter.Write(_directory["memory"], _directory["memory.lz4"], TestContext.Current.CancellationToken);
        Assert.Equal(HeaderLength, new FileInfo(_directory["memory.lz4"]).Length);
        using var source = Lz4Source.Open(_directory["memory.lz4"]);
        using var reader = source.OpenReader();
        Assert.Empty(source.DataExtents);
        Assert.Equal(-1, Read(reader, 0, HugePageSize).AsSpan().IndexOfAnyExcept((byte)0));
    }

    [Fact]
    public void What_compresses_is_smaller_and_what_does_not_is_stored()
    {
        byte[] memory = new byte[4 * BlockSize];
        new Random(8).NextBytes(memory.AsSpan(0, 2 * BlockSize));
        memory.AsSpan(2 * BlockSize).Fill((byte)'a');
        string path = Compress(memory);
        using var file = File.OpenHandle(path);
        var blocks = Lz4MemoryFile.Read(path, file).Blocks;
        Assert.Equal([BlockSize, BlockSize], blocks[..2].Select(block => block.Length));
        Assert.All(blocks[2..], block => Assert.InRange(block.Length, 1, 1000));
    }

    [Fact]
    public void A_read_allocates_nothing()
    {
        var (path, memory) = Compress(new Random(9), 1000);
        using var source = Lz4Source.Open(path);
        using var reader = ((IMemorySource)source).OpenReader();
        long before = 0;
        for (int pass = 0; pass < 2; pass++)
        {
            before = GC.GetAllocatedBytesForCurrentThread();
            for (int at = 0; at < memory.Length; at += 40 * PageSize)
            {
                ulong length = 40 * PageSize;
                reader.Read(at, ref length);
            }
        }

        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    [Fact]
    public void Reading_ahead_stops_when_it_is_enough()
    {
        var (path, _) = Compress(new Random(10), 3000);
        using var source = Lz4Source.Open(path);
        int asked = 0;
        source.ReadAhead(() => ++asked > 2);
        Assert.Equal(3, asked);
        source.ReadAhead(() => false);
    }

    [Fact]
    public void A_damaged_header_or_table_is_refused_whichever_byte_it_is()
    {
        string path = Compress(new Random(11), 100).Path;
        byte[] good = File.ReadAllBytes(path);
        for (int i = 0; i < FirstBlock(good); i++)
        {
            byte[] bad = [.. good];
            bad[i] ^= (byte)(1 << (i % 8));
            AssertRefused(bad);
        }
    }

    [Fact]
    public void A_file_that_was_cut_or_grew_is_refused()
    {
        byte[] good = File.ReadAllBytes(Compress(new Random(12), 100).Path);
        foreach (int length in Enumerable.Range(0, (int)FirstBlock(good) + 10).Append(good.Length - 1))
        {
            AssertRefused(good[..length]);
        }

        AssertRefused([.. good, 0]);
    }

    [Fact]
    public void A_damaged_block_is_refused_by_name_and_offset_and_the_others_are_read()
    {
        var (path, memory) = Compress(new Random(13), 400, holes: false);
        byte[] good = File.ReadAllBytes(path);
        Lz4Block[] blocks;
        using (var file = File.OpenHandle(path))
        {
            blocks = Lz4MemoryFile.Read(path, file).Blocks;
        }

        foreach (var block in blocks)
        {
            byte[] bad = [.. good];
            bad[block.Offset + (block.Length / 2)] ^= 1;
            File.WriteAllBytes(path, bad);
            using var source = Lz4Source.Open(path);
            using var reader = source.OpenReader();
            int at = block.Number * BlockSize, length = Math.Min(BlockSize, memory.Length - at);
            string message = $"Compressed memory file {path} cannot be used: its block {block.Number} at byte {block.Offset} is not what was written. Run `dh vm prepare --force` to make a new snapshot.";
            Assert.Equal(message, Assert.Throws<PageServerException>(() => Read(reader, at, length)).Message);
            Assert.Equal(message, Assert.Throws<PageServerException>(() => Read(reader, 0, memory.Length)).Message);
            if (at > 0)
            {
                Assert.True(Read(reader, 0, Math.Min(at, HugePageSize)).AsSpan().SequenceEqual(memory.AsSpan(0, Math.Min(at, HugePageSize))));
            }
        }
    }

    [Fact]
    public void A_file_that_is_cut_while_it_is_in_use_is_refused()
    {
        var (path, memory) = Compress(new Random(14), 400, holes: false);
        using var source = Lz4Source.Open(path);
        using var reader = source.OpenReader();
        using (var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite))
        {
            RandomAccess.SetLength(file, RandomAccess.GetLength(file) - 1);
        }

        Assert.EndsWith(" is cut. Run `dh vm prepare --force` to make a new snapshot.", Assert.Throws<PageServerException>(() => Read(reader, memory.Length - PageSize, PageSize)).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(12, 4096, "its blocks have 4096 bytes, this dh reads 65536")]
    [InlineData(8, 2, "it has version 2, this dh reads 1")]
    [InlineData(16, 0, "it records 0 bytes of memory")]
    [InlineData(16, 4097, "it records 4097 bytes of memory")]
    [InlineData(24, -1, "it has * bytes, which is not what its header says: it was cut or grew")]
    [InlineData(28, -1, "it has * bytes, which is not what its header says: it was cut or grew")]
    [InlineData(28, 1, "its tables' hash is wrong")]
    public void A_header_that_cannot_be_true_is_refused_although_its_hash_is_right(int offset, int value, string why)
    {
        byte[] bad = File.ReadAllBytes(Compress(new Random(15), 100).Path);
        BinaryPrimitives.WriteInt32LittleEndian(bad.AsSpan(offset), value);
        BinaryPrimitives.WriteUInt64LittleEndian(bad.AsSpan(56), XxHash3.HashToUInt64(bad.AsSpan(0, 56)));
        string pattern = "^" + System.Text.RegularExpressions.Regex.Escape($"Compressed memory file {_directory["bad"]} cannot be used: {why}. Run").Replace("\\*", ".*", StringComparison.Ordinal);
        Assert.Matches(pattern, AssertRefused(bad).Message);
    }

    /// <summary>Somebody who can compute hashes gets wrong contents at most: never a crash, and never more than was asked for.</summary>
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void A_forged_file_is_refused_or_read(int seed)
    {
        var random = new Random(seed);
        byte[] good = File.ReadAllBytes(Compress(random, 200).Path);
        int refused = 0, read = 0;
        byte[] buffer = new byte[HugePageSize];
        for (int i = 0; i < 400; i++)
        {
            byte[] forged = Forge(random, good);
            File.WriteAllBytes(_directory["forged"], forged);
            try
            {
                using var source = Lz4Source.Open(_directory["forged"]);
                using var reader = source.OpenReader();
                for (long at = 0; at < Math.Min(source.Length, 4 << 20); at += buffer.Length)
                {
                    reader.CopyTo(at, buffer);
                }

                read++;
            }
            catch (PageServerException)
            {
                refused++;
            }
        }

        Assert.True(refused > 0 && read > 0, $"{refused} refused, {read} read");
    }

    [Fact]
    public void A_file_that_is_not_there_is_named() =>
        Assert.StartsWith($"Compressed memory file {_directory["none"]} cannot be used: Could not find file", Assert.Throws<PageServerException>(() => Lz4Source.Open(_directory["none"])).Message, StringComparison.Ordinal);

    public void Dispose() => _directory.Dispose();

    /// <summary>Changes a few bytes, in the header, the tables or the blocks, and makes all hashes right again.</summary>
    private static byte[] Forge(Random random, byte[] good)
    {
        byte[] forged = [.. good];
        int first = (int)FirstBlock(good), extents = BinaryPrimitives.ReadInt32LittleEndian(good.AsSpan(24)), blocks = BinaryPrimitives.ReadInt32LittleEndian(good.AsSpan(28));
        int kind = random.Next(3);
        for (int changes = random.Next(1, 5); changes > 0; changes--)
        {
            int at = kind switch { 0 => random.Next(16, HeaderLength - 8), 1 => random.Next(HeaderLength, first), _ => random.Next(first, good.Length) };
            forged[at] = random.Next(3) switch { 0 => 0, 1 => 255, _ => (byte)random.Next(256) };
        }

        for (int i = 0; i < blocks; i++)
        {
            var entry = forged.AsSpan(HeaderLength + (extents * 16) + (i * 24), 24);
            long offset = BinaryPrimitives.ReadInt64LittleEndian(entry), length = BinaryPrimitives.ReadInt64LittleEndian(entry[8..]);
            if (offset >= 0 && length >= 0 && offset <= forged.Length && length <= forged.Length - offset)
            {
                BinaryPrimitives.WriteUInt64LittleEndian(entry[16..], XxHash3.HashToUInt64(forged.AsSpan((int)offset, (int)length)));
            }
        }

        BinaryPrimitives.WriteUInt64LittleEndian(forged.AsSpan(48), XxHash3.HashToUInt64(forged.AsSpan(HeaderLength, first - HeaderLength)));
        BinaryPrimitives.WriteUInt64LittleEndian(forged.AsSpan(56), XxHash3.HashToUInt64(forged.AsSpan(0, 56)));
        return forged;
    }

    private static long FirstBlock(ReadOnlySpan<byte> file) =>
        Lz4MemoryFile.HeadLength(BinaryPrimitives.ReadInt32LittleEndian(file[24..]), BinaryPrimitives.ReadInt32LittleEndian(file[28..]));

    private static unsafe ReadOnlySpan<byte> Bytes(nuint address, ulong length) =>
        // SAFETY: the reader says that so many bytes are there, until its next call.
        new((void*)address, (int)length);

    private static byte[] Read(Lz4Reader reader, long offset, long length)
    {
        ulong read = (ulong)length;
        nuint address = reader.Read(offset, ref read);
        return Bytes(address, read).ToArray();
    }

    private static IReadOnlyList<FileExtent> DataExtents(string path)
    {
        using var file = File.OpenHandle(path);
        return SparseFile.GetDataExtents(file, RandomAccess.GetLength(file));
    }

    private PageServerException AssertRefused(byte[] bad)
    {
        File.WriteAllBytes(_directory["bad"], bad);
        var refusal = Assert.Throws<PageServerException>(() => Lz4Source.Open(_directory["bad"]));
        Assert.StartsWith($"Compressed memory file {_directory["bad"]} cannot be used: ", refusal.Message, StringComparison.Ordinal);
        Assert.EndsWith(". Run `dh vm prepare --force` to make a new snapshot.", refusal.Message, StringComparison.Ordinal);
        return refusal;
    }

    /// <summary>Compresses memory with runs of holes, random bytes, and text.</summary>
    private (string Path, byte[] Memory) Compress(Random random, int pages, bool holes = true)
    {
        byte[] memory = new byte[pages * PageSize];
        for (int page = 0, run; page < pages; page += run)
        {
            run = random.Next(1, Math.Min(70, pages - page) + 1);
            var bytes = memory.AsSpan(page * PageSize, run * PageSize);
            switch (random.Next(holes ? 0 : 1, 3))
            {
                case 1:
                    random.NextBytes(bytes);
                    break;
                case 2:
                    byte[] text = Encoding.ASCII.GetBytes($"page {page}, run {run}; ");
                    for (int at = 0; at < bytes.Length; at++)
                    {
                        bytes[at] = at % 37 == 0 ? (byte)random.Next(256) : text[at % text.Length];
                    }

                    break;
            }
        }

        return (Compress(memory), memory);
    }

    private string Compress(byte[] memory)
    {
        using (var file = File.OpenHandle(_directory["memory"], FileMode.Create, FileAccess.Write))
        {
            RandomAccess.SetLength(file, memory.Length);
            for (int at = 0; at < memory.Length; at += PageSize)
            {
                if (memory.AsSpan(at, PageSize).ContainsAnyExcept((byte)0))
                {
                    RandomAccess.Write(file, memory.AsSpan(at, PageSize), at);
                }
            }
        }

        File.Delete(_directory["memory.lz4"]);
        Lz4MemoryWriter.Write(_directory["memory"], _directory["memory.lz4"], TestContext.Current.CancellationToken);
        return _directory["memory.lz4"];
    }
}
#pragma warning restore CA5394
