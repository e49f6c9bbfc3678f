using System.Diagnostics;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;
using static Dh.IntegrationTests.Paging.PageHashes;

namespace Dh.IntegrationTests.Paging;

public sealed class PageServerTests : IDisposable
{
    private const long Small = 16 << 20;
    private const long Large = 256 << 20;
    private const string Gone = "The VMM went away while its memory was populated.";

    /// <summary>Above all that a loaded machine needs, far below the tests' own time limit.</summary>
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();

    [Theory(Timeout = 60_000)]
    [InlineData("normal", 1, 1)]
    [InlineData("normal", 2, 1)]
    [InlineData("normal", 8, 1)]
    [InlineData("two-regions", 2, 2)]
    [InlineData("apart", 2, 1)]
    [InlineData("glued", 2, 1)]
    [InlineData("in-pieces", 2, 1)]
    [InlineData("blocking", 2, 1)]
    public async Task Eager_population_makes_memory_equal_to_the_file_and_lets_it_go(string mode, int workers, int regions)
    {
        string file = MemoryFile(Small);
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, Small);
        await using var _ = client;
        // A message without the descriptor is glued to the next one when both wait in the socket.
        if (mode == "glued")
        {
            await client.SentAsync();
        }

        var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = workers });
        var result = await PopulatedAsync(server);
        var progress = server.Progress;
        await server.DisposeAsync();
        if (mode != "glued")
        {
            await client.SentAsync();
        }

        Assert.Equal((regions, Small, PopulationPolicy.Eager), (result.RegionCount, result.TotalBytes, result.Policy));
        Assert.Equal(DataBytes(file), result.CopiedBytes);
        Assert.Equal(Small - result.CopiedBytes, result.ZeroBytes);
        Assert.Equal(new PopulationProgress(result.CopiedBytes, result.CopiedBytes), progress);
        await AssertReleasedAsync(client, HashFile(file));
    }

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Eager, "normal", 1)]
    [InlineData(PopulationPolicy.Eager, "two-regions", 2)]
    [InlineData(PopulationPolicy.Lazy, "normal", 2)]
    [InlineData(PopulationPolicy.Lazy, "two-regions", 2)]
    public async Task Compressed_memory_becomes_equal_to_the_file(PopulationPolicy policy, string mode, int workers)
    {
        string file = CompressibleMemoryFile(), compressed = _directory["memory.lz4"];
        Lz4MemoryWriter.Write(file, compressed, TestContext.Current.CancellationToken);
        Assert.InRange(new FileInfo(compressed).Length, 1, DataBytes(file) * 3 / 4);
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, Lz4Source.Open(compressed), new PageServerOptions { Policy = policy, Workers = workers });
        var result = await PopulatedAsync(server);
        await client.SentAsync();
        Assert.Equal(policy == PopulationPolicy.Eager ? DataBytes(file) : 0, result.CopiedBytes);
        AssertSame(HashFile(file), await client.HashPagesAsync());
        Assert.Equal(DataBytes(file), server.Statistics.CopiedBytes);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Eager)]
    [InlineData(PopulationPolicy.Lazy)]
    public async Task Damaged_compressed_memory_ends_the_server_with_the_block(PopulationPolicy policy)
    {
        string file = CompressibleMemoryFile(), compressed = _directory["memory.lz4"];
        Lz4MemoryWriter.Write(file, compressed, TestContext.Current.CancellationToken);
        using (var damaged = File.OpenHandle(compressed, FileMode.Open, FileAccess.ReadWrite))
        {
            RandomAccess.Write(damaged, "damage"u8, RandomAccess.GetLength(damaged) - 6);
        }

        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, Lz4Source.Open(compressed), new PageServerOptions { Policy = policy, Failed = _ => client.Kill() });
        var failing = policy == PopulationPolicy.Eager ? PopulatedAsync(server) : (Task)server.Completion;
        if (policy == PopulationPolicy.Lazy)
        {
            await PopulatedAsync(server);
            await client.SentAsync();
            await Assert.ThrowsAnyAsync<IOException>(client.HashPagesAsync);
        }

        var failure = await Assert.ThrowsAsync<PageServerException>(() => failing.WaitAsync(Bound, TestContext.Current.CancellationToken));
        AssertMatches($"Compressed memory file {compressed} cannot be used: its block * at byte * is not what was written. Run `dh vm prepare --force` to make a new snapshot.", failure.Message);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_connects_to_the_path_is_served()
    {
        string file = MemoryFile(Small), path = _directory["uffd.sock"];
        var server = PageServer.Listen(path, SparseFileSource.Open(file));
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(path));
        await using var client = await GuestMemoryClient.ConnectAsync(path, "normal", Small);

        await PopulatedAsync(server);
        await server.DisposeAsync();

        Assert.False(File.Exists(path));
        await client.SentAsync();
        await AssertReleasedAsync(client, HashFile(file));
    }

    [Theory(Timeout = 60_000)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_file_of_nothing_but_a_hole_and_one_without_holes_are_populated(bool hole)
    {
        string file = _directory["memory"];
        if (hole)
        {
            using var handle = File.OpenHandle(file, FileMode.Create, FileAccess.Write);
            RandomAccess.SetLength(handle, Small);
        }
        else
        {
            SparseFileBuilder.Write(file, Small, holes: false);
        }

        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file));

        Assert.Equal(hole ? 0 : Small, (await PopulatedAsync(server)).CopiedBytes);
        await client.SentAsync();
        await AssertReleasedAsync(client, HashFile(file));
    }

    [Theory(Timeout = 60_000)]
    [InlineData("no-descriptor", "The VMM sent no complete handshake within 0.5 s (* bytes, 0 descriptors so far).")]
    [InlineData("five-without-descriptor", "The handshake is refused: after 5 receives there are * bytes and no descriptor.")]
    [InlineData("two-descriptors", "The handshake is refused: 2 descriptors instead of one userfaultfd.")]
    [InlineData("nine-descriptors", "The handshake could not be received.")]
    [InlineData("no-userfaultfd", "The handshake is refused: its descriptor is no userfaultfd.")]
    [InlineData("malformed", "The handshake is refused: malformed JSON at byte 24.")]
    [InlineData("[]", "The handshake names no memory region.")]
    [InlineData("{}", "The handshake is refused: expected a JSON array of regions, found StartObject at byte 0.")]
    [InlineData("[5]", "The handshake is refused: region 0 is a Number, not an object.")]
    [InlineData("""[{"size":4096,"offset":0}]""", "The handshake is refused: *base_host_virt_addr*")]
    [InlineData("""[{"base_host_virt_addr":-4096,"size":4096,"offset":0}]""", "The handshake is refused: `base_host_virt_addr` of region 0 is no unsigned 64-bit number.")]
    [InlineData("""[{"base_host_virt_addr":4096,"size":0,"offset":0}]""", "The handshake's memory region 0 is refused: it is empty.")]
    [InlineData("""[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":3}]""", "The handshake's memory region 0 is refused: its page_size 3 is neither 4096 nor 2097152.")]
    [InlineData("""[{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0}]""", "The handshake's memory region 0 is refused: its address * overflows with size 8192.")]
    [InlineData("overlap", "The handshake's memory region 1 is refused: it overlaps region 0.")]
    [InlineData("outlying", "The handshake's memory region 0 is refused: it ends at byte 16781312 of a memory file of 16777216 bytes.")]
    [InlineData("misaligned", "The handshake's memory region 0 is refused: its address *200, size 16777216 or offset 0 is not a multiple of its page size 4096.")]
    [InlineData("unregistered", "Guest memory at * could not be placed: it is not registered with the userfaultfd that the VMM has sent (NotRegistered).")]
    [InlineData("ten-megabytes", "The handshake is refused: *")]
    [InlineData("silence", "The VMM sent no complete handshake within 0.5 s (0 bytes, 0 descriptors so far).")]
    [InlineData("close", "The VMM closed the handshake socket after 0 bytes and 0 descriptors.")]
    public async Task A_client_that_misbehaves_is_refused_in_bounded_time_and_memory_without_a_page_placed(string mode, string reason)
    {
        string file = MemoryFile(Small);
        var limit = TimeSpan.FromMilliseconds(mode is "no-descriptor" or "silence" ? 500 : 10_000);
        // Twice: what the first round loads (the runtime's own descriptors) is no leak.
        int before = 0;
        for (int round = 0; round < 2; round++)
        {
            before = OpenDescriptors.Count();
            PageServerException? told = null;
            var (client, connection) = await GuestMemoryClient.StartAsync(mode, Small);
            await using (client)
            {
                long start = Stopwatch.GetTimestamp(), allocated = GC.GetTotalAllocatedBytes();
                var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { HandshakeTimeLimit = limit, Failed = e => told = e });
                var refusal = await RefusedAsync(server);
                await server.DisposeAsync();

                Assert.InRange(Stopwatch.GetElapsedTime(start), TimeSpan.Zero, TimeSpan.FromSeconds(8));
                Assert.InRange(GC.GetTotalAllocatedBytes() - allocated, 0, 4 << 20);
                AssertMatches(reason, refusal.Message);
                Assert.Same(refusal, told);
                Assert.Equal(0, server.Progress.PlacedBytes);
                client.Kill();
            }
        }

        Assert.Equal(before, await OpenDescriptors.SettleAsync(before, TimeSpan.FromSeconds(5)));
    }

    [Fact(Timeout = 60_000)]
    public async Task Populations_leave_no_descriptor_and_no_mapping_behind()
    {
        string file = MemoryFile(Small);
        await RoundAsync();
        int before = OpenDescriptors.Count();
        for (int i = 0; i < 10; i++)
        {
            await RoundAsync();
        }

        Assert.Equal(before, await OpenDescriptors.SettleAsync(before, TimeSpan.FromSeconds(5)));
        Assert.DoesNotContain(file, await File.ReadAllTextAsync("/proc/self/maps", TestContext.Current.CancellationToken), StringComparison.Ordinal);

        async Task RoundAsync()
        {
            var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
            await using var _ = client;
            await using var server = PageServer.Start(connection, SparseFileSource.Open(file));
            await PopulatedAsync(server);
        }
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_died_after_its_handshake_is_reported()
    {
        var (client, connection) = await GuestMemoryClient.StartAsync("die", Small);
        await using var _ = client;
        client.WaitForExit();

        await using var server = PageServer.Start(connection, SparseFileSource.Open(MemoryFile(Small)));

        Assert.Equal(Gone, (await RefusedAsync(server)).Message);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_died_before_the_release_is_reported_even_when_there_was_nothing_to_copy()
    {
        string file = _directory["hole"];
        using (var handle = File.OpenHandle(file, FileMode.Create, FileAccess.Write))
        {
            RandomAccess.SetLength(handle, Small);
        }

        var (client, connection) = await GuestMemoryClient.StartAsync("die", Small);
        await using var _ = client;
        client.WaitForExit();

        await using var server = PageServer.Start(connection, SparseFileSource.Open(file));

        Assert.Equal(Gone, (await RefusedAsync(server)).Message);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_dies_in_the_middle_of_the_population_is_reported()
    {
        string file = MemoryFile(Large, holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Large);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = 1 });
        await UntilPlacedAsync(server);

        client.Kill();

        Assert.Equal(Gone, (await RefusedAsync(server)).Message);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_memory_file_that_is_truncated_during_the_population_is_named()
    {
        string file = MemoryFile(Large, holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Large);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = 2 });
        await UntilPlacedAsync(server);

        using (var handle = File.OpenHandle(file, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite))
        {
            RandomAccess.SetLength(handle, PageSize);
        }

        AssertMatches($"Memory file {file} could not be read at offset *: it was truncated while it was in use. Run `dh vm prepare --force`.", (await RefusedAsync(server)).Message);
    }

    [Theory]
    [InlineData("missing", "Memory file * cannot be opened: *")]
    [InlineData("empty", "Memory file * is 0 bytes long, which is no whole number of pages: it is truncated or no memory file.")]
    [InlineData("odd", "Memory file * is 5000 bytes long, which is no whole number of pages: it is truncated or no memory file.")]
    public void A_memory_file_that_is_none_is_refused(string kind, string reason)
    {
        string file = _directory[kind];
        if (kind != "missing")
        {
            File.WriteAllBytes(file, new byte[kind == "odd" ? 5000 : 0]);
        }

        AssertMatches(reason, Assert.Throws<PageServerException>(() => SparseFileSource.Open(file)).Message);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(4)]
    public async Task Pages_that_are_given_back_during_the_population_read_as_zeros(int workers)
    {
        string file = MemoryFile(Large, holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("remove", Large);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = workers });

        var result = await PopulatedAsync(server);
        await server.DisposeAsync();
        await client.SentAsync();
        Assert.InRange(await client.QuietAsync(), 1, long.MaxValue);

        // Every second 64 pages were given back at least once, and stay zero; the others are the file's.
        ulong[] expected = HashFile(file);
        for (int page = 0; page < expected.Length; page++)
        {
            expected[page] = page / 64 % 2 == 1 ? ZeroPage : expected[page];
        }

        AssertSame(expected, await client.HashPagesAsync());
        Assert.Equal(Large, result.CopiedBytes + result.ZeroBytes);
        Assert.Equal(Large / PageSize, await client.DiscardAsync());
    }

    [Fact(Timeout = 90_000)]
    public async Task A_guest_that_never_stops_giving_pages_back_ends_in_bounded_time()
    {
        string file = MemoryFile(Small, holes: false);
        for (int round = 0; round < 5; round++)
        {
            var (client, connection) = await GuestMemoryClient.StartAsync("storm", Small);
            await using var _ = client;
            var server = PageServer.Start(connection, SparseFileSource.Open(file));
            try
            {
                // Three threads in madvise leave hardly a moment in which the kernel accepts copies: both ends are right.
                await PopulatedAsync(server);
            }
            catch (PageServerException e)
            {
                AssertMatches("The kernel refused to place pages for 5 s (EAGAIN): the VMM's memory keeps changing.", e.Message);
                client.Kill();
                await server.DisposeAsync();
                continue;
            }

            // The threads inside madvise at the release must come out, although the VMM keeps its userfaultfd open.
            await server.DisposeAsync();
            await client.SentAsync();
            await client.QuietAsync();
        }
    }

    [Theory(Timeout = 60_000)]
    [InlineData(true, "The page server was stopped before a VMM connected.")]
    [InlineData(false, "The page server was stopped before a VMM sent its handshake.")]
    public async Task A_server_may_be_disposed_before_the_handshake(bool listen, string reason)
    {
        string file = MemoryFile(Small), path = _directory["uffd.sock"];
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using var _ = theirs;
        using var unused = ours;
        var server = listen ? PageServer.Listen(path, SparseFileSource.Open(file)) : PageServer.Start(ours, SparseFileSource.Open(file));
        var waiting = server.WaitPopulatedAsync(TestContext.Current.CancellationToken);

        await server.DisposeAsync().AsTask().WaitAsync(Bound, TestContext.Current.CancellationToken);
        await server.DisposeAsync();

        Assert.Equal(reason, (await Assert.ThrowsAsync<PageServerException>(() => waiting)).Message);
        Assert.False(File.Exists(path));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_server_may_be_disposed_in_the_middle_of_the_population()
    {
        string file = MemoryFile(Large, holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Large);
        await using var _ = client;
        var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Workers = 1 });
        await UntilPlacedAsync(server);

        await server.DisposeAsync().AsTask().WaitAsync(Bound, TestContext.Current.CancellationToken);

        Assert.Equal("The page server was stopped before guest memory was populated.", (await RefusedAsync(server)).Message);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_directory_that_goes_first_does_not_disturb_the_server()
    {
        string file = MemoryFile(Small), run = _directory["run"];
        Directory.CreateDirectory(run);
        var server = PageServer.Listen(Path.Combine(run, "uffd.sock"), SparseFileSource.Open(file));

        Directory.Delete(run, recursive: true);

        await server.DisposeAsync().AsTask().WaitAsync(Bound, TestContext.Current.CancellationToken);
    }

    [Fact(Timeout = 60_000)]
    public async Task Nobody_who_connects_in_time_is_reported()
    {
        string path = _directory["uffd.sock"];
        await using var server = PageServer.Listen(path, SparseFileSource.Open(MemoryFile(Small)), new PageServerOptions { HandshakeTimeLimit = TimeSpan.FromMilliseconds(200) });

        Assert.Equal($"No VMM connected to {path} within 0.2 s.", (await RefusedAsync(server)).Message);
    }

    [Fact]
    public void A_socket_path_that_is_too_long_is_refused()
    {
        string path = _directory[new string('x', 108 - _directory.Path.Length - 1)];
        Assert.Equal(108, path.Length);

        var refusal = Assert.Throws<PageServerException>(() => PageServer.Listen(path, SparseFileSource.Open(MemoryFile(Small))));

        Assert.Equal($"Socket path {path} has 108 bytes; a unix socket takes 1 to 107: use a shorter or a relative path.", refusal.Message);
    }

    [Fact]
    public async Task The_longest_socket_path_is_accepted()
    {
        string path = _directory[new string('x', 107 - _directory.Path.Length - 1)];
        await using var server = PageServer.Listen(path, SparseFileSource.Open(MemoryFile(Small)));
        Assert.True(File.Exists(path));
    }

    [Fact]
    public void A_socket_path_that_is_taken_is_refused_and_left_alone()
    {
        string path = _directory.Write("taken", "precious");

        var refusal = Assert.Throws<PageServerException>(() => PageServer.Listen(path, SparseFileSource.Open(MemoryFile(Small))));

        Assert.Equal($"Listening on {path} failed: Address already in use. Is another page server there, or a socket that one left behind?", refusal.Message);
        Assert.Equal("precious", File.ReadAllText(path));
    }

    [Fact(Timeout = 60_000)]
    public async Task Cancelling_the_wait_does_not_end_the_population()
    {
        string file = MemoryFile(Small);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file));

        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => server.WaitPopulatedAsync(new CancellationToken(canceled: true)));

        await PopulatedAsync(server);
    }

    public void Dispose() => _directory.Dispose();

    private static Task<PopulationResult> PopulatedAsync(PageServer server) =>
        server.WaitPopulatedAsync(TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken);

    private static Task<PageServerException> RefusedAsync(PageServer server) => Assert.ThrowsAsync<PageServerException>(() => PopulatedAsync(server));

    private static async Task UntilPlacedAsync(PageServer server)
    {
        long start = Stopwatch.GetTimestamp();
        while (server.Progress.PlacedBytes == 0)
        {
            Assert.InRange(Stopwatch.GetElapsedTime(start), TimeSpan.Zero, Bound);
            await Task.Yield();
        }

        Assert.InRange(server.Progress.PlacedBytes, 1, server.Progress.PlannedBytes - 1);
    }

    /// <summary>Memory is the file's, and needs no page server: holes can be written, and everything given back and touched again.</summary>
    private static async Task AssertReleasedAsync(GuestMemoryClient client, ulong[] expected)
    {
        AssertSame(expected, await client.HashPagesAsync());
        Assert.Equal(expected.Length, await client.TouchAsync());
        Assert.Equal(expected.Length, await client.DiscardAsync());
    }

    /// <summary>Compares with a pattern in which `*` stands for anything.</summary>
    private static void AssertMatches(string pattern, string actual) =>
        Assert.Matches("^" + System.Text.RegularExpressions.Regex.Escape(pattern).Replace("\\*", ".*", StringComparison.Ordinal) + "$", actual);

    private string MemoryFile(long length, bool holes = true) => SparseFileBuilder.Write(_directory["memory"], length, holes: holes);

    /// <summary>A memory file of which every other page of the data is one byte repeated.</summary>
    private string CompressibleMemoryFile()
    {
        string path = MemoryFile(Small);
        using var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite);
        byte[] page = new byte[PageSize];
        foreach (var extent in SparseFile.GetDataExtents(file, Small))
        {
            for (long at = extent.Offset; at < extent.End; at += 2 * PageSize)
            {
                page.AsSpan().Fill((byte)((at / PageSize % 255) + 1));
                RandomAccess.Write(file, page, at);
            }
        }

        return path;
    }

    private static long DataBytes(string path)
    {
        using var file = File.OpenHandle(path);
        return SparseFile.GetDataExtents(file, RandomAccess.GetLength(file)).Sum(extent => extent.Length);
    }
}
