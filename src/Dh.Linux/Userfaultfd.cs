using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>How a copy into (or zeroing of) registered memory ended. What is expected in the life of a page server is an outcome; the rest throws.</summary>
public enum PagePlacement
{
    /// <summary>Every byte that was asked for is in place.</summary>
    Complete,

    /// <summary>Some bytes went in; go on behind them. Says nothing about why it stopped: the next call does.</summary>
    Partial,

    /// <summary>The first page was there already (EEXIST): step over that one page.</summary>
    Exists,

    /// <summary>The address space is changing (EAGAIN): read the pending events, then try again.</summary>
    Again,

    /// <summary>The process is gone (ESRCH): there is nothing left to serve.</summary>
    Gone,

    /// <summary>The range is not, or not wholly, registered memory (ENOENT): it never was, or was unmapped.</summary>
    NotRegistered,

    /// <summary>The source could not be read (EFAULT): for a mapped file, it was truncated.</summary>
    SourceFault,
}

/// <summary>Result of <see cref="Userfaultfd.Copy"/> and <see cref="Userfaultfd.ZeroPage"/>.</summary>
/// <param name="Outcome">How it ended.</param>
/// <param name="Bytes">Bytes that went in, a multiple of the page size; 0 unless <see cref="PagePlacement.Complete"/> or <see cref="PagePlacement.Partial"/>.</param>
public readonly record struct PagePlacementResult(PagePlacement Outcome, long Bytes);

/// <summary>A copy into registered memory.</summary>
/// <param name="Destination">Address in the memory of the process that made the userfaultfd, page-aligned.</param>
/// <param name="Source">Address in this process.</param>
/// <param name="Length">Bytes, a multiple of the page size.</param>
public readonly record struct PageCopy(ulong Destination, nuint Source, ulong Length);

/// <summary>Kinds of events (linux/userfaultfd.h, UFFD_EVENT_*).</summary>
public enum UserfaultfdEventKind
{
    /// <summary>A thread waits for a page.</summary>
    PageFault = UFFD_EVENT_PAGEFAULT,

    /// <summary>The process forked.</summary>
    Fork = UFFD_EVENT_FORK,

    /// <summary>A range moved.</summary>
    Remap = UFFD_EVENT_REMAP,

    /// <summary>A range was given back (MADV_DONTNEED, MADV_REMOVE): it reads as zeros from now on.</summary>
    Remove = UFFD_EVENT_REMOVE,

    /// <summary>A range was unmapped.</summary>
    Unmap = UFFD_EVENT_UNMAP,
}

/// <summary>One event of a userfaultfd.</summary>
/// <param name="Kind">What happened.</param>
/// <param name="Address">The faulting address, or the start of the range.</param>
/// <param name="End">The end of the range, exclusive; equal to <paramref name="Address"/> for a page fault.</param>
/// <param name="IsWrite">For a page fault: the thread wants to write.</param>
public readonly record struct UserfaultfdEvent(UserfaultfdEventKind Kind, ulong Address, ulong End, bool IsWrite);

/// <summary>
/// A userfaultfd: page faults of registered memory are resolved by whoever holds it (userfaultfd(2), ioctl_userfaultfd(2)).
/// Memory that is registered must not be touched by managed code of this process: the garbage collector may stop the world while the
/// touching thread sleeps in the kernel, and the thread that would serve it sleeps with the world.
/// </summary>
public sealed class Userfaultfd : IDisposable
{
    /// <summary>The device through which unprivileged processes may be granted a userfaultfd.</summary>
    public const string DevicePath = "/dev/userfaultfd";

    /// <summary>Feature: REMOVE events are delivered (UFFD_FEATURE_EVENT_REMOVE).</summary>
    public const ulong FeatureEventRemove = UFFD_FEATURE_EVENT_REMOVE;

    private readonly SafeFileHandle _handle;

    /// <summary>Takes ownership of a descriptor that was received from another process.</summary>
    /// <param name="handle">The descriptor; closed by <see cref="Dispose"/>.</param>
    public Userfaultfd(SafeFileHandle handle)
    {
        ArgumentNullException.ThrowIfNull(handle);
        _handle = handle;
    }

