using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.Tests.Snapshots;

/// <summary>A snapshot is restored only where it fits; the refusal names both values.</summary>
public sealed class RestoreHostTests
{
    private const string Qemu = "/usr/bin/qemu-system-x86_64";

    private static readonly SnapshotManifest Manifest = new()
    {
        SchemaVersion = SnapshotManifest.CurrentSchemaVersion,
        Id = "id",
        Template = "python",
        ImageHash = "image",
        Version = "3.11",
        Vmm = "qemu",
        VmmVersion = "7.2.22",
        MachineHash = "machine",
        Accelerator = Accelerator.Tcg,
        MemoryMib = 64,
        Cpus = 1,
        TscKhz = 2_000_000,
        DataBytes = 0,
        BootSeconds = 1,
        CreatedAt = DateTimeOffset.UnixEpoch,
        RunnerProtocol = 1,
        DhVersion = "0.1.0",
        Files = new Dictionary<string, SnapshotFile>(),
    };

    private static readonly RestoreHost Host = new(Qemu, new Version(7, 2, 22), null, "machine", 2_000_000);

    [Fact]
    public void Where_it_was_made_it_fits() => Assert.Null(Host.Refuses(Manifest));

    [Theory]
    [InlineData("7.2")]
    [InlineData("7.2.1")]
    [InlineData("7.2.99")]
    public void A_patch_of_the_VMM_changes_nothing(string version) => Assert.Null((Host with { VmmVersion = Version.Parse(version) }).Refuses(Manifest));

    [Theory]
    [InlineData("7.1.22")]
    [InlineData("7.3.0")]
    [InlineData("10.2.0")]
    public void Another_version_of_the_VMM_is_refused(string version) => Assert.Equal(
        $"it was made with qemu 7.2.22 (vmm_version), {Qemu} is {version}", (Host with { VmmVersion = Version.Parse(version) }).Refuses(Manifest));

    [Fact]
    public void A_manifest_without_a_version_is_refused() => Assert.Equal(
        $"it was made with qemu new (vmm_version), {Qemu} is 7.2.22", Host.Refuses(Manifest with { VmmVersion = "new" }));

    [Fact]
    public void Snapshots_with_a_version_of_their_own_fit_other_versions_of_the_VMM()
    {
        var manifest = Manifest with { Vmm = "firecracker", VmmVersion = "1.13.1", SnapshotVersion = "8.0.0" };
        Assert.Null((Host with { VmmPath = "/usr/bin/firecracker", VmmVersion = new Version(1, 14, 0), SnapshotVersion = new Version(8, 0, 0) }).Refuses(manifest));
        Assert.Equal(
            "it was made with firecracker 1.13.1, whose snapshots have version 8.0.0 (snapshot_version); /usr/bin/firecracker 1.15.0 reads version 9.0.0",
            (Host with { VmmPath = "/usr/bin/firecracker", VmmVersion = new Version(1, 15, 0), SnapshotVersion = new Version(9, 0, 0) }).Refuses(manifest));
    }

    [Fact]
    public void Another_machine_is_refused() => Assert.Equal(
        "it was made for the machine machine (machine_hash, by dh 0.1.0), this dh makes other", (Host with { MachineHash = "other" }).Refuses(Manifest));

    [Theory]
    [InlineData(1_998_000)]
    [InlineData(2_000_001)]
    [InlineData(2_002_000)]
    public void Two_calibrations_of_one_TSC_are_the_same(long khz) => Assert.Null((Host with { TscKhz = khz }).Refuses(Manifest));

    [Theory]
    [InlineData(1_997_999)]
    [InlineData(2_002_001)]
    [InlineData(2_445_424)]
    public void Another_TSC_is_refused(long khz) => Assert.Equal(
        $"it was made on a host with a TSC of 2000000 kHz (tsc_khz), this host's has {khz} kHz", (Host with { TscKhz = khz }).Refuses(Manifest));

    [Fact]
    public void Under_KVM_the_TSC_does_not_matter() => Assert.Null((Host with { TscKhz = null }).Refuses(Manifest with { Accelerator = Accelerator.Kvm }));

    [Fact]
    public async Task A_restore_is_refused_before_anything_is_started()
    {
        using var directory = new TempDir();
        using var home = new TempDir();
        var files = new Dictionary<string, SnapshotFile>();
        foreach (string name in (string[])[Snapshot.MemoryName, Snapshot.StateName, Snapshot.RootDiskName, Snapshot.KernelName, Snapshot.InitrdName])
        {
            string path = directory.Write(name, "");
            using (var stream = new FileStream(path, FileMode.Open))
            {
                stream.SetLength(name == Snapshot.MemoryName ? 64 << 20 : 1);
            }

            files[name] = Snapshot.Describe(path);
        }

        var manifest = Manifest with { Files = files, VmmVersion = "0.0.1" };
        await File.WriteAllBytesAsync(directory[Snapshot.ManifestName], manifest.ToJson(), TestContext.Current.CancellationToken);

        var options = new SandboxOptions { Home = new DhHome(home.Path), Installation = new Installation(Repository.PathOf("bin")) };
        var error = await Assert.ThrowsAsync<DhException>(() => Sandbox.RestoreAsync(Snapshot.Open(directory.Path), options, TestContext.Current.CancellationToken));
        Assert.Equal(DhErrorReason.Snapshot, error.Reason);
        Assert.StartsWith($"Snapshot {directory.Path} does not fit this host: it was made with qemu 0.0.1 (vmm_version), ", error.Message, StringComparison.Ordinal);
        Assert.EndsWith(". Run `dh vm prepare --force` to make a new snapshot.", error.Message, StringComparison.Ordinal);
        Assert.False(Directory.Exists(options.Home.RunDirectory));
    }
}
