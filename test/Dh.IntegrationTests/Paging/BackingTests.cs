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

    /// <summary>The contents come through a userfaultfd: while one of their pages is waited for, there is time to look whether the guest has it already.</summary>
    [Fact(Timeout = 60_000)]
    public async Task A_page_is_not_there_before_its_contents_are()
    {
        const int Few = 256;
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using var _ = theirs;
        using var backing = MemoryFile.CreateSealed("guest-memory", Few * (long)PageSize);
        using var contents = MemoryMapping.Buffer(Few * PageSize);
        using var page = MemoryMapping.Buffer(PageSize);
        page.Span.Fill(7);
        using var uffd = Userfaultfd.Create();
        uffd.Api(0);
        uffd.Register(contents.Address, (ulong)contents.Length);
        int served = 0;

        await using var server = PageServer.Start(ours, new SlowlyMapped(contents), new PageServerOptions { Policy = PopulationPolicy.Eager, Backing = backing });
        try
        {
            for (var events = new UserfaultfdEvent[1]; served < Few;)
            {
                Assert.True(Poll.Wait(uffd.Handle, Bound), $"nothing is read any more after {served} pages");
                if (uffd.ReadEvents(events) == 1)
                {
                    // lseek(2) waits for a write that is under way.
                    long offset = (long)(events[0].Address - contents.Address) / PageSize * PageSize;
                    var there = await Task.Run(() => SparseFile.GetDataExtents(backing, contents.Length), TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken);
                    Assert.DoesNotContain(there, extent => extent.Offset <= offset && offset < extent.End);
                    served += uffd.Copy(contents.Address + (nuint)offset, page.Address, PageSize).Outcome == PagePlacement.Complete ? 1 : 0;
                }
            }
        }
        finally
        {
            uffd.Unregister(contents.Address, (ulong)contents.Length); // nobody must wait for the test
        }

        Assert.True(SpinWait.SpinUntil(() => AllocatedBytes(backing) == contents.Length, Bound));
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

    private static long AllocatedBytes(SafeFileHandle file) => SparseFile.GetDataExtents(file, RandomAccess.GetLength(file)).Sum(extent => extent.Length);

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

    /// <summary>Data without holes that is mapped, whose owner is the test.</summary>
    private sealed class SlowlyMapped(MemoryMapping contents) : IMemorySource, IMemoryReader
    {
        public string Path => "slowly mapped memory";

        public long Length => contents.Length;

        public IReadOnlyList<FileExtent> DataExtents => [new FileExtent(0, contents.Length)];

        public IReadOnlyList<FileExtent> PrefetchExtents => [];

        public bool IsMapped => true;

        public IMemoryReader OpenReader() => this;

        public void ReadAhead(Func<bool> enough)
        {
            // Not asked for: there is memory to fill.
        }

        public nuint Read(long offset, ref ulong length) => contents.Address + (nuint)offset;

        public void Dispose()
        {
            // The mapping is the test's.
        }
    }
}
