using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>A DH_HOME with a snapshot that the Firecracker driver has made of a fake Firecracker's machine, working set included.</summary>
internal sealed class FirecrackerHome : IDisposable
{
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
            await FakeSnapshot.MakeAsync(home.Home, home.Fake, TestContext.Current.CancellationToken);
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
}
