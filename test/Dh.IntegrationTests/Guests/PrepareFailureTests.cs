using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>However a preparation ends, the old snapshot stays in use, and nothing half-made stays for long.</summary>
public sealed class PrepareFailureTests(PreparedHome prepared) : IDisposable
{
    private const int Mib = 1 << 20;
    private static readonly TimeSpan PrepareLimit = TimeSpan.FromMinutes(3);

    private readonly TempDir _directory = new();

    private DhProgram Dh => new(_directory.Path);

    private string Snapshots => new DhHome(_directory.Path).SnapshotsDirectory;

    [Theory]
    [InlineData(40, "")]
    [InlineData(200, " for guest memory")]
    public async Task Without_room_for_another_snapshot_the_old_one_stays_in_use(int roomMib, string what)
    {
        Assert.SkipUnless(Environment.IsPrivilegedProcess, "A small file system needs root.");
        long size = await UsedBytesAsync(prepared.Home.Path) + ((long)roomMib * Mib);
        await RunAsync("mount", "-t", "tmpfs", "-o", $"size={size},mode=0700", "tmpfs", _directory.Path);
        try
        {
            await CopyHomeAsync();
            var result = await Dh.RunAsync(["vm", "prepare", "--force"], timeLimit: PrepareLimit);
            Assert.Equal(125, result.ExitCode);
            Assert.Matches(
                $"dh: The snapshot could not be written in {_directory.Path} \\([0-9]+ MiB free\\): No space left on device{what}\\. "
                + "The old snapshot, if there is one, stays in use\\. Make room there, or set DH_HOME to another directory\\.\n$",
                result.Error);
            await AssertOldSnapshotWorksAsync("a full disk");
            Assert.Empty(Drafts());
        }
        finally
        {
            await RunAsync("umount", "--lazy", _directory.Path);
        }
    }

    [Fact]
    public async Task Interrupted_while_it_boots_it_ends_with_130_and_removes_its_draft()
    {
        await CopyHomeAsync();
        using var process = await StartUntilItBootsAsync();
        Assert.Equal(130, await Processes.EndAsync(process, "INT"));
        string error = await process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        Assert.EndsWith("dh: interrupted; what was prepared before is still in use.\n", error, StringComparison.Ordinal);
        Assert.Empty(Drafts());
        await AssertOldSnapshotWorksAsync("an interrupt");
    }

    [Fact]
    public async Task What_a_killed_one_leaves_the_next_one_removes_and_a_second_at_once_waits()
    {
        await CopyHomeAsync();
        string old = Current();
        using (var killed = await StartUntilItBootsAsync())
        {
            killed.Kill();
            await killed.WaitForExitAsync(TestContext.Current.CancellationToken);
        }

        await AssertOldSnapshotWorksAsync("the death of a preparation");
        Assert.Single(Drafts());

        using var first = await StartUntilItBootsAsync();
        var second = await Dh.RunAsync(["vm", "prepare"], timeLimit: PrepareLimit);
        string error = await first.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        await first.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.True(first.ExitCode == 0, error);
        Assert.Equal(0, second.ExitCode);
        Assert.StartsWith("waiting: another preparation is under way\n", second.Error, StringComparison.Ordinal);
        Assert.NotEqual(old, Current());
        Assert.Contains($"up to date: {Current()}\n", second.Error, StringComparison.Ordinal);
        Assert.Empty(Drafts());
        Assert.False(Directory.Exists(old));
        await AssertOldSnapshotWorksAsync("two preparations");
    }

    [Fact]
    public async Task A_draft_of_the_dead_is_removed_even_when_nothing_is_to_be_made()
    {
        await CopyHomeAsync();
        Directory.CreateDirectory(Path.Combine(Snapshots, ".draft-dead"));
        Assert.Equal(0, (await Dh.RunAsync(["vm", "prepare"])).ExitCode);
        Assert.Empty(Drafts());
    }

    public void Dispose() => _directory.Dispose();

    private async Task AssertOldSnapshotWorksAsync(string after)
    {
        await OwnHome.AssertNothingLeftAsync(Dh, after);
        Assert.Equal(new ProgramResult(0, "2\n", ""), await Dh.ExecAsync("1 + 1"));
        await OwnHome.AssertNothingLeftAsync(Dh, $"the run after {after}");
    }

    private IEnumerable<string> Drafts() => Directory.EnumerateDirectories(Snapshots, ".draft-*");

    private string Current()
    {
        string entry = Directory.EnumerateDirectories(Snapshots, "python-*").Single();
        return Path.Combine(entry, new DirectoryInfo(Path.Combine(entry, "current")).LinkTarget!);
    }

    /// <summary>Starts a preparation and returns in the middle of its machine's boot.</summary>
    private async Task<Process> StartUntilItBootsAsync()
    {
        var process = Dh.Start(["vm", "prepare", "--force"]);
        process.StandardInput.Close();
        string? line;
        do
        {
            line = await process.StandardError.ReadLineAsync(TestContext.Current.CancellationToken);
            Assert.NotNull(line);
        }
        while (!line.StartsWith("booting", StringComparison.Ordinal));
        await Processes.WaitForDescendantAsync(process.Id, "qemu-system", TestContext.Current.CancellationToken);
        await Task.Delay(1000, TestContext.Current.CancellationToken);
        return process;
    }

    private async Task CopyHomeAsync() =>
        await RunAsync("cp", "-r", "-d", "--sparse=always", Path.Combine(prepared.Home.Path, "vm"), Path.Combine(prepared.Home.Path, "cache"), _directory.Path);

    private static async Task<long> UsedBytesAsync(string directory) =>
        long.Parse((await RunAsync("du", "-s", "--block-size=1", directory)).Split('\t')[0], System.Globalization.CultureInfo.InvariantCulture);

    private static async Task<string> RunAsync(string program, params string[] arguments)
    {
        using var process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(0, process.ExitCode);
        return output;
    }
}
