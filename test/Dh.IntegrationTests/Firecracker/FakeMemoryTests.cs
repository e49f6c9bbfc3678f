using System.Text;
using System.Text.Json;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>The fake's guest memory: real mappings and a real userfaultfd behind the original's handshake, with this project's page server at the other end.</summary>
public sealed class FakeMemoryTests : IAsyncLifetime
{
    private const int Mib = 16;
    private const long Pages = (Mib << 20) / 4096;
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly FakeFirecracker _fake = new();
    private readonly TempDir _snapshot = new();

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    public async ValueTask InitializeAsync() => await _fake.MakeSnapshotAsync(_snapshot.Path, Mib);

    [Theory(Timeout = 60_000)]
    [InlineData(PopulationPolicy.Eager, "1.16.1", 1)]
    [InlineData(PopulationPolicy.Prefetch, "1.16.1", 1)]
    [InlineData(PopulationPolicy.Lazy, "1.16.1", 1)]
    [InlineData(PopulationPolicy.Eager, "1.16.1", 3)]
    [InlineData(PopulationPolicy.Lazy, "1.16.1", 3)]
    [InlineData(PopulationPolicy.Lazy, "1.13.0", 1)]
    public async Task Every_page_comes_back_as_it_was(PopulationPolicy policy, string version, int regions)
    {
        Play(version, regions == 3 ? ["split 2 5"] : []);
        using var process = await _fake.StartAsync();
        await using var server = Serve(process, policy);
        using var api = process.Connect();
        var load = api.AskAsync("PUT", "/snapshot/load", Load);
        var population = await server.WaitPopulatedAsync(Cancellation).WaitAsync(Bound, Cancellation);
        Assert.Equal((policy, regions, (long)Mib << 20), (population.Policy, population.RegionCount, population.TotalBytes));
        Assert.Equal(204, (await load).Status);
        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", """{"state":"Resumed"}""")).Status);
        var vcpu = await _fake.Guest.VcpuOfAsync(process.Id);
        Assert.Equal((Pages, 0), await vcpu.CheckAsync().WaitAsync(Bound, Cancellation));
        await vcpu.WriteAsync(1 << 20, 4 << 20);
        await vcpu.RemoveAsync(2 << 20, 1 << 20);
        Assert.Equal((Pages, 0), await vcpu.CheckAsync().WaitAsync(Bound, Cancellation));
        Assert.Equal(policy == PopulationPolicy.Eager, server.Completion.IsCompleted);
    }

    [Fact(Timeout = 60_000)]
    public async Task The_file_backend_maps_the_memory_file_privately()
    {
        byte[] before = await File.ReadAllBytesAsync(_snapshot["memory"], Cancellation);
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", $$$"""{"snapshot_path":"{{{_snapshot["state"]}}}","mem_backend":{"backend_type":"File","backend_path":"{{{_snapshot["memory"]}}}"},"resume_vm":true}""")).Status);
        var vcpu = await _fake.Guest.VcpuOfAsync(process.Id);
        await vcpu.WriteAsync(0, Mib << 20);
        Assert.Equal((Pages, 0), await vcpu.CheckAsync());
        Assert.Equal(before, await File.ReadAllBytesAsync(_snapshot["memory"], Cancellation));
    }

    [Fact(Timeout = 60_000)]
    public async Task Wrong_memory_is_found_out()
    {
        await using (var memory = File.OpenWrite(_snapshot["memory"]))
        {
            memory.Position = 5 << 20;
            await memory.WriteAsync(Encoding.ASCII.GetBytes("not what it was"), Cancellation);
        }

        using var process = await _fake.StartAsync();
        await using var server = Serve(process, PopulationPolicy.Eager);
        using var api = process.Connect();
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", Load)).Status);
        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", """{"state":"Resumed"}""")).Status);
        var vcpu = await _fake.Guest.VcpuOfAsync(process.Id);
        var found = await vcpu.CheckAsync();
        Assert.True(found == (Pages, 1), $"{found}, the first difference: {vcpu.FirstDifference}");
    }

    [Fact(Timeout = 60_000)]
    public async Task A_load_waits_for_its_pages_and_nothing_else_is_answered_meanwhile()
    {
        using var process = await _fake.StartAsync();
        using var listener = PageServer.Bind(Path.Combine(process.Directory, "uffd.sock"));
        using var api = process.Connect();
        using var other = process.Connect();
        var load = api.AskAsync("PUT", "/snapshot/load", Load);
        var accepted = await listener.AcceptAsync(Cancellation); // taken by nobody yet
        await other.SendAsync("GET", "/version");
        var version = other.HearAsync();
        Assert.NotSame(version, await Task.WhenAny(load, version, Task.Delay(500, Cancellation)));
        Assert.False(load.IsCompleted);
        await using var server = PageServer.StartAccepted(accepted, SparseFileSource.Open(_snapshot["memory"]), new PageServerOptions { Policy = PopulationPolicy.Lazy });
        Assert.Equal(204, (await load).Status);
        Assert.Equal(200, (await version)!.Status);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_load_whose_page_server_has_died_waits_for_ever_and_can_be_killed()
    {
        using var process = await _fake.StartAsync();
        using var listener = PageServer.Bind(Path.Combine(process.Directory, "uffd.sock"));
        using var api = process.Connect();
        var load = api.AskAsync("PUT", "/snapshot/load", Load);
        using (var accepted = await listener.AcceptAsync(Cancellation))
        {
            Assert.NotEqual(0, await accepted.ReceiveAsync(new byte[4096], Cancellation)); // the handshake, whose descriptor is dropped
        }

        await Assert.ThrowsAsync<TimeoutException>(() => load.WaitAsync(TimeSpan.FromMilliseconds(500), Cancellation));
        process.Kill();
        Assert.Equal(137, await process.WaitForExitAsync());
        await Assert.ThrowsAsync<EndOfStreamException>(() => load);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("handshake")]
    [InlineData("populating")]
    public async Task Its_death_is_the_end_of_the_handshakes_socket(string step)
    {
        Play("1.16.1", $"die {step}");
        using var process = await _fake.StartAsync();
        await using var server = Serve(process, PopulationPolicy.Lazy);
        using var api = process.Connect();
        await api.SendAsync("PUT", "/snapshot/load", Load);
        Assert.Equal(137, await process.WaitForExitAsync());
        var end = await Record.ExceptionAsync(() => server.Completion.WaitAsync(Bound, Cancellation));
        Assert.True(end is null ? await server.Completion == PageServerEnd.VmmEnded : end is PageServerException { PeerEnded: true }, $"{end}");
    }

    [Theory(Timeout = 60_000)]
    [InlineData("1.16.1", true, false)]
    [InlineData("1.10.1", false, true)]
    public async Task The_handshake_is_one_message_with_one_descriptor_in_the_words_of_its_version(string version, bool hasPageSize, bool closes)
    {
        Play(version, "split 6");
        await _fake.MakeSnapshotAsync(_snapshot.Path, Mib);
        using var process = await _fake.StartAsync();
        using var listener = PageServer.Bind(Path.Combine(process.Directory, "uffd.sock"));
        using var api = process.Connect();
        await api.SendAsync("PUT", "/snapshot/load", Load);
        using var accepted = await listener.AcceptAsync(Cancellation);
        Assert.True(Poll.Wait(accepted.SafeHandle, Bound));
        byte[] bytes = new byte[4096];
        List<Microsoft.Win32.SafeHandles.SafeFileHandle> descriptors = [];
        int length = FdPassing.Receive(accepted.SafeHandle, bytes, descriptors);
        using var userfaultfd = Assert.Single(descriptors);
        string text = Encoding.ASCII.GetString(bytes, 0, length);
        Assert.Matches("""^\[\{"base_host_virt_addr":\d+,"size":6291456,"offset":0,.*"page_size_kib":4096\},\{"base_host_virt_addr":\d+,"size":10485760,"offset":6291456,.*"page_size_kib":4096\}\]$""", text);
        Assert.Equal(hasPageSize, text.Contains("\"page_size\":4096,", StringComparison.Ordinal));
        using var json = JsonDocument.Parse(text);
        Assert.True(json.RootElement[1].GetProperty("base_host_virt_addr").GetUInt64() < json.RootElement[0].GetProperty("base_host_virt_addr").GetUInt64(), "the second region lies below the first");
        Assert.False(closes && process.HasExited);
    }

    public ValueTask DisposeAsync()
    {
        _fake.Dispose();
        _snapshot.Dispose();
        return ValueTask.CompletedTask;
    }

    private string Load => $$"""{"snapshot_path":"{{_snapshot["state"]}}","mem_backend":{"backend_type":"Uffd","backend_path":"uffd.sock"},"resume_vm":false}""";

    private void Play(string version, params string[] script) => _fake.Play([$"version {version}", "snapshot-version 10.0.0", .. script]);

    private PageServer Serve(FakeFirecrackerProcess process, PopulationPolicy policy)
    {
        IMemorySource source = SparseFileSource.Open(_snapshot["memory"]);
        if (policy == PopulationPolicy.Prefetch)
        {
            var set = WorkingSet.Combine("id", source.Length, [[.. source.DataExtents.Take(5).Select(extent => extent.Offset)]], []);
            set.WriteTo(_snapshot["working-set"], _snapshot["memory"]);
            source = WorkingSetSource.Open(source, _snapshot["working-set"], "id");
        }

        return PageServer.Listen(Path.Combine(process.Directory, "uffd.sock"), source, new PageServerOptions { Policy = policy });
    }
}
