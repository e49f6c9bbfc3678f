using System.IO.Hashing;
using System.Text.Json;
using Dh.Linux;
using Dh.Paging;
using Dh.Vmm;

namespace Dh.Snapshots;

/// <summary>A finished snapshot: a directory that never changes, but for the working set, which may be replaced by a newer one.</summary>
public sealed class Snapshot
{
    /// <summary>Guest memory, sparse.</summary>
    public const string MemoryName = "memory";

    /// <summary>Guest memory in LZ4 blocks, in place of <see cref="MemoryName"/>.</summary>
    public const string CompressedMemoryName = "memory.lz4";

    /// <summary>The VMM's device state.</summary>
    public const string StateName = "state";

    /// <summary>The read-only root disk.</summary>
    public const string RootDiskName = "root.img";

    /// <summary>The kernel that booted.</summary>
    public const string KernelName = "kernel";

    /// <summary>The initial RAM disk that it booted with.</summary>
    public const string InitrdName = "initrd";

    /// <summary>The working set that was recorded last.</summary>
    public const string WorkingSetName = "working-set";

    /// <summary>The manifest.</summary>
    public const string ManifestName = "manifest.json";

    private const int MaxCpus = 64;

    private Snapshot(string directory, SnapshotManifest manifest)
    {
        Directory = directory;
        Manifest = manifest;
    }

    /// <summary>Where it is.</summary>
    public string Directory { get; }

    /// <summary>What it is.</summary>
    public SnapshotManifest Manifest { get; }

    /// <summary>Whether its memory is compressed: then only a page server can bring it back.</summary>
    public bool IsCompressed => NameOfMemory(Manifest) == CompressedMemoryName;

    /// <summary>The memory file, compressed or not.</summary>
    public string MemoryPath => Path.Combine(Directory, NameOfMemory(Manifest));

    /// <summary>The working set; it may be missing, or be replaced by a newer one.</summary>
    public string WorkingSetPath => Path.Combine(Directory, WorkingSetName);

    /// <summary>The device state.</summary>
    public string StatePath => Path.Combine(Directory, StateName);

    /// <summary>The machine that it restores to.</summary>
    public MachineDescription Machine => new()
    {
        Accelerator = Manifest.Accelerator,
        MemoryMib = Manifest.MemoryMib,
        Cpus = Manifest.Cpus,
        TscKhz = Manifest.TscKhz,
        Balloon = Manifest.Balloon,
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
            var manifest = SnapshotManifest.Parse(File.ReadAllBytes(path))
                ?? throw Damaged(path, "it is empty");
            if (manifest.SchemaVersion != SnapshotManifest.CurrentSchemaVersion)
            {
                throw Damaged(path, $"it has schema {manifest.SchemaVersion}, this dh reads {SnapshotManifest.CurrentSchemaVersion}");
            }

            if (manifest.Cpus is < 1 or > MaxCpus)
            {
                throw Damaged(path, $"it records {manifest.Cpus} CPUs");
            }

            var names = FileNames(NameOfMemory(manifest));
            if (manifest.Files.Keys.FirstOrDefault(name => !names.Contains(name)) is { } other)
            {
                throw Damaged(path, $"it records {Untrusted.OneLine(other)}, which is no file of a snapshot");
            }

            foreach (string name in names)
            {
                string file = Path.Combine(directory, name);
                if (manifest.Files.GetValueOrDefault(name) is not { } recorded)
                {
                    throw Damaged(path, $"it does not record {name}");
                }

                long length = new FileInfo(file) is { Exists: true } info ? info.Length : throw Damaged(file, "it is missing");
                if (length != recorded.Length)
                {
                    throw Damaged(file, $"it has {length} bytes instead of {recorded.Length}");
                }
            }

            if (manifest.Files.TryGetValue(MemoryName, out var memory) && memory.Length != (long)manifest.MemoryMib << 20)
            {
                throw Damaged(path, $"it records {manifest.MemoryMib} MiB of memory in a file of {memory.Length} bytes");
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

    /// <summary>Opens its memory for a page server.</summary>
    /// <returns>The memory; the caller disposes it.</returns>
    /// <exception cref="PageServerException">The file cannot be opened, or is damaged; the message names it.</exception>
    public IMemorySource OpenMemory()
    {
        if (!IsCompressed)
        {
            return SparseFileSource.Open(MemoryPath);
        }

        var memory = Lz4Source.Open(MemoryPath);
        if (memory.Length != Machine.MemoryBytes)
        {
            memory.Dispose();
            throw Lz4MemoryFile.Damaged(MemoryPath, $"it holds {memory.Length} bytes of memory instead of {Machine.MemoryBytes}");
        }

        return memory;
    }

    /// <summary>Bytes that its files take on the disk: their data, not their holes. An image's files count with every snapshot that has them.</summary>
    /// <exception cref="DhException">A file is gone or cannot be read.</exception>
    public long SizeOnDisk()
    {
        try
        {
            long bytes = 0;
            foreach (string path in System.IO.Directory.EnumerateFiles(Directory))
            {
                using var file = File.OpenHandle(path);
                bytes += SparseFile.GetDataExtents(file, RandomAccess.GetLength(file)).Sum(extent => extent.Length);
            }

            return bytes;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Damaged(Directory, e.Message, e);
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

            if (File.Exists(WorkingSetPath))
            {
                WorkingSetSource.Verify(WorkingSetPath, Manifest.Id, Machine.MemoryBytes);
            }
        },
        cancellationToken);

    /// <summary>Hashes a file for the manifest.</summary>
    /// <param name="path">The file.</param>
    internal static SnapshotFile Describe(string path)
    {
        using var file = File.OpenHandle(path);
        var hash = new XxHash3();
        // The state is hashed at every restore: memory that is touched for the first time would cost more than the hash.
        Span<byte> buffer = stackalloc byte[16 << 10];
        long length = 0;
        for (int read; (read = RandomAccess.Read(file, buffer, length)) > 0; length += read)
        {
            hash.Append(buffer[..read]);
        }

        return new SnapshotFile(length, Convert.ToHexStringLower(hash.GetCurrentHash()));
    }

    /// <summary>The files that a manifest records.</summary>
    internal static IReadOnlyList<string> FileNames(string memoryName) => [memoryName, StateName, RootDiskName, KernelName, InitrdName];

    private static string NameOfMemory(SnapshotManifest manifest) =>
        manifest.Files.ContainsKey(CompressedMemoryName) && !manifest.Files.ContainsKey(MemoryName) ? CompressedMemoryName : MemoryName;

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
