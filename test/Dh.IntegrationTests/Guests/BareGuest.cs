using System.Net.Sockets;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.IntegrationTests.Guests;

/// <summary>A restored guest to which nobody has said hello, for tests that speak its protocol by themselves.</summary>
internal sealed class BareGuest : IAsyncDisposable
{
    /// <summary>How long a guest may take to accept, and to answer.</summary>
    public static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(30);

    private readonly IVmm _vmm;

    private BareGuest(IVmm vmm, Socket channel) => (_vmm, Channel) = (vmm, channel);

    /// <summary>The guest channel.</summary>
    public Socket Channel { get; }

    /// <summary>Restores the newest snapshot of a template.</summary>
    public static async Task<BareGuest> RestoreAsync(DhHome home, string template, CancellationToken cancellationToken)
    {
        var snapshot = new SnapshotStore(home).FindNewest(template)!;
        var options = new SandboxOptions();
        var driver = await VmmCandidate.FindAsync(snapshot.Manifest.Vmm, options.Programs, DhHome.EnsurePrivate(home.CacheDirectory), cancellationToken);
        string run = Path.Combine(DhHome.EnsurePrivate(home.RunDirectory), Guid.NewGuid().ToString("N"));
        var vmm = await driver.RestoreAsync(
            snapshot.Machine, MemoryChoice.Of(snapshot, driver, MemoryPolicy.File).Backend, snapshot.StatePath, new VmmStartOptions { RunDirectory = run, Installation = options.Installation }, cancellationToken);
        try
        {
            await vmm.WaitRestoredAsync(cancellationToken);
            await vmm.ResumeAsync(cancellationToken);
            return new BareGuest(vmm, await vmm.ConnectGuestAsync(TimeLimit, cancellationToken));
        }
        catch
        {
            await vmm.DisposeAsync();
            throw;
        }
    }

    public async ValueTask DisposeAsync()
    {
        Channel.Dispose();
        await _vmm.DisposeAsync();
    }
}
