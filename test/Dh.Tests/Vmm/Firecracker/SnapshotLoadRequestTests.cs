using System.Text.Json;
using Dh.Vmm.Firecracker;

namespace Dh.Tests.Vmm.Firecracker;

/// <summary>A load request is what a version understands, to the letter; what it does not know is never sent.</summary>
public sealed class SnapshotLoadRequestTests
{
    private static readonly Version Newest = new(1, 17, 0);

    [Theory]
    [InlineData("1.16.1", SnapshotMemoryType.Uffd, "uffd.sock", false, """{"snapshot_path":"state","mem_backend":{"backend_type":"Uffd","backend_path":"uffd.sock"},"resume_vm":false}""")]
    [InlineData("1.1.0", SnapshotMemoryType.File, "memory", true, """{"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"},"resume_vm":true}""")]
    [InlineData("1.0.2", SnapshotMemoryType.File, "memory", true, """{"snapshot_path":"state","mem_file_path":"memory","resume_vm":true}""")]
    internal void It_has_one_kind_of_memory(string version, SnapshotMemoryType type, string path, bool resume, string json) =>
        Assert.Equal(json, Json(SnapshotLoadRequest.Of(Version.Parse(version), "state", type, path, resume)));

    [Fact]
    public void A_page_server_is_no_memory_of_old_versions()
    {
        var error = Assert.Throws<DhException>(() => SnapshotLoadRequest.Of(new Version(1, 0, 2), "state", SnapshotMemoryType.Uffd, "uffd.sock", false));
        Assert.Equal("Firecracker 1.0.2 cannot have its memory from a page server: that takes 1.1.0 or newer.", error.Message);
    }

    [Fact]
    public void Every_field_has_its_name()
    {
        var request = Request(Newest) with
        {
            NetworkOverrides = [new NetworkOverride("eth0", "tap7")],
            TrackDirtyPages = true,
            VsockOverride = new VsockOverride("w.sock"),
            ClockRealtime = true,
            HugePages = "2M",
        };
        Assert.Equal(
            """{"snapshot_path":"state","mem_backend":{"backend_type":"Uffd","backend_path":"uffd.sock"},"resume_vm":false,"network_overrides":[{"iface_id":"eth0","host_dev_name":"tap7"}],"track_dirty_pages":true,"vsock_override":{"uds_path":"w.sock"},"clock_realtime":true,"huge_pages":"2M"}""",
            Json(request.Checked(Newest)));
    }

    [Theory]
    [InlineData("network_overrides", "1.11.3", "1.12.0")]
    [InlineData("track_dirty_pages", "1.12.9", "1.13.0")]
    [InlineData("vsock_override", "1.16.0", "1.16.1")]
    [InlineData("clock_realtime", "1.15.1", "1.16.0")]
    [InlineData("huge_pages", "1.16.1", "1.17.0")]
    public void A_field_that_a_version_does_not_know_is_not_sent(string field, string before, string since)
    {
        var request = Request(Newest);
        request = field switch
        {
            "network_overrides" => request with { NetworkOverrides = [] },
            "track_dirty_pages" => request with { TrackDirtyPages = false },
            "vsock_override" => request with { VsockOverride = new VsockOverride("w.sock") },
            "clock_realtime" => request with { ClockRealtime = true },
            _ => request with { HugePages = "None" },
        };
        Assert.Same(request, request.Checked(Version.Parse(since)));
        var error = Assert.Throws<DhException>(() => request.Checked(Version.Parse(before)));
        Assert.Equal($"Firecracker {before} does not know `{field}` of PUT /snapshot/load: that takes {since} or newer.", error.Message);
    }

    [Fact]
    public void A_socket_that_nobody_could_find_is_refused() =>
        Assert.Throws<DhException>(() => (Request(Newest) with { VsockOverride = new VsockOverride("") }).Checked(Newest));

    [Fact]
    public void Huge_pages_without_a_page_server_are_refused() => Assert.Throws<DhException>(
        () => (SnapshotLoadRequest.Of(Newest, "state", SnapshotMemoryType.File, "memory", true) with { HugePages = "2M" }).Checked(Newest));

    private static SnapshotLoadRequest Request(Version version) => SnapshotLoadRequest.Of(version, "state", SnapshotMemoryType.Uffd, "uffd.sock", false);

    private static string Json(SnapshotLoadRequest request) => JsonSerializer.Serialize(request, FirecrackerJson.Default.SnapshotLoadRequest);
}
