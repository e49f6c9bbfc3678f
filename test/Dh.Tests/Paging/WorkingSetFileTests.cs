using CsCheck;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.Tests.Paging;

#pragma warning disable CA5394 // The same bytes in every run.
public sealed class WorkingSetFileTests : IDisposable
{
    private const int Page = 4096;
    private const int HeaderLength = 96;
    private const string Id = "0123456789abcdef0123456789abcdef";

    private readonly TempDir _directory = new();

    /// <summary>Sets of up to 1 MiB: some end in the middle of a chunk, some are empty.</summary>
    private static readonly Gen<(int Pages, int[] Touched, int[] Written, int Seed)> Sets =
        Gen.Int[1, 256].SelectMany(pages => Gen.Select(Gen.Const(pages), Gen.Int[0, pages - 1].Array[0, 200], Gen.Int[0, pages - 1].Array[0, 60], Gen.Int));

    [Fact]
    public void What_is_written_is_read_again() => Sets.Sample((pages, touched, written, seed) =>
    {
        byte[] memory = new byte[pages * Page];
        new Random(seed).NextBytes(memory);
        var set = SetOf(pages, touched, written);
        string path = _directory[$"{Guid.NewGuid():N}"];
        Write(path, set, memory);

        var read = WorkingSetFile.Read(path, Id, memory.Length);

        Assert.Equal((set.SnapshotId, set.MemoryLength), (read.Set.SnapshotId, read.Set.MemoryLength));
        Assert.Equal(set.Touched, read.Set.Touched);
        Assert.Equal(set.Written, read.Set.Written);
        Assert.Equal((set.TouchedBytes + WorkingSetFile.ChunkLength - 1) / WorkingSetFile.ChunkLength, read.ChunkHashes.Length);
        byte[] packed = [.. set.Touched.SelectMany(run => memory.AsSpan((int)run.Offset, (int)run.Length).ToArray())];
        Assert.True(File.ReadAllBytes(path).AsSpan((int)read.PagesOffset).SequenceEqual(packed), "the packed pages differ from memory");
        File.Delete(path);
    }, iter: 60);

    [Fact]
    public void A_file_that_is_there_is_replaced_and_no_draft_is_left()
    {
        string path = _directory["working-set"];
        for (int pages = 1; pages < 3; pages++)
        {
            Write(path, SetOf(8, [.. Enumerable.Range(0, pages)], []), new byte[8 * Page]);
            Assert.Equal(pages * Page, WorkingSetFile.Read(path, Id, 8 * Page).Set.TouchedBytes);
        }

        Assert.Equal([path], Directory.GetFiles(_directory.Path));
    }

    [Fact]
    public void A_memory_file_that_ends_too_early_leaves_the_old_file()
    {
        string path = _directory["working-set"];
        Write(path, SetOf(8, [0, 5], []), new byte[8 * Page]);
        byte[] before = File.ReadAllBytes(path);

        Assert.Throws<EndOfStreamException>(() => Write(path, SetOf(8, [1, 7], []), new byte[7 * Page]));

        Assert.Equal(before, File.ReadAllBytes(path));
        Assert.Equal([path], Directory.GetFiles(_directory.Path));
    }

    [Fact]
    public void A_damaged_header_or_table_is_refused_whichever_byte_it_is()
    {
        byte[] good = Sample(out int tablesEnd);
        for (int i = 0; i < tablesEnd; i++)
        {
            byte[] bad = [.. good];
            bad[i] ^= (byte)(1 << (i % 8));
            AssertRefused(bad);
        }
    }

    [Fact]
    public void A_file_that_was_cut_or_grew_is_refused()
    {
        byte[] good = Sample(out int tablesEnd);
        foreach (int length in Enumerable.Range(0, tablesEnd + 1).Append(Page - 1).Append(Page).Append(good.Length - Page).Append(good.Length - 1))
        {
            AssertRefused(good[..length]);
        }

        AssertRefused([.. good, 0]);
    }

    [Theory]
    [InlineData("another", 64 * Page)]
    [InlineData("", 64 * Page)]
    [InlineData(Id, 65 * Page)]
    public void Another_snapshots_working_set_is_refused(string id, long memoryLength)
    {
        string path = _directory["working-set"];
        File.WriteAllBytes(path, Sample(out _));

        var refusal = Assert.Throws<PageServerException>(() => WorkingSetFile.Read(path, id, memoryLength));

        Assert.True(refusal.WorkingSetDamaged);
        Assert.Equal($"Working set {path} cannot be used: it belongs to snapshot {Id} with {64 * Page} bytes of memory. Run `dh vm record` to make a new one.", refusal.Message);
    }

    [Fact]
    public void A_file_that_is_missing_is_refused_by_name()
    {
        var refusal = Assert.Throws<PageServerException>(() => WorkingSetFile.Read(_directory["none"], Id, Page));

        Assert.True(refusal.WorkingSetDamaged);
        Assert.Contains(_directory["none"], refusal.Message, StringComparison.Ordinal);
    }

    public void Dispose() => _directory.Dispose();

    private static WorkingSet SetOf(int pages, int[] touched, int[] written) =>
        WorkingSet.Combine(Id, (long)pages * Page, [[.. touched.Select(page => (long)page * Page)]], [written.Select(page => (long)page * Page).ToArray()]);

    private static void Write(string path, WorkingSet set, byte[] memory) => WorkingSetFile.Write(path, set, (offset, buffer) =>
    {
        // A third at a time: a read may return less than is asked for.
        int length = (int)Math.Min(Math.Max(1, buffer.Length / 3), Math.Max(0, memory.Length - offset));
        memory.AsSpan((int)offset, length).CopyTo(buffer);
        return length;
    });

    private byte[] Sample(out int tablesEnd)
    {
        byte[] memory = new byte[64 * Page];
        new Random(1).NextBytes(memory);
        var set = SetOf(64, [9, 3, 4, 5, 20, 63], [3, 4, 60]);
        Write(_directory["sample"], set, memory);
        tablesEnd = HeaderLength + ((set.Touched.Count + set.Written.Count) * 16) + sizeof(ulong);
        return File.ReadAllBytes(_directory["sample"]);
    }

    private void AssertRefused(byte[] bytes)
    {
        string path = _directory["damaged"];
        File.WriteAllBytes(path, bytes);
        var refusal = Assert.Throws<PageServerException>(() => WorkingSetFile.Read(path, Id, 64 * Page));
        Assert.True(refusal.WorkingSetDamaged);
        Assert.StartsWith($"Working set {path} cannot be used: ", refusal.Message, StringComparison.Ordinal);
    }
}
