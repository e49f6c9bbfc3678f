using Dh.Paging;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.TestSupport;

/// <summary>A snapshot's directory, of which no machine was made.</summary>
public static class WrittenSnapshot
{
    /// <summary>Writes its files.</summary>
    /// <param name="directory">Where; it exists.</param>
    /// <param name="compressed">Whether memory is in LZ4 blocks.</param>
    /// <param name="memoryLength">The memory file's length.</param>
    /// <param name="memoryMib">What the manifest says of it.</param>
    /// <param name="without">A file that the manifest does not record.</param>
    /// <param name="id">Its name.</param>
    /// <param name="seed">What its memory looks like.</param>
    /// <returns>Its manifest.</returns>
    public static SnapshotManifest Write(string directory, bool compressed, long memoryLength, int memoryMib, string? without = null, string id = "id", int seed = 1)
    {
        string PathOf(string name) => Path.Combine(directory, name);
        SparseFileBuilder.Write(PathOf("memory"), memoryLength, seed);
        if (compressed)
        {
            Lz4MemoryWriter.Write(PathOf("memory"), PathOf("memory.lz4"));
            File.Delete(PathOf("memory"));
        }

        foreach (string name in (string[])["state", "root.img", "kernel", "initrd"])
        {
            File.WriteAllText(PathOf(name), $"{name} of {id}");
        }

        var manifest = new SnapshotManifest
        {
            SchemaVersion = SnapshotManifest.CurrentSchemaVersion,
            Id = id,
            Template = "python",
            ImageHash = "0",
            Version = "3.11",
            Vmm = "qemu",
            VmmVersion = "7.2",
            MachineHash = "0",
            Accelerator = Accelerator.Tcg,
            MemoryMib = memoryMib,
            Cpus = 2,
            TscKhz = 1,
            DataBytes = 1,
            BootSeconds = 1,
            CreatedAt = DateTimeOffset.UnixEpoch,
            RunnerProtocol = 1,
            DhVersion = "0",
            Files = Directory.EnumerateFiles(directory).Where(path => Path.GetFileName(path) != without).ToDictionary(path => Path.GetFileName(path), Snapshot.Describe),
        };
        File.WriteAllBytes(PathOf("manifest.json"), manifest.ToJson());
        return manifest;
    }
}
