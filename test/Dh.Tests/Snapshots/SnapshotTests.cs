using Dh.Paging;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Tests.Snapshots;

/// <summary>Both layouts of a snapshot's directory: memory as it is, and memory in LZ4 blocks.</summary>
public sealed class SnapshotTests : IDisposable
{
    private const int MemoryMib = 128;

    private readonly TempDir _directory = new();

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_snapshot_opens_its_memory_and_verifies_whichever_layout_it_has(bool compressed)
    {
        Write(compressed, MemoryMib << 20);
        var snapshot = Snapshot.Open(_directory.Path);
        Assert.Equal((compressed, _directory[compressed ? "memory.lz4" : "memory"]), (snapshot.IsCompressed, snapshot.MemoryPath));
        await snapshot.VerifyAsync(TestContext.Current.CancellationToken);
        using var memory = snapshot.OpenMemory();
        Assert.Equal((MemoryMib << 20, snapshot.MemoryPath), (memory.Length, memory.Path));
        Assert.Equal(compressed ? typeof(Lz4Source) : typeof(SparseFileSource), memory.GetType());
    }

    [Fact]
    public void Compressed_memory_of_another_length_is_refused()
    {
        Write(compressed: true, 64 << 20);
        Assert.Equal(
            $"Compressed memory file {_directory["memory.lz4"]} cannot be used: it holds {64 << 20} bytes of memory instead of {MemoryMib << 20}. Run `dh vm prepare --force` to make a new snapshot.",
            Assert.Throws<PageServerException>(() => Snapshot.Open(_directory.Path).OpenMemory()).Message);
    }

    [Fact]
    public void A_snapshot_without_memory_is_refused()
    {
        Write(compressed: true, MemoryMib << 20, without: "memory.lz4");
        Assert.Equal(
            $"Snapshot file {_directory["manifest.json"]} cannot be used: it does not record memory. Run `dh vm prepare --force` to make a new snapshot.",
            Assert.Throws<DhException>(() => Snapshot.Open(_directory.Path)).Message);
    }

    [Theory]
    [InlineData(Snapshot.ManifestName)]
    [InlineData(Snapshot.StateName)]
    public void Every_flipped_bit_is_refused_and_names_the_file(string name)
    {
        Write(compressed: false, MemoryMib << 20);
        string path = _directory[name];
        byte[] bytes = File.ReadAllBytes(path);
        using var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite);
        for (int bit = 0; bit < bytes.Length * 8; bit++)
        {
            RandomAccess.Write(file, [(byte)(bytes[bit / 8] ^ (1 << (bit % 8)))], bit / 8);
            Assert.Contains(path, Assert.Throws<DhException>(() => Snapshot.Open(_directory.Path)).Message, StringComparison.Ordinal);
            RandomAccess.Write(file, [bytes[bit / 8]], bit / 8);
        }

        Snapshot.Open(_directory.Path);
    }

    [Theory]
    [InlineData(Snapshot.ManifestName)]
    [InlineData(Snapshot.StateName)]
    [InlineData(Snapshot.MemoryName)]
    [InlineData(Snapshot.RootDiskName)]
    [InlineData(Snapshot.KernelName)]
    [InlineData(Snapshot.InitrdName)]
    public void Every_other_length_is_refused_and_names_the_file(string name)
    {
        Write(compressed: false, MemoryMib << 20);
        string path = _directory[name], kept = _directory["kept"];
        long length = new FileInfo(path).Length;
        File.Move(path, kept);
        foreach (long other in (long[])[0, 1, length - 1, length + 1, length * 2])
        {
            File.Copy(kept, path, overwrite: true);
            using (var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite))
            {
                RandomAccess.SetLength(file, other);
            }

            Assert.Contains(path, Assert.Throws<DhException>(() => Snapshot.Open(_directory.Path)).Message, StringComparison.Ordinal);
        }

        File.Move(kept, path, overwrite: true);
        Snapshot.Open(_directory.Path);
    }

    public void Dispose() => _directory.Dispose();

    private void Write(bool compressed, long memoryLength, string? without = null) => WrittenSnapshot.Write(_directory.Path, compressed, memoryLength, MemoryMib, without);
}
