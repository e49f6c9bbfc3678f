using System.Text.Json;
using Dh.Guest;
using Dh.Paging;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>A DH_HOME with a snapshot that the Firecracker driver has made of a fake Firecracker's machine, working set included.</summary>
internal sealed class FirecrackerHome : IDisposable
{
    private const int MemoryMib = 64;
    private const string Id = "20260101T000000-00000000";

    private readonly TempDir _directory = new();

    private FirecrackerHome(string[] script)
    {
        Fake = new FakeFirecracker(script);
        Dh = new DhProgram(_directory.Path, new Dictionary<string, string> { ["DH_FIRECRACKER"] = Fake.ProgramPath });
    }

    public FakeFirecracker Fake { get; }

    public DhProgram Dh { get; }

    public DhHome Home => new(_directory.Path);

    public VmmPrograms Programs => new() { Firecracker = Fake.ProgramPath };

    public Snapshot Snapshot => new SnapshotStore(Home).FindNewest("python")!;

    /// <summary>Boots a machine, saves it, and publishes it.</summary>
    /// <param name="script">What the fake plays, also while the snapshot is made.</param>
    public static async Task<FirecrackerHome> CreateAsync(params string[] script)
    {
        var home = new FirecrackerHome(script);
        try
        {
            await home.MakeSnapshotAsync();
            return home;
        }
        catch
        {
            home.Dispose();
            throw;
        }
    }

    public Task AssertNothingLeftAsync(string after) => Guests.OwnHome.AssertNothingLeftAsync(Dh, after);

    public void Dispose()
    {
        Fake.Dispose();
        _directory.Dispose();
    }

    private async Task MakeSnapshotAsync()
    {
        var cancellation = TestContext.Current.CancellationToken;
        string cache = DhHome.EnsurePrivate(Home.CacheDirectory);
        var driver = await VmmCandidate.FindAsync("firecracker", Programs, cache, cancellation);
        DhHome.EnsurePrivate(Home.SnapshotsDirectory);
        DhHome.EnsurePrivate(Home.RunDirectory);
        var store = new SnapshotStore(Home);
        string draft = store.CreateDraft(Id);
        string PathOf(string name) => Path.Combine(draft, name);
        File.WriteAllText(PathOf(Snapshot.KernelName), "\u007fELF, and no more");
        File.WriteAllText(PathOf(Snapshot.InitrdName), "initrd");
        File.WriteAllText(PathOf(Snapshot.RootDiskName), "root disk");
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
        var options = new VmmStartOptions { RunDirectory = Path.Combine(Home.RunDirectory, "boot"), Installation = Installation.Current };
        await using (var vmm = await driver.BootAsync(machine, PathOf(Snapshot.MemoryName), options, cancellation))
        {
            await vmm.ResumeAsync(cancellation);
            using var session = new GuestSession(await vmm.ConnectGuestAsync(options.StepTimeLimit, cancellation));
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
        File.WriteAllBytes(PathOf(Snapshot.ManifestName), JsonSerializer.SerializeToUtf8Bytes(manifest, SnapshotJson.Default.SnapshotManifest));
        var snapshot = store.Publish(draft, manifest);

        // Every third page with data is in the working set.
        using var memory = SparseFileSource.Open(snapshot.MemoryPath);
        long[] pages = [.. memory.DataExtents.SelectMany(extent => Enumerable.Range(0, (int)(extent.Length / 4096)).Select(page => extent.Offset + (page * 4096L))).Where((_, index) => index % 3 == 0)];
        WorkingSet.Combine(Id, memory.Length, [pages], []).WriteTo(snapshot.WorkingSetPath, snapshot.MemoryPath);
    }
}
