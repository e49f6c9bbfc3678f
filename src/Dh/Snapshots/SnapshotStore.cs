using Dh.Linux;

namespace Dh.Snapshots;

/// <summary>
/// The snapshots of a user: <c>vm/snapshots/TEMPLATE-VERSION/ID/</c>, and beside the ids <c>current</c>, a symbolic link to the one in use.
/// A running sandbox holds a shared lock on its snapshot's directory; what is locked is not deleted.
/// </summary>
/// <param name="home">Where.</param>
public sealed class SnapshotStore(DhHome home)
{
    private const string CurrentName = "current";

    /// <summary>The current snapshots, newest first; damaged ones are left out.</summary>
    public IReadOnlyList<Snapshot> List() => [.. Entries()
        .Select(entry => TryOpen(entry, out _))
        .OfType<Snapshot>()
        .OrderByDescending(snapshot => snapshot.Manifest.CreatedAt)];

    /// <summary>Why the current snapshots that <see cref="List"/> leaves out cannot be used.</summary>
    public IReadOnlyList<string> Damaged() => [.. Entries().Select(entry => TryOpen(entry, out string? why) is null ? why : null).OfType<string>()];

    /// <summary>Opens the current snapshot of a template's version.</summary>
    /// <param name="template">The template's name.</param>
    /// <param name="version">The engine's version.</param>
    /// <exception cref="DhException">There is none, or it is damaged.</exception>
    public Snapshot Open(string template, string version)
    {
        string entry = Path.Combine(home.SnapshotsDirectory, $"{template}-{version}");
        if (Path.GetFileName(entry) != $"{template}-{version}" || !Directory.Exists(Path.Combine(entry, CurrentName)))
        {
            string known = string.Join(", ", List().Select(snapshot => $"{snapshot.Manifest.Template} {snapshot.Manifest.Version}"));
            throw new DhException(
                DhErrorReason.NotFound,
                $"There is no snapshot of {template} {version} in {home.SnapshotsDirectory} ({(known.Length == 0 ? "it is empty" : $"prepared: {known}")}). Run `dh vm prepare`.");
        }

        return Snapshot.Open(Resolve(entry));
    }

    /// <summary>The newest snapshot that can be used.</summary>
    /// <param name="template">Of this template; null for any.</param>
    public Snapshot? FindNewest(string? template) => List().FirstOrDefault(snapshot => template is null || snapshot.Manifest.Template == template);

    /// <summary>Removes snapshots that no running sandbox uses.</summary>
    /// <param name="template">Only this template's; null for all.</param>
    /// <param name="version">Only this version's; null for all.</param>
    /// <returns>The directories that were removed.</returns>
    public IReadOnlyList<string> Clean(string? template, string? version)
    {
        var removed = new List<string>();
        foreach (string entry in Entries(withCurrent: false))
        {
            string name = Path.GetFileName(entry);
            if ((template is not null && !name.StartsWith($"{template}-", StringComparison.Ordinal)) || (version is not null && !name.EndsWith($"-{version}", StringComparison.Ordinal)))
            {
                continue;
            }

            File.Delete(Path.Combine(entry, CurrentName));
            removed.AddRange(RemoveUnused(entry, except: null));
            if (!Directory.EnumerateFileSystemEntries(entry).Any())
            {
                Directory.Delete(entry);
            }
        }

        return removed;
    }

    /// <summary>Keeps a snapshot from being deleted while it is used.</summary>
    /// <param name="snapshot">The snapshot.</param>
    /// <exception cref="DhException">It is being deleted.</exception>
    internal static FileLock Lease(Snapshot snapshot) => FileLock.TryAcquire(snapshot.Directory, shared: true)
        ?? throw new DhException(DhErrorReason.Snapshot, $"Snapshot {snapshot.Directory} is being removed. Run `dh vm status` to see what is there.");

    /// <summary>Takes the lock under which snapshots are made, one at a time.</summary>
    /// <param name="waiting">Called once when another process holds it.</param>
    /// <param name="cancellationToken">Gives up.</param>
    internal Task<FileLock> LockPreparationAsync(Action waiting, CancellationToken cancellationToken) => FileLock.AcquireAsync(
        Path.Combine(DhHome.EnsurePrivate(home.SnapshotsDirectory), ".prepare.lock"), shared: false, TimeSpan.FromHours(1), waiting, cancellationToken);

    /// <summary>Removes what preparations that died have left. The caller holds the preparation lock.</summary>
    internal void RemoveDeadDrafts()
    {
        foreach (string dead in Directory.EnumerateDirectories(home.SnapshotsDirectory, ".draft-*"))
        {
            Directory.Delete(dead, recursive: true);
        }
    }

    /// <summary>A new directory beside the snapshots, for one that is being made. The caller holds the preparation lock.</summary>
    internal string CreateDraft(string id) => DhHome.EnsurePrivate(Path.Combine(home.SnapshotsDirectory, $".draft-{id}"));

    /// <summary>Makes a finished draft the current snapshot of its template's version: a rename, then one of the link.</summary>
    internal Snapshot Publish(string draft, SnapshotManifest manifest)
    {
        string entry = DhHome.EnsurePrivate(Path.Combine(home.SnapshotsDirectory, $"{manifest.Template}-{manifest.Version}"));
        string final = Path.Combine(entry, manifest.Id);
        Files.Rename(draft, final);
        string link = Path.Combine(entry, $".{manifest.Id}.link");
        File.CreateSymbolicLink(link, manifest.Id);
        Files.Rename(link, Path.Combine(entry, CurrentName));
        Files.Sync(entry);
        RemoveUnused(entry, except: manifest.Id);
        return Snapshot.Open(final);
    }

    private List<string> RemoveUnused(string entry, string? except)
    {
        var removed = new List<string>();
        foreach (string directory in Directory.EnumerateDirectories(entry))
        {
            string name = Path.GetFileName(directory);
            if (name is CurrentName || name == except)
            {
                continue;
            }

            using var exclusive = FileLock.TryAcquire(directory);
            if (exclusive is not null)
            {
                Directory.Delete(directory, recursive: true);
                RestoreLog.Remove(home, name);
                removed.Add(directory);
            }
        }

        return removed;
    }

    private static Snapshot? TryOpen(string entry, out string? why)
    {
        try
        {
            why = null;
            return Snapshot.Open(Resolve(entry));
        }
        catch (DhException e)
        {
            why = e.Message;
            return null;
        }
    }

    private static string Resolve(string entry) => Path.Combine(entry, Path.GetFileName(File.ResolveLinkTarget(Path.Combine(entry, CurrentName), returnFinalTarget: false)?.FullName ?? CurrentName));

    private IEnumerable<string> Entries(bool withCurrent = true) => Directory.Exists(home.SnapshotsDirectory)
        ? Directory.EnumerateDirectories(home.SnapshotsDirectory)
            .Where(entry => !Path.GetFileName(entry).StartsWith('.') && (!withCurrent || Directory.Exists(Path.Combine(entry, CurrentName))))
            .Order(StringComparer.Ordinal)
        : [];
}