    /// <summary>
    /// Takes ownership of a descriptor that a peer sent as its userfaultfd, if it is one, and makes it non-blocking: poll(2) reports a
    /// blocking one as an error, and a read of it waits for ever.
    /// </summary>
    /// <param name="handle">The descriptor; the caller keeps it when the answer is null.</param>
    /// <returns>Null when it is something else.</returns>
    /// <exception cref="LinuxException">Its flags cannot be changed.</exception>
    public static Userfaultfd? FromPeer(SafeFileHandle handle)
    {
        ArgumentNullException.ThrowIfNull(handle);
        if (new FileInfo($"/proc/self/fd/{handle.DangerousGetHandle()}").LinkTarget != "anon_inode:[userfaultfd]")
        {
            return null;
        }

        var uffd = new Userfaultfd(handle);
        uffd.SetNonBlocking();
        return uffd;
    }

    /// <summary>The descriptor, for polling and passing on.</summary>
    public SafeFileHandle Handle => _handle;

    /// <summary>Makes the descriptor non-blocking. Whoever shares it may undo that: poll(2) then reports an error, and this is the answer.</summary>
    /// <exception cref="LinuxException">Its flags cannot be changed.</exception>
    public void SetNonBlocking()
    {
        int flags = Libc.Fcntl(_handle, F_GETFL, 0);
        if (flags < 0 || Libc.Fcntl(_handle, F_SETFL, flags | O_NONBLOCK) < 0)
        {
            throw LinuxException.Last("fcntl O_NONBLOCK");
        }
    }

    /// <summary>Opens <see cref="DevicePath"/>: a descriptor that another process may inherit and turn into a userfaultfd of its own memory.</summary>
    /// <exception cref="LinuxException">ENOENT: the kernel has no such device. EACCES: this user may not open it. ENOTTY: it is something else.</exception>
    public static SafeFileHandle OpenDevice()
    {
        var device = Libc.Open(DevicePath, O_RDWR | O_CLOEXEC, 0);
        try
        {
            if (device.IsInvalid)
            {
                throw LinuxException.Last($"open {DevicePath}");
            }

            // That it opens proves nothing: a container may have put another file in its place.
            New(device).Dispose();
            return device;
        }
        catch
        {
            device.Dispose();
            throw;
        }
    }

    /// <summary>A new userfaultfd for this process's memory, non-blocking and close-on-exec; the API is not enabled yet.</summary>
    /// <exception cref="LinuxException">The device or the kernel does not grant it.</exception>
    public static Userfaultfd Create()
    {
        using var device = OpenDevice();
        return New(device);
    }

    private static Userfaultfd New(SafeFileHandle device)
    {
        int fd = Libc.Ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        return fd >= 0 ? new Userfaultfd(new SafeFileHandle(fd, ownsHandle: true)) : throw LinuxException.Last($"USERFAULTFD_IOC_NEW of {DevicePath}");
    }

    /// <summary>Enables the API with the wanted features (UFFDIO_API). Done once per descriptor; a second time is EINVAL.</summary>
    /// <param name="features">A mask of features; 0 for none.</param>
    /// <exception cref="LinuxException">The kernel lacks a feature, or the API was enabled before.</exception>
    public unsafe void Api(ulong features)
    {
        var api = new UffdioApi { Api = UFFD_API, Features = features };
        // SAFETY: api lives on this stack frame for the whole call and has the layout of struct uffdio_api.
        Check(Libc.Ioctl(_handle, UFFDIO_API, (nint)(&api)), "UFFDIO_API", features, 0);
    }

    /// <summary>Registers a range in missing mode (UFFDIO_REGISTER).</summary>
    /// <param name="address">Start, page-aligned.</param>
    /// <param name="length">Length in bytes, a multiple of the page size.</param>
    /// <exception cref="LinuxException">The range is not mapped, not anonymous, or registered elsewhere.</exception>
    public unsafe void Register(ulong address, ulong length)
    {
        var register = new UffdioRegister { Range = new UffdioRange { Start = address, Length = length }, Mode = UFFDIO_REGISTER_MODE_MISSING };
        // SAFETY: register lives on this stack frame for the whole call and has the layout of struct uffdio_register.
        Check(Libc.Ioctl(_handle, UFFDIO_REGISTER, (nint)(&register)), "UFFDIO_REGISTER", address, length);
    }

