using System.Globalization;
using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>Clones of one snapshot through the library: each is its own, and nothing of it is left.</summary>
public sealed class CloneTests(PreparedHome prepared)
{
    [Fact]
    public async Task Sixteen_clones_share_no_random_bytes_and_know_the_time()
    {
        var snapshot = new SnapshotStore(prepared.Home).FindNewest("python")!;
        var lines = new List<string[]>();
        for (int i = 0; i < 16; i++)
        {
            await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = prepared.Home }, TestContext.Current.CancellationToken);
            var output = new CapturedText();
            var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = CloneGenerators.Code }, output, TestContext.Current.CancellationToken);
            double now = (DateTimeOffset.UtcNow - DateTimeOffset.UnixEpoch).TotalSeconds;
            Assert.Equal(0, result.ExitCode);
            lines.Add(output.Text.Trim().Split(' '));
            Assert.InRange(now - double.Parse(lines[^1][^1], CultureInfo.InvariantCulture), -0.05, 5);
        }

        Assert.Empty(CloneGenerators.Alike(lines));
    }

    [Fact]
    public async Task Clones_that_were_busy_before_the_hello_share_nothing_either()
    {
        string[][] lines =
        [
            (await LateHello.RunAsync(prepared.Home, "python", CloneGenerators.Code, TestContext.Current.CancellationToken)).Trim().Split(' '),
            (await LateHello.RunAsync(prepared.Home, "python", CloneGenerators.Code, TestContext.Current.CancellationToken)).Trim().Split(' '),
        ];
        Assert.Empty(CloneGenerators.Alike(lines));
    }

    [Fact]
    public async Task A_sandbox_runs_several_times_and_leaves_nothing()
    {
        var snapshot = new SnapshotStore(prepared.Home).FindNewest("python")!;
        int vmm;
        await using (var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = prepared.Home }, TestContext.Current.CancellationToken))
        {
            vmm = sandbox.VmmProcessId;
            for (int i = 0; i < 3; i++)
            {
                var output = new CapturedText();
                await sandbox.ExecuteAsync(new ExecutionRequest { Source = $"print({i})" }, output, TestContext.Current.CancellationToken);
                Assert.Equal($"{i}\n", output.Text);
            }
        }

        Assert.False(Directory.Exists($"/proc/{vmm}"));
    }
}
