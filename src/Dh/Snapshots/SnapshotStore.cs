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
    private const string LinkSuffix = ".link"; // of a link that is about to become the current one

    /// <summary>The current snapshots, newest first; damaged ones are left out.</summary>
    /// <exception cref="IOException">The directory cannot be read.</exception>
    public IReadOnlyList<Snapshot> List() => List(out _);

    /// <summary>The current snapshots, newest first, and why those that are left out cannot be used.</summary>
    /// <param name="damaged">A line for each that is left out; it names the file.</param>
    /// <param name="template">Only this template's; null for all.</param>
    /// <param name="version">Only this version's; null for all.</param>
    /// <exception cref="IOException">The directory cannot be read.</exception>
    public IReadOnlyList<Snapshot> List(out IReadOnlyList<string> damaged, string? template = null, string? version = null)
    {
        var snapshots = new List<Snapshot>();
        var reasons = new List<string>();
        foreach (string entry in Entries().Where(entry => IsOf(Path.GetFileName(entry), template, version)))
        {
            try
            {
                var snapshot = Snapshot.Open(Resolve(entry));
                // A name may be taken apart in two ways.
                if ((template ?? snapshot.Manifest.Template) == snapshot.Manifest.Template && (version ?? snapshot.Manifest.Version) == snapshot.Manifest.Version)
                {
                    snapshots.Add(snapshot);
                }
            }
            catch (DhException e)
            {
                reasons.Add(e.Message);
            }
        }

        damaged = reasons;
        return [.. snapshots.OrderByDescending(snapshot => snapshot.Manifest.CreatedAt)];
    }

    /// <summary>Opens the current snapshot of a template's version.</summary>
    /// <param name="template">The template's name.</param>
    /// <param name="version">The engine's version.</param>
    /// <exception cref="DhException">There is none, or it is damaged.</exception>
    public Snapshot Open(string template, string version)
    {
        string entry = Path.Combine(home.SnapshotsDirectory, $"{template}-{version}");
        if (Path.GetFileName(entry) != $"{template}-{version}" || !Files.Exists(Path.Combine(entry, CurrentName)))
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
    public Snapshot? FindNewest(string? template) => List(out _, template) is [var newest, ..] ? newest : null;

    /// <summary>Removes snapshots that no running sandbox uses.</summary>
    /// <param name="template">Only this template's; null for all.</param>
    /// <param name="version">Only this version's; null for all.</param>
    /// <returns>The directories that were removed.</returns>
    public IReadOnlyList<string> Clean(string? template, string? version)
    {
        var removed = new List<string>();
        foreach (string entry in Entries(withCurrent: false))
        {
            if (!IsOf(Path.GetFileName(entry), template, version))
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
    /// <exception cref="DhException">It is being deleted, or is gone.</exception>
    internal static FileLock Lease(Snapshot snapshot)
    {
        LinuxException? gone = null;
        try
        {
            if (FileLock.TryAcquireDirectory(snapshot.Directory, shared: true) is { } lease)
            {
                return lease;
            }
        }
        catch (LinuxException e) when (e.Errno == Errno.ENOENT)
        {
            gone = e;
        }

        throw new DhException(DhErrorReason.Snapshot, $"Snapshot {snapshot.Directory} is being removed. Run `dh vm status` to see what is there.", gone);
    }

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

        foreach (string dead in Entries(withCurrent: false).SelectMany(entry => Directory.EnumerateFileSystemEntries(entry, $".*{LinkSuffix}")))
        {
            File.Delete(dead);
        }
    }

    /// <summary>A new directory beside the snapshots, for one that is being made. The caller holds the preparation lock.</summary>
    internal string CreateDraft(string id) => DhHome.EnsurePrivate(Path.Combine(home.SnapshotsDirectory, $".draft-{id}"));

    /// <summary>Makes a finished draft the current snapshot of its template's version.</summary>
    internal Snapshot Publish(string draft, SnapshotManifest manifest)
    {
        foreach (var step in PublicationSteps(draft, manifest))
        {
            step();
        }

        return Snapshot.Open(Path.Combine(EntryOf(manifest), manifest.Id));
    }

    /// <summary>
    /// The steps of a publication: a process or a host that ends between any two leaves the old snapshot or the new one in use, whole. The
    /// draft's files are on the disk before the first.
    /// </summary>
    internal IEnumerable<Action> PublicationSteps(string draft, SnapshotManifest manifest)
    {
        string entry = EntryOf(manifest), link = Path.Combine(entry, $".{manifest.Id}{LinkSuffix}");
        yield return () => DhHome.EnsurePrivate(entry);
        yield return SyncAbove; // a directory's own name stands in the one above it (fsync(2)), and the first snapshot has all of them made
        yield return () => Files.Rename(draft, Path.Combine(entry, manifest.Id));
        yield return () => Files.Sync(entry); // what the link names comes before the link
        yield return () => File.CreateSymbolicLink(link, manifest.Id);
        yield return () => Files.Rename(link, Path.Combine(entry, CurrentName));
        yield return () => Files.Sync(entry);
        yield return () => RemoveUnused(entry, except: manifest.Id);

        void SyncAbove()
        {
            Files.Sync(home.SnapshotsDirectory);
            Files.Sync(Path.GetDirectoryName(home.SnapshotsDirectory)!);
            Files.Sync(home.Path);
        }
    }

    /// <summary>Whether a name can be TEMPLATE-VERSION of these.</summary>
    private static bool IsOf(string name, string? template, string? version) =>
        (template is null || name.StartsWith($"{template}-", StringComparison.Ordinal)) && (version is null || name.EndsWith($"-{version}", StringComparison.Ordinal));

    private string EntryOf(SnapshotManifest manifest) => Path.Combine(home.SnapshotsDirectory, $"{manifest.Template}-{manifest.Version}");

    private List<string> RemoveUnused(string entry, string? except)
    {
        var removed = new List<string>();
        foreach (string directory in Directory.EnumerateDirectories(entry))
        {
            string name = Path.GetFileName(directory);
            if (name is CurrentName || name == except || name.EndsWith(LinkSuffix, StringComparison.Ordinal))
            {
                continue;
            }

            using var exclusive = FileLock.TryAcquireDirectory(directory);
            if (exclusive is not null)
            {
                Directory.Delete(directory, recursive: true);
                RestoreLog.Remove(home, name);
                removed.Add(directory);
            }
        }

        return removed;
    }

    private static string Resolve(string entry) => Path.Combine(entry, Path.GetFileName(File.ResolveLinkTarget(Path.Combine(entry, CurrentName), returnFinalTarget: false)?.FullName ?? CurrentName));

    private IEnumerable<string> Entries(bool withCurrent = true) => Files.Exists(home.SnapshotsDirectory)
        ? Directory.EnumerateDirectories(home.SnapshotsDirectory)
            .Where(entry => !Path.GetFileName(entry).StartsWith('.') && (!withCurrent || Files.Exists(Path.Combine(entry, CurrentName))))
            .Order(StringComparer.Ordinal)
        : [];
}
