using Dh.Guest;
using Dh.Preparation;

namespace Dh.IntegrationTests.Guests;

/// <summary>
/// A clone that hears of its host long before the host says hello: what its process has drawn by then comes from the snapshot, and is the
/// same in all clones.
/// </summary>
internal static class LateHello
{
    /// <summary>Runs code in a new clone.</summary>
    /// <param name="home">Where it runs.</param>
    /// <param name="template">Whose newest snapshot is restored.</param>
    /// <param name="code">What it runs.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>What the code has printed.</returns>
    public static async Task<string> RunAsync(DhHome home, string template, string code, CancellationToken cancellationToken)
    {
        await using var guest = await BareGuest.RestoreAsync(home, template, cancellationToken);
        await guest.Channel.SendAsync("\u0010\0\0\0\0\0\0\0{\"type\":\"knock\"}"u8.ToArray(), cancellationToken); // a frame of no known type, which is ignored
        await Task.Delay(TimeSpan.FromSeconds(1), cancellationToken);
        using var session = new GuestSession(new SocketTransport(guest.Channel));
        await session.GreetAsync(BareGuest.TimeLimit, cancellationToken);
        var output = new CapturedText();
        var result = await session.ExecuteAsync(new ExecutionRequest { Source = code }, output, cancellationToken);
        Assert.Equal(0, result.ExitCode);
        return output.Text;
    }
}
