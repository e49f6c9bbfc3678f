using System.Text.Json.Nodes;
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
    public async Task Output_that_cannot_be_written_is_a_failure_that_says_so()
    {
        var result = await prepared.Dh.RunAsync(new System.Diagnostics.ProcessStartInfo("sh", ["-c", "exec \"$0\" exec -c 1+1 >/dev/full", Repository.PathOf("bin/dh")]));
        Assert.Equal(new ProgramResult(125, "", "dh: Standard output does not take what is written to it: write: ENOSPC (No space left on device)\n"), result);
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
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf(name);
        using (var stream = new FileStream(file, FileMode.Open))
        {
            stream.SetLength(stream.Length - 4096);
        }

        var result = await copy.Dh.ExecAsync("1", "--template", "python", "--version", "3.11");
        Assert.Equal(125, result.ExitCode);
        Assert.Contains(file, result.Error, StringComparison.Ordinal);
        Assert.Contains("dh vm prepare --force", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_flipped_bit_in_the_state_is_refused()
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf("state");
        byte[] bytes = await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken);
        bytes[bytes.Length / 2] ^= 1;
        await File.WriteAllBytesAsync(file, bytes, TestContext.Current.CancellationToken);
        var result = await copy.Dh.ExecAsync("1", "--template", "python", "--version", "3.11");
        Assert.Equal(125, result.ExitCode);
        Assert.Contains(file, result.Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("schema_version", "2", "it has schema 2, this dh reads 1")]
    [InlineData("schema_version", "\"1\"", "it is no valid manifest")]
    [InlineData("files", "null", "it is no valid manifest")]
    [InlineData("files", "{}", "it does not record memory")]
    [InlineData("template", "null", "it is no valid manifest")]
    [InlineData("accelerator", "\"Abacus\"", "it is no valid manifest")]
    [InlineData("memory_mib", "1024", "it records 1024 MiB of memory in a file of 536870912 bytes")]
    [InlineData("memory_mib", "-1", "it records -1 MiB of memory")]
    [InlineData("cpus", "0", "it records 0 CPUs")]
    [InlineData("cpus", "100000", "it records 100000 CPUs")]
    public async Task A_manifest_that_says_something_impossible_is_refused(string member, string value, string why)
    {
        await AssertManifestRefusedAsync(manifest => manifest[member] = JsonNode.Parse(value), why);
    }

    [Theory]
    [InlineData("memory", "null", "it is no valid manifest")]
    [InlineData("../../../../etc/passwd", """{ "length": 1, "xx_hash3": "0" }""", "it records ../../../../etc/passwd, which is no file of a snapshot")]
    public async Task A_manifest_that_records_other_files_is_refused(string name, string value, string why)
    {
        await AssertManifestRefusedAsync(manifest => manifest["files"]![name] = JsonNode.Parse(value), why);
    }

    [Theory]
    [InlineData("")]
    [InlineData("{")]
    [InlineData("null")]
    [InlineData("[]")]
    public async Task What_is_no_manifest_is_refused(string contents)
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf("manifest.json");
        await File.WriteAllTextAsync(file, contents, TestContext.Current.CancellationToken);
        await AssertRefusedAsync(copy, file, "");
    }

    [Theory]
    [InlineData("manifest.json")]
    [InlineData("memory")]
    [InlineData("initrd")]
    public async Task A_missing_file_is_named(string name)
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf(name);
        File.Delete(file);
        await AssertRefusedAsync(copy, file, "");
    }

    [Fact]
    public async Task A_state_that_is_none_is_refused_by_QEMU_and_by_name()
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf("state");
        byte[] bytes = new byte[new FileInfo(file).Length];
        await File.WriteAllBytesAsync(file, bytes, TestContext.Current.CancellationToken);
        string manifestPath = copy.FileOf("manifest.json");
        var manifest = JsonNode.Parse(await File.ReadAllTextAsync(manifestPath, TestContext.Current.CancellationToken))!;
        manifest.AsObject().Remove("checksum");
        // A hash that fits: only QEMU sees that it is none.
        manifest["files"]!["state"]!["xx_hash3"] = Convert.ToHexStringLower(System.IO.Hashing.XxHash3.Hash(bytes).ToArray());
        await File.WriteAllTextAsync(manifestPath, manifest.ToJsonString(), TestContext.Current.CancellationToken);
        var result = await copy.Dh.ExecAsync("1", Selection);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith($"dh: The device state {file} could not be restored: ", result.Error, StringComparison.Ordinal);
        await OwnHome.AssertNothingLeftAsync(copy.Dh, "a bad state");
    }

    [Fact]
    public async Task Verify_names_a_memory_file_in_which_one_bit_is_flipped()
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf("memory");
        using (var handle = File.OpenHandle(file, FileMode.Open, FileAccess.ReadWrite))
        {
            byte[] one = new byte[1];
            await RandomAccess.ReadAsync(handle, one, 1 << 20, TestContext.Current.CancellationToken);
            one[0] ^= 1;
            await RandomAccess.WriteAsync(handle, one, 1 << 20, TestContext.Current.CancellationToken);
        }

        var result = await copy.Dh.RunAsync(["vm", "verify"]);
        Assert.Equal(125, result.ExitCode);
        Assert.Contains($"Snapshot file {file} cannot be used: its contents are not what the manifest records.", result.Output + result.Error, StringComparison.Ordinal);
    }

    private static readonly string[] Selection = ["--template", "python", "--version", "3.11"];

    private async Task AssertManifestRefusedAsync(Action<JsonNode> change, string why)
    {
        using var copy = new CopyOfHome(prepared);
        string file = copy.FileOf("manifest.json");
        var manifest = JsonNode.Parse(await File.ReadAllTextAsync(file, TestContext.Current.CancellationToken))!;
        manifest.AsObject().Remove("checksum"); // or it would be all that is seen
        change(manifest);
        await File.WriteAllTextAsync(file, manifest.ToJsonString(), TestContext.Current.CancellationToken);
        await AssertRefusedAsync(copy, file, why);
    }

    private static async Task AssertRefusedAsync(CopyOfHome copy, string file, string why)
    {
        var result = await copy.Dh.ExecAsync("1", Selection);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith($"dh: Snapshot file {file} cannot be used: {why}", result.Error, StringComparison.Ordinal);
        Assert.EndsWith(" Run `dh vm prepare --force` to make a new snapshot.\n", result.Error, StringComparison.Ordinal);
    }
}
