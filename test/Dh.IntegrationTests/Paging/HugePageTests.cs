using System.Globalization;
using Dh.Paging;
using Dh.TestSupport;
using static Dh.IntegrationTests.Paging.PageHashes;

namespace Dh.IntegrationTests.Paging;

/// <summary>
/// Regions of 2 MiB pages: of hugetlbfs where the kernel has some to give, and ordinary memory that a client says is made of them, which
/// holds the server to whole pages just the same.
/// </summary>
public sealed class HugePageTests : IDisposable
{
    private const string Pool = "/proc/sys/vm/nr_hugepages";
    private const string Id = "huge";
    private const long HugePageSize = 2 << 20;
    private const int HugePages = 8;
    private const long Size = HugePages * HugePageSize;

    /// <summary>Above all that a loaded machine needs, far below the tests' own time limit.</summary>
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();
    private readonly string? _poolBefore = File.Exists(Pool) ? File.ReadAllText(Pool).Trim() : null;

    [Theory(Timeout = 60_000)]
    [InlineData("huge", PopulationPolicy.Eager, false)]
    [InlineData("huge", PopulationPolicy.Prefetch, false)]
    [InlineData("huge", PopulationPolicy.Prefetch, true)]
    [InlineData("huge", PopulationPolicy.Lazy, false)]
    [InlineData("huge", PopulationPolicy.Lazy, true)]
    [InlineData("as-huge", PopulationPolicy.Eager, false)]
    [InlineData("as-huge", PopulationPolicy.Prefetch, false)]
    [InlineData("as-huge", PopulationPolicy.Prefetch, true)]
    [InlineData("as-huge", PopulationPolicy.Lazy, false)]
    [InlineData("as-huge", PopulationPolicy.Lazy, true)]
    public async Task Huge_pages_become_equal_to_the_file(string mode, PopulationPolicy policy, bool fill)
    {
        Assert.SkipUnless(mode != "huge" || GrantPages(), $"the kernel grants no {HugePages} huge pages ({Pool})");
        string file = MemoryFile(), workingSet = _directory["working-set"];
        // In the order of the first touch, which is not the order of the pages: pages 5, 2, 5 again, the border of 0 and 1, and all of 6.
        long[] offsets = [(5 * HugePageSize) + (7 * PageSize), (2 * HugePageSize) + PageSize, 5 * HugePageSize, HugePageSize, HugePageSize - PageSize,
            .. Enumerable.Range(0, (int)(HugePageSize / PageSize)).Select(page => (6 * HugePageSize) + ((long)page * PageSize))];
        WorkingSet.Combine(Id, Size, [offsets], []).WriteTo(workingSet, file);
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, Size);
        await using var _ = client;
        await using var server = PageServer.Start(
            connection,
            WorkingSetSource.Open(SparseFileSource.Open(file), workingSet, Id),
            new PageServerOptions { Policy = policy, Fill = fill, Failed = _ => client.Kill() });

        var result = await server.WaitPopulatedAsync(TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken);
        await client.SentAsync();

        // Page 3 is a hole.
        Assert.Equal(policy switch { PopulationPolicy.Eager => (HugePages - 1) * HugePageSize, PopulationPolicy.Prefetch => 5 * HugePageSize, _ => 0 }, result.CopiedBytes);
        Assert.Null(result.Warning);
        Assert.Equal(result.CopiedBytes, server.Progress.PlannedBytes);
        if (fill)
        {
            Assert.Equal(PageServerEnd.Released, await server.Completion.WaitAsync(Bound, TestContext.Current.CancellationToken));
        }

        byte[] memory = await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken);
        AssertSame(HashPages(memory), await client.HashPagesAsync());

        await client.WriteAsync(4 * HugePageSize, HugePageSize);
        Write(memory.AsSpan(4 * (int)HugePageSize, (int)HugePageSize));
        await client.RemoveAsync(2 * HugePageSize, 2 * HugePageSize);
        memory.AsSpan(2 * (int)HugePageSize, 2 * (int)HugePageSize).Clear();
        AssertSame(HashPages(memory), await client.HashPagesAsync());
    }

    public void Dispose()
    {
        _directory.Dispose();
        if (_poolBefore is not null && Environment.IsPrivilegedProcess)
        {
            File.WriteAllText(Pool, _poolBefore);
        }
    }

    /// <summary>Whether there are enough pages, if need be after asking for them.</summary>
    private bool GrantPages()
    {
        if (_poolBefore is null)
        {
            return false;
        }

        if (Environment.IsPrivilegedProcess)
        {
            File.WriteAllText(Pool, (int.Parse(_poolBefore, CultureInfo.InvariantCulture) + (2 * HugePages)).ToString(CultureInfo.InvariantCulture));
        }

        string free = File.ReadLines("/proc/meminfo").First(line => line.StartsWith("HugePages_Free:", StringComparison.Ordinal));
        return int.Parse(free.AsSpan(free.IndexOf(':', StringComparison.Ordinal) + 1), CultureInfo.InvariantCulture) >= HugePages;
    }

    /// <summary>Data in runs of up to 100 small pages with holes between them; the fourth huge page is a hole as a whole.</summary>
    private string MemoryFile()
    {
        string path = SparseFileBuilder.Write(_directory["memory"], Size, maxRunPages: 100);
        using var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite);
        Dh.Linux.SparseFile.PunchHole(file, new(3 * HugePageSize, HugePageSize));
        return path;
    }
}
