using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>How the runner treats hosts that come and go, which over vsock they do.</summary>
public sealed class VsockChannelTests(PreparedHome prepared)
{
    [Fact]
    public async Task Hosts_come_one_after_the_other_and_none_goes_unnoticed()
    {
        var result = await prepared.Dh.RunAsync(
            ["exec", Repository.PathOf("test/Dh.IntegrationTests/Guests/vsock_channel.py")], timeLimit: TimeSpan.FromMinutes(2));

        Assert.Equal(
            """
            channel: close
            channel: reset
            channel: half-close
            channel: middle of a frame
            refused before it listens
            one at a time
            each greets anew
            fatal: the host has gone while its code ran
            end

            """.ReplaceLineEndings("\n"),
            result.Output);
        Assert.Equal((0, ""), (result.ExitCode, result.Error));
    }
}
