using Dh.Guest;
using Dh.Paging;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>A snapshot that the Firecracker driver makes of a fake Firecracker's machine, with a working set.</summary>
internal static class FakeSnapshot
{
    private const int MemoryMib = 64;
    private const string Id = "20260101T000000-00000000";

    /// <summary>Boots a machine, saves it, and makes it the current snapshot of <c>python</c>.</summary>
    /// <param name="home">Where.</param>
    /// <param name="fake">Of whom.</param>
    /// <param name="cancellation">Gives up.</param>
    public static async Task MakeAsync(DhHome home, FakeFirecracker fake, CancellationToken cancellation = default)
    {
        var programs = new VmmPrograms { Firecracker = fake.ProgramPath };
        var driver = await VmmCandidate.FindAsync("firecracker", programs, DhHome.EnsurePrivate(home.CacheDirectory), cancellation);
        DhHome.EnsurePrivate(home.SnapshotsDirectory);
        var store = new SnapshotStore(home);
        string draft = store.CreateDraft(Id);
        string PathOf(string name) => Path.Combine(draft, name);
        await File.WriteAllTextAsync(PathOf(Snapshot.KernelName), "\u007fELF, and no more", cancellation);
        await File.WriteAllTextAsync(PathOf(Snapshot.InitrdName), "initrd", cancellation);
        await File.WriteAllTextAsync(PathOf(Snapshot.RootDiskName), "root disk", cancellation);
        var machine = driver.Complete(new MachineDescription
        {
            Accelerator = Accelerator.Kvm,
            MemoryMib = MemoryMib,
            Cpus = 1,
            KernelPath = PathOf(Snapshot.KernelName),
            InitrdPath = PathOf(Snapshot.InitrdName),
            RootDiskPath = PathOf(Snapshot.RootDiskName),
            TscKhz = 1,
        });
        var options = new VmmStartOptions { RunDirectory = Path.Combine(DhHome.EnsurePrivate(home.RunDirectory), "boot"), Installation = Installation.Current };
        await using (var vmm = await driver.BootAsync(machine, PathOf(Snapshot.MemoryName), options, cancellation))
        {
            await vmm.ResumeAsync(cancellation);
            using var session = new GuestSession(new SocketTransport(await vmm.ConnectGuestAsync(options.StepTimeLimit, cancellation)));
            await session.WaitReadyAsync(options.StepTimeLimit, cancellation);
            await vmm.PauseAsync(cancellation);
            await vmm.SaveAsync(PathOf(Snapshot.StateName), cancellation);
        }

        var manifest = new SnapshotManifest
        {
            SchemaVersion = SnapshotManifest.CurrentSchemaVersion,
            Id = Id,
            Template = "python",
            ImageHash = "",
            Version = "3.11",
            Vmm = driver.Name,
            VmmVersion = driver.Version.ToString(),
            SnapshotVersion = driver.SnapshotVersion?.ToString(),
            MachineHash = driver.MachineHash(machine),
            Accelerator = machine.Accelerator,
            MemoryMib = machine.MemoryMib,
            Cpus = machine.Cpus,
            TscKhz = machine.TscKhz,
            Balloon = machine.Balloon,
            DataBytes = 0,
            BootSeconds = 0,
            CreatedAt = DateTimeOffset.UtcNow,
            RunnerProtocol = GuestSession.ProtocolVersion,
            DhVersion = "0",
            Files = Snapshot.FileNames(Snapshot.MemoryName).ToDictionary(name => name, name => Snapshot.Describe(PathOf(name))),
        };
        await File.WriteAllBytesAsync(PathOf(Snapshot.ManifestName), manifest.ToJson(), cancellation);
        var snapshot = store.Publish(draft, manifest);

        // Every third page with data is in the working set.
        using var memory = SparseFileSource.Open(snapshot.MemoryPath);
        long[] pages = [.. memory.DataExtents.SelectMany(extent => Enumerable.Range(0, (int)(extent.Length / 4096)).Select(page => extent.Offset + (page * 4096L))).Where((_, index) => index % 3 == 0)];
        WorkingSet.Combine(Id, memory.Length, [pages], []).WriteTo(snapshot.WorkingSetPath, snapshot.MemoryPath);
    }
}
