using System.Text.Json;
using System.Text.Json.Nodes;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.Tests.Snapshots;

/// <summary>A manifest is read as it was written, and nothing else is taken for one.</summary>
public sealed class SnapshotManifestTests
{
    private static readonly SnapshotManifest Manifest = new()
    {
        SchemaVersion = 1,
        Id = "20261126T101500-0123abcd",
        Template = "tëmplate \"quoted\"",
        ImageHash = "image",
        Version = "41.1",
        Vmm = "firecracker",
        VmmVersion = "1.16.1",
        SnapshotVersion = "9.0.0",
        MachineHash = "machine",
        Accelerator = Accelerator.Kvm,
        MemoryMib = 2048,
        Cpus = 2,
        TscKhz = 2_445_428,
        Balloon = true,
        DataBytes = 5L << 30,
        BootSeconds = 45.25,
        CreatedAt = new DateTimeOffset(2026, 11, 26, 10, 15, 0, 123, TimeSpan.FromHours(2)),
        RunnerProtocol = 2,
        DhVersion = "0.1.0",
        Files = new Dictionary<string, SnapshotFile> { ["memory"] = new(2L << 30, "0011223344556677"), ["state"] = new(69_404, "8899aabbccddeeff") },
    };

    [Theory]
    [InlineData("9.0.0")]
    [InlineData(null)]
    public void It_is_read_as_it_was_written(string? snapshotVersion)
    {
        var written = Manifest with { SnapshotVersion = snapshotVersion };
        var read = SnapshotManifest.Parse(written.ToJson());
        Assert.NotNull(read);
        Assert.Equal(written.Files, read.Files);
        Assert.Equal(16, read.Checksum?.Length);
        Assert.Equal(written, read with { Files = written.Files, Checksum = null });
    }

    [Fact]
    public void Each_member_must_be_there_and_be_what_it_should()
    {
        string[] optional = ["snapshot_version", "balloon"];
        var whole = JsonNode.Parse(Manifest.ToJson())!.AsObject();
        Assert.True(whole.Remove("checksum")); // which would not fit any more
        Assert.NotNull(Parse(whole));
        foreach (string name in whole.Select(member => member.Key).ToArray())
        {
            var without = whole.DeepClone().AsObject();
            without.Remove(name);
            Assert.Equal(optional.Contains(name), IsManifest(without));

            var other = whole.DeepClone().AsObject();
            other[name] = new JsonArray();
            Assert.False(IsManifest(other), name);
        }
    }

    [Theory]
    [InlineData("new_member")]
    [InlineData("Template")]
    public void A_member_that_is_not_known_is_refused(string name)
    {
        var more = JsonNode.Parse(Manifest.ToJson())!.AsObject();
        more.Remove("checksum");
        more[name] = "value";
        Assert.False(IsManifest(more));

        more.Remove(name);
        more["files"]!["memory"]![name] = "value";
        Assert.False(IsManifest(more));
    }

    private static SnapshotManifest? Parse(JsonObject json) => SnapshotManifest.Parse(JsonSerializer.SerializeToUtf8Bytes(json));

    private static bool IsManifest(JsonObject json)
    {
        try
        {
            return Parse(json) is not null;
        }
        catch (JsonException)
        {
            return false;
        }
    }
}
