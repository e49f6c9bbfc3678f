using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;
using Microsoft.Win32.SafeHandles;
using static Dh.IntegrationTests.Paging.PageHashes;

namespace Dh.IntegrationTests.Paging;

/// <summary>Guest memory that the page server fills before its VMM has mapped it.</summary>
public sealed class BackingTests : IDisposable
{
    private const int Pages = 4096;
    private const long Size = Pages * (long)PageSize;
    private const string Id = "backing";

    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Eager)]
    [InlineData(PopulationPolicy.Prefetch)]
    public async Task What_the_policy_places_is_there_before_the_handshake(PopulationPolicy policy)
    {
        string file = WriteMemory(), workingSet = WriteWorkingSet(file);
        var backing = MemoryFile.CreateSealed("guest-memory", Size);
        PageServer? server = null;
        await using var client = await GuestMemoryClient.StartBackedAsync("normal", Size, 0, backing, connection =>
        {
            server = PageServer.Start(connection, WorkingSetSource.Open(SparseFileSource.Open(file), workingSet, Id), new PageServerOptions { Policy = policy, Backing = backing });
            long planned = policy == PopulationPolicy.Eager ? DataBytes(file) : 1000L * PageSize;
            Assert.True(SpinWait.SpinUntil(() => AllocatedBytes(backing) >= planned, Bound), $"{AllocatedBytes(backing)} of {planned} bytes");
        });
        await using var _ = server;

        await client.SentAsync();
        var result = await server!.WaitPopulatedAsync(TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken);

        Assert.Equal(policy == PopulationPolicy.Eager ? DataBytes(file) : 1000L * PageSize, result.CopiedBytes);
        AssertSame(HashPages(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken)), await client.HashPagesAsync());
    }

    [Fact(Timeout = 60_000)]
    public async Task A_damaged_working_set_is_told_once_and_the_memory_file_serves()
    {
        string file = WriteMemory(), workingSet = WriteWorkingSet(file);
        using (var damage = File.OpenWrite(workingSet))
        {
            damage.Position = damage.Length - 1;
            damage.WriteByte(0xff);
            damage.Position = damage.Length / 2;
            damage.WriteByte(0xff);
        }

        var (result, hashes) = await ServeAsync(file, workingSet);

        Assert.Contains("damaged", result.Warning, StringComparison.Ordinal);
        AssertSame(HashPages(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken)), hashes);
    }

    [Fact]
    public void Nobody_can_change_the_length_of_the_file()
    {
        using var backing = MemoryFile.CreateSealed("guest-memory", Size);

        Assert.ThrowsAny<Exception>(() => RandomAccess.SetLength(backing, Size / 2));
        Assert.ThrowsAny<Exception>(() => RandomAccess.SetLength(backing, Size * 2));
        Assert.Equal(Size, RandomAccess.GetLength(backing));
    }

    [Fact(Timeout = 60_000)]
    public async Task Huge_pages_are_refused()
    {
        string file = WriteMemory();
        var backing = MemoryFile.CreateSealed("guest-memory", Size);
        PageServer? server = null;
        await using var client = await GuestMemoryClient.StartBackedAsync("as-huge", Size, 0, backing, connection =>
            server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Backing = backing }));
        await using var _ = server;

        var failure = await Assert.ThrowsAsync<PageServerException>(() => server!.WaitPopulatedAsync(TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken));

        Assert.Contains("huge pages", failure.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Bytes_that_cannot_be_read_are_an_error_and_no_crash()
    {
        using var backing = MemoryFile.CreateSealed("guest-memory", Size);

        Assert.Equal(Errno.EFAULT, Assert.Throws<LinuxException>(() => MemoryFile.Write(backing, 0, 4096, 4096)).Errno);
    }

    public void Dispose() => _directory.Dispose();

    private static async Task<(PopulationResult Result, ulong[] Hashes)> ServeAsync(string file, string workingSet)
    {
        var backing = MemoryFile.CreateSealed("guest-memory", Size);
        PageServer? server = null;
        await using var client = await GuestMemoryClient.StartBackedAsync("normal", Size, 0, backing, connection => server = PageServer.Start(
            connection,
            WorkingSetSource.Open(SparseFileSource.Open(file), workingSet, Id),
            new PageServerOptions { Policy = PopulationPolicy.Prefetch, Backing = backing }));
        await using var _ = server;
        await client.SentAsync();
        return (await server!.WaitPopulatedAsync().WaitAsync(Bound), await client.HashPagesAsync());
    }

    private static long AllocatedBytes(SafeFileHandle file) => SparseFile.GetDataExtents(file, Size).Sum(extent => extent.Length);

    private static long DataBytes(string path)
    {
        using var file = File.OpenHandle(path);
        return SparseFile.GetDataExtents(file, Size).Sum(extent => extent.Length);
    }

    private string WriteMemory() => SparseFileBuilder.Write(_directory["memory"], Size, seed: 7, maxRunPages: 50, holes: true);

    /// <summary>A thousand pages that hold data, and the order in which they were touched.</summary>
    private string WriteWorkingSet(string file)
    {
        using var handle = File.OpenHandle(file);
        long[] pages = [.. SparseFile.GetDataExtents(handle, Size).SelectMany(extent => Enumerable.Range(0, (int)(extent.Length / (long)PageSize)).Select(page => extent.Offset + (page * (long)PageSize))).Take(1000)];
        WorkingSet.Combine(Id, Size, [pages], []).WriteTo(_directory["working-set"], file);
        return _directory["working-set"];
    }
}
