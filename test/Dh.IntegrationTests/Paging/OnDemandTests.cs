using System.Diagnostics;
using System.Globalization;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;
using static Dh.IntegrationTests.Paging.PageHashes;

namespace Dh.IntegrationTests.Paging;

/// <summary>Guests that are served on demand, and the working sets that spare them most of it.</summary>
public sealed class OnDemandTests : IDisposable
{
    private const long Small = 16 << 20;
    private const int BlockSize = 64 << 10;
    private const string Id = "on-demand";

    /// <summary>Above all that a loaded machine needs, far below the tests' own time limit.</summary>
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();

    [Theory(Timeout = 60_000)]
    [InlineData("normal", 1)]
    [InlineData("two-regions", 2)]
    public async Task Prefetch_brings_exactly_the_working_set_and_serves_the_rest_on_demand(string mode, int workers)
    {
        string file = MemoryFile(holes: false);
        long[] offsets = [40 * PageSize, 41 * PageSize, 3000L * PageSize, 7 * PageSize, 2048L * PageSize, 2047L * PageSize];
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, Source(file, offsets), new PageServerOptions { Policy = PopulationPolicy.Prefetch, Workers = workers });

        var result = await PopulatedAsync(server);
        await client.SentAsync();

        Assert.Null(result.Warning);
        Assert.Equal((offsets.Length * PageSize, Small - (offsets.Length * PageSize)), (result.CopiedBytes, result.OnDemandBytes));
        Assert.Equal(new PopulationProgress(result.CopiedBytes, result.CopiedBytes), server.Progress);
        byte[] memory = await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken);
        foreach (long offset in offsets)
        {
            Assert.Equal(Hash(memory.AsSpan((int)offset, PageSize)), await client.ReadAsync(offset, PageSize));
        }

        Assert.Equal(new PageServerStatistics(result.CopiedBytes, 0, 0, 0), server.Statistics);
        Assert.Equal(Hash(memory.AsSpan(8 * PageSize, PageSize)), await client.ReadAsync(8 * PageSize, PageSize));
        await AssertSoonAsync(1, () => server.Statistics.Faults);
        AssertSame(HashPages(memory), await client.HashPagesAsync());
        await AssertSoonAsync(Small, () => server.Statistics.CopiedBytes);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("normal", 1)]
    [InlineData("two-regions", 2)]
    public async Task Holes_that_were_written_come_as_zeros_with_the_working_set(string mode, int workers)
    {
        // Data in pages 0 to 9 and 40 to 49, then a hole to the end of memory.
        string file = _directory["memory"];
        using (var handle = File.OpenHandle(file, FileMode.CreateNew, FileAccess.Write))
        {
            RandomAccess.SetLength(handle, Small);
            byte[] data = [.. Enumerable.Repeat((byte)7, 10 * PageSize)];
            await RandomAccess.WriteAsync(handle, data, 0, TestContext.Current.CancellationToken);
            await RandomAccess.WriteAsync(handle, data, 40 * PageSize, TestContext.Current.CancellationToken);
        }

        long[] written = [8 * PageSize, 9 * PageSize, 10 * PageSize, 11 * PageSize, 39 * PageSize, 40 * PageSize, 3000L * PageSize, 2047L * PageSize, 2048L * PageSize];
        WorkingSet.Combine(Id, Small, [[0]], [written]).WriteTo(_directory["working-set"], file);
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, Small);
        await using var _ = client;
        await using var server = PageServer.Start(
            connection, WorkingSetSource.Open(SparseFileSource.Open(file), _directory["working-set"], Id), new PageServerOptions { Policy = PopulationPolicy.Prefetch, Workers = workers });

        var result = await PopulatedAsync(server);
        await client.SentAsync();

        Assert.Equal((1 + 6) * PageSize, result.CopiedBytes); // page 0, and what was written of the holes
        Assert.Equal(19 * PageSize, result.OnDemandBytes);
        AssertSame(HashFile(file), await client.HashPagesAsync());
    }

    [Fact(Timeout = 60_000)]
    public async Task Holes_are_settled_before_the_guest_asks_for_them()
    {
        string file = MemoryFile(); // holes of 1 to 300 pages: shorter and longer than what is given back
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Policy = PopulationPolicy.Lazy });
        var result = await PopulatedAsync(server);
        await client.SentAsync();
        await AssertSoonAsync(ShortHoles(file), () => server.Statistics.ZeroedBytes);

        AssertSame(HashFile(file), await client.HashPagesAsync());

        // All faults were those of data.
        await AssertSoonAsync(Small - result.ZeroBytes, () => server.Statistics.CopiedBytes);
        Assert.Equal(ShortHoles(file), server.Statistics.ZeroedBytes);
        Assert.InRange(server.Statistics.Faults, 1, (Small - result.ZeroBytes) / PageSize);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Lazy)]
    [InlineData(PopulationPolicy.Prefetch)]
    public async Task A_filled_guest_is_released_and_needs_no_server(PopulationPolicy policy)
    {
        string file = MemoryFile();
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        var server = PageServer.Start(connection, Source(file, [0, 9 * PageSize]), new PageServerOptions { Policy = policy, Fill = true });

        await PopulatedAsync(server);
        Assert.Equal(PageServerEnd.Released, await server.Completion.WaitAsync(Bound, TestContext.Current.CancellationToken));
        await server.DisposeAsync();

        await client.SentAsync();
        AssertSame(HashFile(file), await client.HashPagesAsync());
        Assert.Equal(Small / PageSize, await client.TouchAsync());
        Assert.Equal(Small / PageSize, await client.DiscardAsync());
    }

    [Fact(Timeout = 60_000)]
    public async Task A_recording_has_the_touched_pages_in_their_order_until_it_is_stopped()
    {
        string file = MemoryFile(holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Policy = PopulationPolicy.Lazy, Record = true });
        await PopulatedAsync(server);
        await client.SentAsync();

        await client.ReadAsync(100 * PageSize, PageSize);
        await client.WriteAsync(3 * PageSize, PageSize);
        await client.ReadAsync(101 * PageSize, PageSize);
        await client.ReadAsync(3 * PageSize, PageSize);
        await client.WriteAsync(100 * PageSize, PageSize);
        await client.RemoveAsync(200 * PageSize, PageSize);
        await client.ReadAsync(200 * PageSize, PageSize);
        TouchedPage[] touched = [new(100 * PageSize, false), new(3 * PageSize, true), new(101 * PageSize, false)];
        await AssertSoonAsync(3 * PageSize, () => server.Statistics.CopiedBytes);
        Assert.Equal(touched, server.StopRecording());

        await client.ReadAsync(1024 * PageSize, PageSize);
        await AssertSoonAsync((3 * PageSize) + BlockSize, () => server.Statistics.CopiedBytes);
        Assert.Equal(touched, server.StopRecording());
    }

    [Theory(Timeout = 60_000)]
    [InlineData("corrupt", PopulationPolicy.Prefetch, 1)]
    [InlineData("corrupt", PopulationPolicy.Prefetch, 4)]
    [InlineData("corrupt", PopulationPolicy.Lazy, 1)]
    [InlineData("cut", PopulationPolicy.Prefetch, 1)]
    [InlineData("cut", PopulationPolicy.Prefetch, 4)]
    [InlineData("cut", PopulationPolicy.Lazy, 1)]
    [InlineData("cut-when-checked", PopulationPolicy.Prefetch, 1)]
    [InlineData("cut-when-checked", PopulationPolicy.Prefetch, 4)]
    [InlineData("cut-when-checked", PopulationPolicy.Lazy, 1)]
    public async Task A_damaged_working_set_is_a_warning_and_memory_is_right(string damage, PopulationPolicy policy, int workers)
    {
        string file = MemoryFile(), workingSet = _directory["working-set"];
        long[] offsets = [.. Enumerable.Range(2000, 1000).Concat(Enumerable.Range(0, 1000)).Select(page => (long)page * PageSize)];
        var source = Source(file, offsets);
        if (damage == "cut-when-checked")
        {
            source.ReadAhead(() => false);
        }

        File.SetUnixFileMode(workingSet, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        using (var handle = File.OpenHandle(workingSet, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite))
        {
            long length = RandomAccess.GetLength(handle);
            if (damage == "corrupt")
            {
                for (long at = length - PageSize; at > length / 2; at -= 25 * PageSize)
                {
                    RandomAccess.Write(handle, "damage"u8, at);
                }
            }
            else
            {
                RandomAccess.SetLength(handle, length / 2);
            }
        }

        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, source, new PageServerOptions { Policy = policy, Workers = workers, Failed = _ => client.Kill() });

        var result = await PopulatedAsync(server);
        await client.SentAsync();
        if (policy == PopulationPolicy.Prefetch)
        {
            Assert.StartsWith($"Working set {workingSet} cannot be used: ", result.Warning, StringComparison.Ordinal);
        }

        AssertSame(HashFile(file), await client.HashPagesAsync());
    }

    [Fact(Timeout = 60_000)]
    public async Task A_memory_file_that_is_truncated_under_a_guest_ends_the_server_with_its_name()
    {
        string file = MemoryFile(holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        PageServer? owned = null;
        PageServerException? told = null, known = null;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions
        {
            Policy = PopulationPolicy.Lazy,
            Failed = failure =>
            {
                (told, known) = (failure, owned!.Failure);
                client.Kill();
            },
        });
        owned = server;
        await PopulatedAsync(server);
        await client.SentAsync();

        Cut(file);
        await Assert.ThrowsAnyAsync<IOException>(() => client.ReadAsync(Small - PageSize, PageSize));

        var failure = await FailedAsync(server);
        Assert.Same(failure, told);
        Assert.Same(failure, known); // before the VMM's death: who sees that first must find its cause
        Assert.Equal($"Memory file {file} could not be read at offset {Small - BlockSize}: it was truncated while it was in use. Run `dh vm prepare --force`.", failure.Message);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_VMM_that_is_killed_while_it_is_served_ends_the_server_at_once(bool listen)
    {
        await using var vmm = await ServedAsync(listen);
        long start = Stopwatch.GetTimestamp();

        vmm.Client.Kill();

        Assert.Equal(PageServerEnd.VmmEnded, await vmm.Server.Completion.WaitAsync(Bound, TestContext.Current.CancellationToken));
        Assert.InRange(Stopwatch.GetElapsedTime(start), TimeSpan.Zero, TimeSpan.FromSeconds(2));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_listening_server_that_fails_kills_its_VMM()
    {
        bool ended = false;
        await using var vmm = await ServedAsync(listen: true, client => ended = client().HasEnded(Bound));

        Cut(_directory["memory"]);
        await Assert.ThrowsAnyAsync<IOException>(() => vmm.Client.ReadAsync(0, PageSize));

        await FailedAsync(vmm.Server);
        Assert.True(ended, "the VMM was still there when the failure was told");
    }

    [Fact(Timeout = 60_000)]
    public async Task A_listening_server_that_is_disposed_kills_the_VMM_that_needs_it()
    {
        await using var vmm = await ServedAsync(listen: true);

        await vmm.Server.DisposeAsync();

        Assert.Equal(PageServerEnd.Stopped, await vmm.Server.Completion);
        Assert.True(vmm.Client.HasEnded(Bound), "the VMM is still there");
    }

    [Fact(Timeout = 60_000)]
    public async Task A_callback_that_throws_is_told_with_the_failure()
    {
        await using var vmm = await ServedAsync(listen: true, _ => throw new InvalidOperationException("the callback is broken"));

        Cut(_directory["memory"]);
        await Assert.ThrowsAnyAsync<IOException>(() => vmm.Client.ReadAsync(0, PageSize));

        var failure = await FailedAsync(vmm.Server);
        Assert.EndsWith("Then the VMM could not be ended: the callback is broken", failure.Message, StringComparison.Ordinal);
        Assert.StartsWith($"Memory file {_directory["memory"]} could not be read at offset 0", failure.Message, StringComparison.Ordinal);
        Assert.Contains(Assert.IsType<AggregateException>(failure.InnerException).InnerExceptions, inner => inner is InvalidOperationException);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Lazy)]
    [InlineData(PopulationPolicy.Prefetch)]
    public async Task A_VMM_that_makes_its_userfaultfd_blocking_is_served_all_the_same(PopulationPolicy policy)
    {
        string file = MemoryFile();
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        var server = PageServer.Start(connection, Source(file, [0]), new PageServerOptions { Policy = policy });
        await PopulatedAsync(server);
        await client.SentAsync();
        for (int round = 0; round < 20; round++)
        {
            await client.BlockAsync();
            await client.ReadAsync(round * 37 * PageSize, PageSize);
        }

        // poll(2) reports a blocking one as an error at once, again and again: the server must not turn round and round.
        var before = ServerThreads().Time;
        await Task.Delay(500, TestContext.Current.CancellationToken);
        Assert.InRange(ServerThreads().Time - before, TimeSpan.Zero, TimeSpan.FromMilliseconds(100));
        await client.BlockAsync();
        AssertSame(HashFile(file), await client.HashPagesAsync());
        await client.BlockAsync();
        await server.DisposeAsync().AsTask().WaitAsync(Bound, TestContext.Current.CancellationToken);
        Assert.Equal(PageServerEnd.Stopped, await server.Completion);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_talks_without_end_after_its_handshake_is_refused()
    {
        await using var vmm = await ServedAsync(listen: false, client => client().Kill());

        await Assert.ThrowsAnyAsync<IOException>(async () => Assert.InRange(await vmm.Client.ChatterAsync(), 0, (1 << 20) - 1));

        Assert.Equal("The VMM sent more than 65536 bytes after its handshake.", (await FailedAsync(vmm.Server)).Message);
    }

    /// <summary>REMOVE_COUNT sets their number: 100,000 here, a million in <c>make chaos</c>.</summary>
    [Fact(Timeout = 300_000)]
    public async Task Pages_that_are_given_back_without_end_cost_no_memory()
    {
        const long AtOnce = 10_000;
        const long MaxResidentGrowth = 16 << 20;
        long count = long.Parse(Environment.GetEnvironmentVariable("REMOVE_COUNT") ?? "100000", CultureInfo.InvariantCulture);
        string file = MemoryFile(holes: false);
        var (client, connection) = await GuestMemoryClient.StartAsync("normal", Small);
        await using var _ = client;
        await using var server = PageServer.Start(connection, SparseFileSource.Open(file), new PageServerOptions { Policy = PopulationPolicy.Lazy });
        await PopulatedAsync(server);
        await client.SentAsync();
        Assert.Equal(AtOnce, await client.ChurnAsync(AtOnce)); // what the first events load stays
        long before = Environment.WorkingSet;
        for (long done = 0; done < count; done += AtOnce)
        {
            Assert.Equal(AtOnce, await client.ChurnAsync(AtOnce));
        }

        Assert.InRange(Environment.WorkingSet - before, long.MinValue, MaxResidentGrowth);
        ulong[] hashes = await client.HashPagesAsync();
        Assert.Equal(HashFile(file)[1..], hashes[1..]);
        Assert.NotEqual(HashFile(file)[0], hashes[0]); // zeros
    }

    [Fact(Timeout = 60_000)]
    public async Task An_idle_server_takes_no_processor_time()
    {
        await using var vmm = await ServedAsync(listen: false);
        await vmm.Client.ReadAsync(0, PageSize);
        await Task.Delay(100, TestContext.Current.CancellationToken);
        var (threads, before) = ServerThreads();
        Assert.InRange(threads, 1, int.MaxValue);

        await Task.Delay(1000, TestContext.Current.CancellationToken);

        Assert.InRange(ServerThreads().Time - before, TimeSpan.Zero, TimeSpan.FromMilliseconds(2));
        await vmm.Client.ReadAsync(Small - PageSize, PageSize);
    }

    public void Dispose() => _directory.Dispose();

    private static Task<PopulationResult> PopulatedAsync(PageServer server) =>
        server.WaitPopulatedAsync(TestContext.Current.CancellationToken).WaitAsync(Bound, TestContext.Current.CancellationToken);

    private static Task<PageServerException> FailedAsync(PageServer server) =>
        Assert.ThrowsAsync<PageServerException>(() => server.Completion.WaitAsync(Bound, TestContext.Current.CancellationToken));

    /// <summary>A page is counted when it is in place: the client may have seen it a moment before.</summary>
    private static async Task AssertSoonAsync(long expected, Func<long> actual)
    {
        for (long start = Stopwatch.GetTimestamp(); actual() < expected && Stopwatch.GetElapsedTime(start) < TimeSpan.FromSeconds(2);)
        {
            await Task.Delay(5, TestContext.Current.CancellationToken);
        }

        Assert.Equal(expected, actual());
    }

    private static void Cut(string file)
    {
        using var handle = File.OpenHandle(file, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite);
        RandomAccess.SetLength(handle, 0);
    }

    /// <summary>This process's threads of page servers, and the time that they have run (proc_pid_schedstat(5): nanoseconds on a processor).</summary>
    private static (int Count, TimeSpan Time) ServerThreads()
    {
        string[] tasks = [.. Directory.GetDirectories("/proc/self/task").Where(task => File.ReadAllText(Path.Combine(task, "comm")).StartsWith("dh page", StringComparison.Ordinal))];
        long nanoseconds = tasks.Sum(task => long.Parse(File.ReadAllText(Path.Combine(task, "schedstat")).Split(' ')[0], CultureInfo.InvariantCulture));
        return (tasks.Length, TimeSpan.FromMicroseconds(nanoseconds / 1000.0));
    }

    /// <summary>Bytes in holes of less than 64 KiB.</summary>
    private static long ShortHoles(string file)
    {
        using var source = SparseFileSource.Open(file);
        long bytes = 0, end = 0;
        foreach (var extent in source.DataExtents.Append(new FileExtent(source.Length, 0)))
        {
            bytes += extent.Offset - end < 64 << 10 ? extent.Offset - end : 0;
            end = extent.End;
        }

        return bytes;
    }

    private string MemoryFile(bool holes = true) => SparseFileBuilder.Write(_directory["memory"], Small, holes: holes);

    private WorkingSetSource Source(string file, long[] offsets)
    {
        WorkingSet.Combine(Id, Small, [offsets], []).WriteTo(_directory["working-set"], file);
        return WorkingSetSource.Open(SparseFileSource.Open(file), _directory["working-set"], Id);
    }

    /// <summary>A client and the server that serves all of its memory on demand.</summary>
    private async Task<ServedClient> ServedAsync(bool listen, Action<Func<GuestMemoryClient>>? failed = null)
    {
        string file = MemoryFile(holes: false), path = _directory["uffd.sock"];
        GuestMemoryClient? client = null;
        var options = new PageServerOptions { Policy = PopulationPolicy.Lazy, Failed = _ => failed?.Invoke(() => client!) };
        PageServer server;
        if (listen)
        {
            server = PageServer.Listen(path, SparseFileSource.Open(file), options);
            client = await GuestMemoryClient.ConnectAsync(path, "normal", Small);
        }
        else
        {
            (client, var socket) = await GuestMemoryClient.StartAsync("normal", Small);
            server = PageServer.Start(socket, SparseFileSource.Open(file), options);
        }

        await PopulatedAsync(server);
        await client.SentAsync();
        return new ServedClient(client, server);
    }

    private sealed record ServedClient(GuestMemoryClient Client, PageServer Server) : IAsyncDisposable
    {
        public async ValueTask DisposeAsync()
        {
            await Server.DisposeAsync();
            await Client.DisposeAsync();
        }
    }
}