    /// <summary>
    /// Gives a range back to the kernel (UFFDIO_UNREGISTER) and wakes whoever waits in it: missing pages become the kernel's zero pages. The
    /// kernel wakes them as well, but before it takes the locks of the mappings (fs/userfaultfd.c, userfaultfd_unregister): a thread that
    /// faults in between sleeps for ever, and its fault can still be read. So they are woken once more.
    /// </summary>
    /// <param name="address">Start, page-aligned.</param>
    /// <param name="length">Length in bytes, a multiple of the page size.</param>
    /// <returns>False when the process is gone.</returns>
    /// <exception cref="LinuxException">The range is not registered here.</exception>
    public unsafe bool Unregister(ulong address, ulong length)
    {
        var range = new UffdioRange { Start = address, Length = length };
        // SAFETY: range lives on this stack frame for the whole call and has the layout of struct uffdio_range.
        if (Libc.Ioctl(_handle, UFFDIO_UNREGISTER, (nint)(&range)) == 0)
        {
            Wake(address, length);
            return true;
        }

        return LinuxException.LastErrno is Errno.ESRCH or Errno.ENOENT or Errno.ENOMEM
            ? false
            : throw LinuxException.Last($"UFFDIO_UNREGISTER {address:x}+{length:x}");
    }

    /// <summary>Puts pages into a registered range and wakes the threads that wait for them (UFFDIO_COPY).</summary>
    /// <param name="destination">Address in the memory of the process that made the userfaultfd, page-aligned.</param>
    /// <param name="source">Address in this process.</param>
    /// <param name="length">Bytes, a multiple of the page size.</param>
    /// <returns>What happened; errors that belong to a page server's life are outcomes.</returns>
    /// <exception cref="LinuxException">EINVAL and whatever else says that the caller is wrong.</exception>
    /// <exception cref="ObjectDisposedException">It is closed. It must not be closed while this is under way.</exception>
    public unsafe PagePlacementResult Copy(ulong destination, nuint source, ulong length)
    {
        ObjectDisposedException.ThrowIf(_handle.IsClosed, this);
        var copy = new UffdioCopy { Destination = destination, Source = source, Length = length };
        // SAFETY: copy lives on this stack frame for the whole call and has the layout of struct uffdio_copy. The kernel only reads
        // `source`, and answers EFAULT when it cannot; it writes to `destination` only in memory that was registered with this descriptor.
        // The descriptor stays open: it is not closed while copies are under way, and _handle keeps it from the finalizer.
        int result = Libc.Ioctl((int)_handle.DangerousGetHandle(), UFFDIO_COPY, (nint)(&copy));
        GC.KeepAlive(_handle);
        return Placement(result, copy.Copied, "UFFDIO_COPY", destination, length);
    }

    /// <summary>Makes one copy after the other until one does not go in whole; why, <see cref="Copy"/> says of that one.</summary>
    /// <param name="copies">As for <see cref="Copy"/>.</param>
    /// <returns>How many went in whole, from the first on.</returns>
    /// <exception cref="ObjectDisposedException">It is closed. It must not be closed while this is under way.</exception>
    public unsafe int CopyAll(ReadOnlySpan<PageCopy> copies)
    {
        ObjectDisposedException.ThrowIf(_handle.IsClosed, this);
        int descriptor = (int)_handle.DangerousGetHandle(), done = 0;
        for (; done < copies.Length; done++)
        {
            var copy = new UffdioCopy { Destination = copies[done].Destination, Source = copies[done].Source, Length = copies[done].Length };
            // SAFETY: as in Copy.
            if (Libc.Ioctl(descriptor, UFFDIO_COPY, (nint)(&copy)) != 0)
            {
                break;
            }
        }

        GC.KeepAlive(_handle);
        return done;
    }

    /// <summary>Maps the kernel's zero page into a registered range (UFFDIO_ZEROPAGE). Not possible with huge pages.</summary>
    /// <param name="destination">Address in the memory of the process that made the userfaultfd, page-aligned.</param>
    /// <param name="length">Bytes, a multiple of the page size.</param>
    /// <returns>As <see cref="Copy"/>.</returns>
    /// <exception cref="LinuxException">EINVAL and whatever else says that the caller is wrong.</exception>
    public unsafe PagePlacementResult ZeroPage(ulong destination, ulong length)
    {
        var zero = new UffdioZeroPage { Range = new UffdioRange { Start = destination, Length = length } };
        // SAFETY: zero lives on this stack frame for the whole call and has the layout of struct uffdio_zeropage.
        int result = Libc.Ioctl(_handle, UFFDIO_ZEROPAGE, (nint)(&zero));
        return Placement(result, zero.Zeroed, "UFFDIO_ZEROPAGE", destination, length);
    }

