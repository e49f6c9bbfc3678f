using Dh.Linux;
using Dh.Paging;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.Sandboxes;

/// <summary>Where the memory of one sandbox comes from: what was asked for, as far as the snapshot and this host allow it.</summary>
/// <param name="Backend">What the VMM gets; the driver closes its descriptors.</param>
/// <param name="Notice">A line for the user: what is not as one would expect.</param>
internal sealed record MemoryChoice(MemoryBackend Backend, string? Notice)
{
    /// <summary>Chooses the memory backend: Uffd, or File when that was asked for, or when nothing was and this host grants no userfaultfd.</summary>
    /// <param name="snapshot">What is restored.</param>
    /// <param name="driver">What restores it.</param>
    /// <param name="wish">What was asked for; null for the best.</param>
    /// <exception cref="DhException">This host cannot do what was asked for.</exception>
    public static MemoryChoice Of(Snapshot snapshot, IVmmDriver driver, MemoryPolicy? wish)
    {
        if (wish == MemoryPolicy.File)
        {
            return !snapshot.IsCompressed
                ? File(snapshot, null)
                : throw new DhException(
                    DhErrorReason.Host,
                    $"Memory policy file cannot map the compressed memory of snapshot {snapshot.Directory}: it comes back through a userfaultfd only. Use --memory-policy eager, prefetch or lazy, or run `dh vm prepare --force` without --compress.");
        }

        if (driver.UffdRefusal is { } vmmRefusal)
        {
            return Without(snapshot, wish, vmmRefusal, "Use a newer one", null);
        }

        try
        {
            return new MemoryChoice(new MemoryBackend.Uffd(Userfaultfd.OpenDevice()), null);
        }
        catch (LinuxException e)
        {
            return Without(snapshot, wish, e.Message, $"Give this user access to {Userfaultfd.DevicePath}", e);
        }
    }

    /// <summary>Opens what the page server reads, and settles its policy: prefetch where there is a working set that can be used, else eager.</summary>
    /// <param name="snapshot">What is restored.</param>
    /// <param name="wish">What was asked for; null for the best.</param>
    /// <exception cref="PageServerException">The memory file cannot be opened.</exception>
    public static (MemoryPolicy Policy, IMemorySource Source, string? Notice) OpenSource(Snapshot snapshot, MemoryPolicy? wish)
    {
        var memory = snapshot.OpenMemory();
        if (wish is MemoryPolicy.Eager or MemoryPolicy.Lazy)
        {
            return (wish.Value, memory, null);
        }

        if (!System.IO.File.Exists(snapshot.WorkingSetPath))
        {
            return (MemoryPolicy.Eager, memory, wish is null ? null : "the snapshot has no working set to prefetch (dh vm record makes one): all of it is copied");
        }

        try
        {
            return (MemoryPolicy.Prefetch, WorkingSetSource.Open(memory, snapshot.WorkingSetPath, snapshot.Manifest.Id), null);
        }
        catch (PageServerException e)
        {
            return (MemoryPolicy.Eager, memory, e.Message);
        }
    }

    /// <summary>Does without a page server, unless one was asked for or nothing else can read the memory.</summary>
    private static MemoryChoice Without(Snapshot snapshot, MemoryPolicy? wish, string why, string advice, Exception? inner) =>
        snapshot.IsCompressed ? throw new DhException(
            DhErrorReason.Host, $"The compressed memory of snapshot {snapshot.Directory} needs a userfaultfd: {why}. {advice}, or run `dh vm prepare --force` without --compress.", inner)
        : wish is not null ? throw new DhException(
            DhErrorReason.Host, $"Memory policy {wish.ToString()!.ToLowerInvariant()} needs a userfaultfd: {why}. {advice}, or use --memory-policy file.", inner)
        : File(snapshot, $"no userfaultfd here ({why}): the VMM maps the memory file instead");

    private static MemoryChoice File(Snapshot snapshot, string? notice)
    {
        IReadOnlyList<FileExtent> written = [];
        try
        {
            if (System.IO.File.Exists(snapshot.WorkingSetPath))
            {
                written = WorkingSetFile.Read(snapshot.WorkingSetPath, snapshot.Manifest.Id, snapshot.Machine.MemoryBytes).Set.Written;
            }
        }
        catch (PageServerException e)
        {
            notice = notice is null ? e.Message : $"{notice}. {e.Message}";
        }

        return new MemoryChoice(new MemoryBackend.File(snapshot.MemoryPath, written), notice);
    }
}
