using System.Diagnostics;
using System.Globalization;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.IntegrationTests.Guests;

/// <summary>What another user of the host gets at while a machine runs: nothing.</summary>
public sealed class OtherUserTests(PreparedHome prepared) : IDisposable
{
    private const string Nobody = "65534";

    private readonly OwnHome _own = new(prepared);

    [Theory(Timeout = 60_000)]
    [InlineData(MemoryPolicy.Prefetch)]
    [InlineData(MemoryPolicy.File)]
    public async Task Another_user_reads_writes_and_signals_nothing(MemoryPolicy policy)
    {
        Assert.SkipUnless(Environment.UserName == "root", "only root can become another user");
        var home = new DhHome(_own.Dh.Home);
        await using var sandbox = await Sandbox.RestoreAsync(
            new SnapshotStore(home).FindNewest("python")!, new SandboxOptions { Home = home, MemoryPolicy = policy }, TestContext.Current.CancellationToken);
        string run = Assert.Single(Directory.GetDirectories(home.RunDirectory));
        Assert.True(File.Exists(Path.Combine(run, "vmm.log")));

        // The directory of the test itself is opened, as if the home were where others may look.
        File.SetUnixFileMode(_own.Dh.Home, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute | UnixFileMode.OtherRead | UnixFileMode.OtherExecute);
        string found = await AsNobodyAsync($"find -L {home.Path} -mindepth 2 2>/dev/null");
        Assert.DoesNotContain(found.Split('\n'), line => line.StartsWith(home.RunDirectory + "/", StringComparison.Ordinal));
        Assert.DoesNotContain(found.Split('\n'), line => line.EndsWith("/memory", StringComparison.Ordinal) || line.EndsWith("/state", StringComparison.Ordinal));
        Assert.Equal("", await AsNobodyAsync($"cat {run}/vmm.log {home.RunDirectory}/.lock {sandbox.Snapshot.MemoryPath} {sandbox.Snapshot.StatePath} 2>/dev/null"));
        Assert.Equal("", await AsNobodyAsync($"ln -s /etc/passwd {run}/link 2>/dev/null && echo linked; touch {home.RunDirectory}/evil 2>/dev/null && echo touched"));

        string vmm = sandbox.VmmProcessId.ToString(CultureInfo.InvariantCulture);
        Assert.Equal("", await AsNobodyAsync($"cat /proc/{vmm}/environ 2>/dev/null; head -c 1 /proc/{vmm}/mem 2>/dev/null; ls /proc/{vmm}/fd/ 2>/dev/null; kill -0 {vmm} 2>/dev/null && echo signaled"));
    }

    public void Dispose() => _own.Dispose();

    private static async Task<string> AsNobodyAsync(string script)
    {
        using var process = Process.Start(new ProcessStartInfo("setpriv", [$"--reuid={Nobody}", $"--regid={Nobody}", "--clear-groups", "sh", "-c", script]) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        return output;
    }
}
