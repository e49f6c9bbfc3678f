using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.IntegrationTests.Guests;

/// <summary>
/// A clone that hears of its host long before the host says hello: what its process has drawn by then comes from the snapshot, and is the
/// same in all clones.
/// </summary>
internal static class LateHello
{
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(30);

    /// <summary>Runs code in a new clone.</summary>
    /// <param name="home">Where it runs.</param>
    /// <param name="template">Whose newest snapshot is restored.</param>
    /// <param name="code">What it runs.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>What the code has printed.</returns>
    public static async Task<string> RunAsync(DhHome home, string template, string code, CancellationToken cancellationToken)
    {
        var snapshot = new SnapshotStore(home).FindNewest(template)!;
        var options = new SandboxOptions();
        var driver = await VmmCandidate.FindAsync(snapshot.Manifest.Vmm, options.Programs, DhHome.EnsurePrivate(home.CacheDirectory), cancellationToken);
        string run = Path.Combine(DhHome.EnsurePrivate(home.RunDirectory), Guid.NewGuid().ToString("N"));
        await using var vmm = await driver.RestoreAsync(
            snapshot.Machine, MemoryChoice.Of(snapshot, driver, MemoryPolicy.File).Backend, snapshot.StatePath, new VmmStartOptions { RunDirectory = run, Installation = options.Installation }, cancellationToken);
        await vmm.WaitRestoredAsync(cancellationToken);
        await vmm.ResumeAsync(cancellationToken);
        var socket = await vmm.ConnectGuestAsync(TimeLimit, cancellationToken);
        await socket.SendAsync("\u0010\0\0\0\0\0\0\0{\"type\":\"knock\"}"u8.ToArray(), cancellationToken); // a frame of no known type, which is ignored
        await Task.Delay(TimeSpan.FromSeconds(1), cancellationToken);
        using var session = new GuestSession(new SocketTransport(socket));
        await session.GreetAsync(TimeLimit, cancellationToken);
        var output = new CapturedText();
        var result = await session.ExecuteAsync(new ExecutionRequest { Source = code }, output, cancellationToken);
        Assert.Equal(0, result.ExitCode);
        return output.Text;
    }
}
