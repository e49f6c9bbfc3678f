using System.IO.Hashing;
using System.Text.Json;
using Dh.Vmm;

namespace Dh.Snapshots;

/// <summary>A finished snapshot: a directory that never changes.</summary>
public sealed class Snapshot
{
    /// <summary>Guest memory, sparse.</summary>
    public const string MemoryName = "memory";

    /// <summary>The VMM's device state.</summary>
    public const string StateName = "state";

    /// <summary>The read-only root disk.</summary>
    public const string RootDiskName = "root.img";

    /// <summary>The kernel that booted.</summary>
    public const string KernelName = "kernel";

    /// <summary>The initial RAM disk that it booted with.</summary>
    public const string InitrdName = "initrd";

    /// <summary>The manifest.</summary>
    public const string ManifestName = "manifest.json";

    private Snapshot(string directory, SnapshotManifest manifest)
    {
        Directory = directory;
        Manifest = manifest;
    }

    /// <summary>Where it is.</summary>
    public string Directory { get; }

    /// <summary>What it is.</summary>
    public SnapshotManifest Manifest { get; }

    /// <summary>The memory file.</summary>
    public string MemoryPath => Path.Combine(Directory, MemoryName);

    /// <summary>The device state.</summary>
    public string StatePath => Path.Combine(Directory, StateName);

    /// <summary>The machine that it restores to.</summary>
    public MachineDescription Machine => new()
    {
        Accelerator = Manifest.Accelerator,
        MemoryMib = Manifest.MemoryMib,
        Cpus = Manifest.Cpus,
        TscKhz = Manifest.TscKhz,
        KernelPath = Path.Combine(Directory, KernelName),
        InitrdPath = Path.Combine(Directory, InitrdName),
        RootDiskPath = Path.Combine(Directory, RootDiskName),
    };

    /// <summary>Opens a snapshot and checks what costs nothing: the manifest, the presence and length of every file, and the state's hash.</summary>
    /// <param name="directory">Its directory.</param>
    /// <exception cref="DhException">It is damaged or of another schema; the message names the file.</exception>
    public static Snapshot Open(string directory)
    {
        string path = Path.Combine(directory, ManifestName);
        try
        {
            var manifest = JsonSerializer.Deserialize(File.ReadAllBytes(path), SnapshotJson.Default.SnapshotManifest)
                ?? throw Damaged(path, "it is empty");
            if (manifest.SchemaVersion != SnapshotManifest.CurrentSchemaVersion)
            {
                throw Damaged(path, $"it has schema {manifest.SchemaVersion}, this dh reads {SnapshotManifest.CurrentSchemaVersion}");
            }

            foreach (string name in (ReadOnlySpan<string>)[MemoryName, StateName, RootDiskName, KernelName, InitrdName])
            {
                string file = Path.Combine(directory, name);
                if (!manifest.Files.TryGetValue(name, out var recorded))
                {
                    throw Damaged(path, $"it does not record {name}");
                }

                long length = new FileInfo(file) is { Exists: true } info ? info.Length : throw Damaged(file, "it is missing");
                if (length != recorded.Length)
                {
                    throw Damaged(file, $"it has {length} bytes instead of {recorded.Length}");
                }
            }

            if (manifest.Files[MemoryName].Length != (long)manifest.MemoryMib << 20)
            {
                throw Damaged(path, $"it records {manifest.MemoryMib} MiB of memory in a file of {manifest.Files[MemoryName].Length} bytes");
            }

            var snapshot = new Snapshot(directory, manifest);
            snapshot.CheckHash(StateName);
            return snapshot;
        }
        catch (JsonException e)
        {
            throw Damaged(path, $"it is no valid manifest ({e.Message})", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Damaged(path, e.Message, e);
        }
    }

    /// <summary>Reads all files and compares their hashes with the manifest's.</summary>
    /// <param name="cancellationToken">Gives up between files.</param>
    /// <exception cref="DhException">A file is damaged; the message names it.</exception>
    public Task VerifyAsync(CancellationToken cancellationToken = default) => Task.Run(
        () =>
        {
            foreach (string name in Manifest.Files.Keys)
            {
                cancellationToken.ThrowIfCancellationRequested();
                CheckHash(name);
            }
        },
        cancellationToken);

    /// <summary>Hashes a file for the manifest.</summary>
    /// <param name="path">The file.</param>
    internal static SnapshotFile Describe(string path)
    {
        using var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1 << 20);
        var hash = new XxHash3();
        hash.Append(stream);
        return new SnapshotFile(stream.Length, Convert.ToHexStringLower(hash.GetCurrentHash()));
    }

    private void CheckHash(string name)
    {
        string path = Path.Combine(Directory, name);
        if (Describe(path) != Manifest.Files[name])
        {
            throw Damaged(path, "its contents are not what the manifest records");
        }
    }

    private static DhException Damaged(string path, string why, Exception? inner = null) =>
        new(DhErrorReason.Snapshot, $"Snapshot file {path} cannot be used: {why}. Run `dh vm prepare --force` to make a new snapshot.", inner);
}
