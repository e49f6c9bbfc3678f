using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>What is wrong is said, with the next step, and costs nothing.</summary>
public sealed class BadInputTests(PreparedHome prepared)
{
    [Fact]
    public async Task Without_a_snapshot_exec_says_how_to_get_one()
    {
        using var empty = new TempDir();
        var result = await new DhProgram(empty.Path).ExecAsync("1");
        Assert.Equal((4, ""), (result.ExitCode, result.Output));
        Assert.Contains("dh vm prepare", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task An_unknown_version_is_not_found()
    {
        var result = await prepared.Dh.ExecAsync("1", "--template", "python", "--version", "9.9");
        Assert.Equal(4, result.ExitCode);
        Assert.Contains("python 9.9", result.Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("exec", "--no-such-option")]
    [InlineData("no-such-command")]
    public async Task Unknown_words_are_a_usage_error(params string[] arguments)
    {
        Assert.Equal(2, (await prepared.Dh.RunAsync(arguments)).ExitCode);
    }

    [Fact]
    public async Task A_missing_script_is_not_found()
    {
        var result = await prepared.Dh.RunAsync(["exec", "/no/such/script.py"]);
        Assert.Equal(4, result.ExitCode);
        Assert.Contains("/no/such/script.py", result.Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("memory")]
    [InlineData("state")]
    [InlineData("root.img")]
    public async Task A_cut_file_is_refused_by_name(string name)
    {
        using var copy = CopyOfHome();
        string file = FileOf(copy, name);
        using (var stream = new FileStream(file, FileMode.Open))
        {
            stream.SetLength(stream.Length - 4096);
        }

        var result = await new DhProgram(copy.Path).ExecAsync("1", "--template", "python", "--version", "3.11");
        Assert.Equal(125, result.ExitCode);
        Assert.Contains(file, result.Error, StringComparison.Ordinal);
        Assert.Contains("dh vm prepare --force", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_flipped_bit_in_the_state_is_refused()
    {
        using var copy = CopyOfHome();
        string file = FileOf(copy, "state");
        byte[] bytes = await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken);
        bytes[bytes.Length / 2] ^= 1;
        await File.WriteAllBytesAsync(file, bytes, TestContext.Current.CancellationToken);
        var result = await new DhProgram(copy.Path).ExecAsync("1", "--template", "python", "--version", "3.11");
        Assert.Equal(125, result.ExitCode);
        Assert.Contains(file, result.Error, StringComparison.Ordinal);
    }

    /// <summary>A file of the snapshot, by the path that the program names it with.</summary>
    private static string FileOf(TempDir copy, string name)
    {
        string entry = Directory.EnumerateDirectories(new DhHome(copy.Path).SnapshotsDirectory, "python-*").Single();
        return Path.Combine(entry, new DirectoryInfo(Path.Combine(entry, "current")).LinkTarget!, name);
    }

    /// <summary>The prepared snapshots, copied with their holes.</summary>
    private TempDir CopyOfHome()
    {
        var copy = new TempDir();
        Directory.CreateDirectory(copy["vm"]);
        using var cp = System.Diagnostics.Process.Start("/bin/cp", ["-r", "-d", "--sparse=always", prepared.Home.SnapshotsDirectory, copy["vm"]]);
        cp.WaitForExit();
        foreach (string file in Directory.EnumerateFiles(copy.Path, "*", SearchOption.AllDirectories))
        {
            File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        }

        return copy;
    }
}
