using Dh.Guest;
using Dh.Images;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>A snapshot whose memory is kept in LZ4 blocks does what any other does, but for being mapped.</summary>
public sealed class CompressedSnapshotTests(PreparedHome prepared) : IDisposable
{
    private readonly TempDir _directory = new();

    [Fact]
    public async Task A_compressed_snapshot_runs_code_with_every_policy_of_the_page_server()
    {
        const string Code = "import hashlib, json; print(hashlib.sha256(json.dumps(list(range(100_000))).encode()).hexdigest()); sum(range(1000))";
        var cancellation = TestContext.Current.CancellationToken;
        var home = HomeWithPreparedImages();
        var options = new PreparationOptions { Template = Template.Find("python", Installation.Current.TemplatesDirectory), Home = home, Compress = true };
        var snapshot = await SnapshotPreparation.PrepareAsync(options, cancellationToken: cancellation);

        Assert.True(snapshot.IsCompressed);
        Assert.Equal(Path.Combine(snapshot.Directory, "memory.lz4"), snapshot.MemoryPath);
        Assert.False(File.Exists(Path.Combine(snapshot.Directory, "memory")));
        Assert.Equal(["initrd", "kernel", "memory.lz4", "root.img", "state"], snapshot.Manifest.Files.Keys.Order(StringComparer.Ordinal));
        Assert.InRange(new FileInfo(snapshot.MemoryPath).Length, 1, snapshot.Manifest.DataBytes * 2 / 3);
        await snapshot.VerifyAsync(cancellation);
        Assert.Equal(snapshot.Directory, (await SnapshotPreparation.PrepareAsync(options, cancellationToken: cancellation)).Directory);

        string expected = await RunAsync(new SnapshotStore(prepared.Home).FindNewest("python")!, prepared.Home, MemoryPolicy.Eager, Code);
        foreach (var policy in (MemoryPolicy[])[MemoryPolicy.Eager, MemoryPolicy.Prefetch, MemoryPolicy.Lazy])
        {
            Assert.Equal(expected, await RunAsync(snapshot, home, policy, Code));
        }

        var set = await WorkingSetRecording.RecordAsync(snapshot, [new ExecutionRequest { Source = Code }], new SandboxOptions { Home = home }, cancellationToken: cancellation);
        Assert.NotEmpty(set.Touched);
        Assert.Empty(set.Written);
        Assert.Equal(expected, await RunAsync(snapshot, home, MemoryPolicy.Prefetch, Code));

        var refusal = await Assert.ThrowsAsync<DhException>(() => RunAsync(snapshot, home, MemoryPolicy.File, Code));
        Assert.Equal(DhErrorReason.Host, refusal.Reason);
        Assert.Equal(
            $"Memory policy file cannot map the compressed memory of snapshot {snapshot.Directory}: it comes back through a userfaultfd only. Use --memory-policy eager, prefetch or lazy, or run `dh vm prepare --force` without --compress.",
            refusal.Message);

        AssertDamageIsFound(snapshot);
    }

    public void Dispose() => _directory.Dispose();

    private static void AssertDamageIsFound(Snapshot snapshot)
    {
        byte[] memory = File.ReadAllBytes(snapshot.MemoryPath);
        File.Delete(snapshot.MemoryPath);
        memory[20] ^= 1;
        File.WriteAllBytes(snapshot.MemoryPath, memory);
        string message = Assert.ThrowsAny<DhException>(() => Snapshot.Open(snapshot.Directory).OpenMemory()).Message;
        Assert.Equal($"Compressed memory file {snapshot.MemoryPath} cannot be used: its header's hash is wrong. Run `dh vm prepare --force` to make a new snapshot.", message);
        File.WriteAllBytes(snapshot.MemoryPath, memory[..^1]);
        Assert.Contains($"{snapshot.MemoryPath} cannot be used: it has {memory.Length - 1} bytes instead of {memory.Length}.", Assert.ThrowsAny<DhException>(() => Snapshot.Open(snapshot.Directory)).Message, StringComparison.Ordinal);
        File.Delete(snapshot.MemoryPath);
        Assert.Contains($"{snapshot.MemoryPath} cannot be used: it is missing.", Assert.ThrowsAny<DhException>(() => Snapshot.Open(snapshot.Directory)).Message, StringComparison.Ordinal);
    }

    private static async Task<string> RunAsync(Snapshot snapshot, DhHome home, MemoryPolicy policy, string code)
    {
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = home, MemoryPolicy = policy }, TestContext.Current.CancellationToken);
        Assert.Equal((policy, null), (sandbox.MemoryPolicy, sandbox.Notice));
        var output = new CapturedText();
        var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = code }, output, TestContext.Current.CancellationToken);
        Assert.Equal(0, result.ExitCode);
        return output.Text;
    }

    /// <summary>Another home, so that the other tests' newest snapshot stays what it is; building the image again would take long.</summary>
    private DhHome HomeWithPreparedImages()
    {
        var home = new DhHome(_directory.Path);
        Directory.CreateDirectory(Path.GetDirectoryName(home.ImagesDirectory)!);
        Directory.CreateSymbolicLink(home.ImagesDirectory, prepared.Home.ImagesDirectory);
        Directory.CreateSymbolicLink(home.CacheDirectory, prepared.Home.CacheDirectory);
        return home;
    }
}
