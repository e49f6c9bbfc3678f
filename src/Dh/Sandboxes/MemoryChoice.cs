using System.Net.Sockets;
using Dh.Linux;
using Dh.Paging;
using Dh.Snapshots;
using Dh.Vmm;
using Microsoft.Win32.SafeHandles;

namespace Dh.Sandboxes;

/// <summary>Where the memory of one sandbox comes from: what was asked for, as far as the snapshot and this host allow it.</summary>
/// <param name="Backend">What the VMM gets; the driver closes its descriptors.</param>
/// <param name="Connection">The page server's end of the handshake socket; null without a page server.</param>
/// <param name="Notice">A line for the user: what is not as one would expect.</param>
internal sealed record MemoryChoice(MemoryBackend Backend, SafeSocketHandle? Connection, string? Notice)
{
    /// <summary>The guest memory that the page server fills before the VMM maps it; null when the VMM has memory of its own.</summary>
    public SafeFileHandle? Backing => (Backend as MemoryBackend.Uffd)?.Backing;

    /// <summary>Chooses the memory backend: Uffd, or File when that was asked for, or when nothing was and this host grants no userfaultfd.</summary>
    /// <param name="snapshot">What is restored.</param>
    /// <param name="wish">What was asked for; null for the best.</param>
    /// <exception cref="DhException">This host cannot do what was asked for.</exception>
    public static MemoryChoice Of(Snapshot snapshot, MemoryPolicy? wish)
    {
        if (wish == MemoryPolicy.File)
        {
            return !snapshot.IsCompressed
                ? File(snapshot, null)
                : throw new DhException(
                    DhErrorReason.Host,
                    $"Memory policy file cannot map the compressed memory of snapshot {snapshot.Directory}: it comes back through a userfaultfd only. Use --memory-policy eager, prefetch or lazy, or run `dh vm prepare --force` without --compress.");
        }

        SafeFileHandle device;
        try
        {
            device = Userfaultfd.OpenDevice();
        }
        catch (LinuxException e) when (snapshot.IsCompressed)
        {
            throw new DhException(
                DhErrorReason.Host,
                $"The compressed memory of snapshot {snapshot.Directory} needs a userfaultfd: {e.Message}. Give this user access to {Userfaultfd.DevicePath}, or run `dh vm prepare --force` without --compress.",
                e);
        }
        catch (LinuxException e) when (wish is null)
        {
            return File(snapshot, $"no userfaultfd here ({e.Message}): the VMM maps the memory file instead");
        }
        catch (LinuxException e)
        {
            throw new DhException(
                DhErrorReason.Host,
                $"Memory policy {wish.ToString()!.ToLowerInvariant()} needs a userfaultfd: {e.Message}. Give this user access to {Userfaultfd.DevicePath}, or use --memory-policy file.",
                e);
        }

        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        var backing = wish == MemoryPolicy.Lazy ? null : MemoryFile.CreateSealed("guest-memory", snapshot.Machine.MemoryBytes);
        return new MemoryChoice(new MemoryBackend.Uffd(theirs, device, backing), ours, null);
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

        return new MemoryChoice(new MemoryBackend.File(snapshot.MemoryPath, written), null, notice);
    }
}