    /// <summary>Wakes the threads that wait in a range, without placing a page (UFFDIO_WAKE).</summary>
    /// <param name="address">Start, page-aligned.</param>
    /// <param name="length">Length in bytes, a multiple of the page size.</param>
    /// <exception cref="LinuxException">EINVAL and whatever else says that the caller is wrong.</exception>
    public unsafe void Wake(ulong address, ulong length)
    {
        var range = new UffdioRange { Start = address, Length = length };
        // SAFETY: range lives on this stack frame for the whole call and has the layout of struct uffdio_range.
        Check(Libc.Ioctl(_handle, UFFDIO_WAKE, (nint)(&range)), "UFFDIO_WAKE", address, length);
    }

    /// <summary>Reads the events that wait, without blocking.</summary>
    /// <param name="events">Where they go; at most its length are read.</param>
    /// <returns>How many were read; 0 when none waits.</returns>
    /// <exception cref="LinuxException">The read failed.</exception>
    public unsafe int ReadEvents(Span<UserfaultfdEvent> events)
    {
        const int Batch = 32;
        UffdMsg* messages = stackalloc UffdMsg[Batch];
        var vector = new IoVec { Base = messages, Length = (nuint)(Math.Min(events.Length, Batch) * sizeof(UffdMsg)) };
        nint bytes;
        do
        {
            // SAFETY: the buffer holds as many bytes as the vector says; the kernel writes whole struct uffd_msg only. RWF_NOWAIT does not
            // block even when a peer, which shares the descriptor's flags, has made it blocking; Linux before 6.10 does not know it here.
            bytes = Libc.PReadV2(_handle, &vector, 1, -1, RWF_NOWAIT);
            if (bytes < 0 && LinuxException.LastErrno == Errno.EOPNOTSUPP)
            {
                bytes = Libc.Read(_handle, messages, vector.Length);
            }
        }
        while (bytes < 0 && LinuxException.LastErrno == Errno.EINTR);

        if (bytes < 0)
        {
            return LinuxException.LastErrno == Errno.EAGAIN ? 0 : throw LinuxException.Last("read userfaultfd");
        }

        int count = (int)bytes / sizeof(UffdMsg);
        for (int i = 0; i < count; i++)
        {
            var kind = (UserfaultfdEventKind)messages[i].Event;
            events[i] = kind == UserfaultfdEventKind.PageFault
                ? new UserfaultfdEvent(kind, messages[i].PageFaultAddress, messages[i].PageFaultAddress, (messages[i].PageFaultFlags & UFFD_PAGEFAULT_FLAG_WRITE) != 0)
                : new UserfaultfdEvent(kind, messages[i].RemoveStart, messages[i].RemoveEnd, false);
        }

        return count;
    }

    /// <summary>Closes the descriptor. A guest whose pages are still missing then reads zeros or hangs: release or kill it first.</summary>
    public void Dispose() => _handle.Dispose();

    private static PagePlacementResult Placement(int result, long bytes, string operation, ulong address, ulong length)
    {
        if (result == 0)
        {
            return new PagePlacementResult(PagePlacement.Complete, bytes);
        }

        // ioctl_userfaultfd(2): a copy that stops early fails with EAGAIN and says in `copy` how far it came.
        if (bytes > 0)
        {
            return new PagePlacementResult(PagePlacement.Partial, bytes);
        }

        var errno = LinuxException.LastErrno;
        return errno switch
        {
            Errno.EEXIST => new PagePlacementResult(PagePlacement.Exists, 0),
            Errno.EAGAIN => new PagePlacementResult(PagePlacement.Again, 0),
            Errno.ESRCH => new PagePlacementResult(PagePlacement.Gone, 0),
            Errno.ENOENT => new PagePlacementResult(PagePlacement.NotRegistered, 0),
            Errno.EFAULT => new PagePlacementResult(PagePlacement.SourceFault, 0),
            _ => throw new LinuxException($"{operation} {address:x}+{length:x}", errno),
        };
    }

    private static void Check(int result, string operation, ulong address, ulong length)
    {
        if (result != 0)
        {
            throw LinuxException.Last($"{operation} {address:x}+{length:x}");
        }
    }
}
