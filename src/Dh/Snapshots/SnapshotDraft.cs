using Dh.Linux;

namespace Dh.Snapshots;

/// <summary>
/// The end of a snapshot's making: its files, then the manifest that names them, come to lie on the disk. After both, what is still to be
/// written of a draft is its working set, which syncs itself, and the draft can be published.
/// </summary>
internal static class SnapshotDraft
{
    /// <summary>Hashes the files that a manifest records, takes the right to write them away, and writes them to the disk.</summary>
    /// <param name="draft">The draft's directory.</param>
    /// <param name="memoryName"><see cref="Snapshot.MemoryName"/> or <see cref="Snapshot.CompressedMemoryName"/>.</param>
    /// <param name="cancellationToken">Gives up between files.</param>
    /// <returns>What the manifest says of each.</returns>
    /// <exception cref="IOException">A file cannot be read, or the disk failed.</exception>
    public static Dictionary<string, SnapshotFile> FinishFiles(string draft, string memoryName, CancellationToken cancellationToken)
    {
        var files = new Dictionary<string, SnapshotFile>();
        foreach (string name in Snapshot.FileNames(memoryName))
        {
            string path = Path.Combine(draft, name);
            cancellationToken.ThrowIfCancellationRequested();
            files[name] = Snapshot.Describe(path);
            if (!OperatingSystem.IsWindows())
            {
                // Whoever runs a jailed VMM reads it there; nobody else comes into the store's directory.
                File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.GroupRead | UnixFileMode.OtherRead);
            }

            Files.Sync(path);
        }

        return files;
    }

    /// <summary>Writes the manifest; when it returns, it and the names of all files are on the disk.</summary>
    /// <param name="draft">The draft's directory.</param>
    /// <param name="manifest">The manifest.</param>
    /// <exception cref="IOException">It cannot be written, or the disk failed.</exception>
    public static void WriteManifest(string draft, SnapshotManifest manifest)
    {
        string path = Path.Combine(draft, Snapshot.ManifestName);
        File.WriteAllBytes(path, manifest.ToJson());
        Files.Sync(path);
        Files.Sync(draft);
    }
}
