using System.Diagnostics;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// The guest's memory as the page server sees it: the userfaultfd, the regions, and which ranges the guest gave back. Copies may run on
/// several threads at once; events are read under a lock that excludes copies, because a page that is copied between the reading of a
/// REMOVE and its recording would bring back contents that must read as zeros (docs/design.md, "Page server").
/// </summary>
internal sealed class GuestMemory : IDisposable
{
    /// <summary>How long a copy may be refused with EAGAIN before the server gives up: the thread in madvise is not running.</summary>
    private static readonly TimeSpan ChangingLimit = TimeSpan.FromSeconds(5);

    private static readonly TimeSpan RefusalPause = TimeSpan.FromMilliseconds(1);

    /// <summary>Events that are read at a time: a guest that makes them faster than they are read must not keep the copies out for ever.</summary>
    private const int MaxEventBatches = 64;

    /// <summary>Attempts without an event, each with a yield, before a refused copy sleeps: some tenths of a millisecond.</summary>
    private const int MaxQuietRounds = 256;

    private readonly Userfaultfd _uffd;
    private readonly IMemorySource _source;
    private readonly ReaderWriterLockSlim _events = new();
    private readonly AddressRanges _removed = new();
    private long _copiedBytes;

    public GuestMemory(Userfaultfd uffd, IReadOnlyList<GuestRegion> regions, IMemorySource source)
    {
        _uffd = uffd;
        _source = source;
        Regions = regions;
    }

    public IReadOnlyList<GuestRegion> Regions { get; }

    public long CopiedBytes => Interlocked.Read(ref _copiedBytes);

    /// <summary>Copies a piece of the memory file to its place; pages that are there stay, pages that the guest gave back are left out.</summary>
    /// <returns>False when the VMM is gone.</returns>
    /// <exception cref="PageServerException">The memory file or the kernel failed.</exception>
    public bool Copy(CopyPiece piece)
    {
        var refusal = default(Refusal);
        for (ulong done = 0; done < piece.Length;)
        {
            ulong address = piece.Address + done;
            _events.EnterReadLock();
            PagePlacementResult result;
            ulong length = piece.Length - done;
            try
            {
                if (_removed.Covers(address, ref length))
                {
                    done += length;
                    continue;
                }

                result = _uffd.Copy(address, _source.Locate(piece.Offset + (long)done, (long)length), length);
            }
            catch (LinuxException e)
            {
                throw new PageServerException($"Pages of {_source.Path} at offset {piece.Offset + (long)done} could not be placed: {e.Message}", e);
            }
            finally
            {
                _events.ExitReadLock();
            }

            switch (result.Outcome)
            {
                case PagePlacement.Complete or PagePlacement.Partial:
                    done += (ulong)result.Bytes;
                    Interlocked.Add(ref _copiedBytes, result.Bytes);
                    break;
                case PagePlacement.Exists:
                    done += piece.PageSize;
                    break;
                case PagePlacement.Again:
                    AwaitChange(ref refusal, address);
                    continue;
                case PagePlacement.Gone:
                    return false;
                default:
                    throw new PageServerException(
                        $"Memory file {_source.Path} could not be read at offset {piece.Offset + (long)done}: it was truncated while it was in use. Run `dh vm prepare --force`.");
            }

            refusal = default;
        }

        return true;
    }

    /// <summary>
    /// Reads the events that wait and records what was removed. Should some be left, no copy goes wrong: the kernel refuses copies as long
    /// as a REMOVE was not read.
    /// </summary>
    /// <returns>Whether there was one.</returns>
    public bool ReadEvents()
    {
        bool any = false;
        Span<UserfaultfdEvent> events = stackalloc UserfaultfdEvent[32];
        _events.EnterWriteLock();
        try
        {
            for (int batch = 0, count; batch < MaxEventBatches && (count = _uffd.ReadEvents(events)) > 0; batch++)
            {
                any = true;
                foreach (var e in events[..count])
                {
                    // A page fault needs no answer here: the population brings its page, or the release wakes its thread.
                    if (e.Kind is UserfaultfdEventKind.Remove or UserfaultfdEventKind.Unmap)
                    {
                        _removed.Add(e.Address, e.End);
                    }
                }
            }
        }
        finally
        {
            _events.ExitWriteLock();
        }

        return any;
    }

    /// <summary>Gives every region back to the kernel: what is missing reads as zeros from now on, and nobody waits for this server any more.</summary>
    /// <returns>False when the VMM is gone.</returns>
    public bool Release()
    {
        _ = ReadEvents();
        bool alive = true;
        foreach (var region in Regions)
        {
            alive &= _uffd.Unregister(region.BaseHostVirtAddr, region.Size);
        }

        // A thread that entered madvise before the unregistering waits until its REMOVE is read, and it may not have queued it yet. As long
        // as there is one, the kernel answers EAGAIN to whatever is placed; after that, ENOENT, because nothing is registered any more.
        var refusal = default(Refusal);
        while (_uffd.ZeroPage(Regions[0].BaseHostVirtAddr, Regions[0].PageSize).Outcome == PagePlacement.Again)
        {
            AwaitChange(ref refusal, Regions[0].BaseHostVirtAddr);
        }

        return alive;
    }

    /// <summary>Closes the userfaultfd. No copy may be under way.</summary>
    public void Dispose()
    {
        _uffd.Dispose();
        _events.Dispose();
    }

    /// <summary>
    /// The kernel refuses copies while a thread is inside madvise, and goes on refusing after its event was read until that thread has run
    /// on. So: read what waits, then try again at once. Waiting for the next event would be waiting for the next refusal, for ever when a
    /// guest gives back one range after the other; only when no event comes for a while is the thread not running, and sleeping right.
    /// </summary>
    private void AwaitChange(ref Refusal refusal, ulong address)
    {
        refusal.Since = refusal.Since == 0 ? Stopwatch.GetTimestamp() : refusal.Since;
        if (Stopwatch.GetElapsedTime(refusal.Since) > ChangingLimit)
        {
            throw new PageServerException($"The kernel refused to place pages at {address:x} for {ChangingLimit.TotalSeconds:0} s (EAGAIN): the VMM's memory keeps changing.");
        }

        refusal.QuietRounds = ReadEvents() ? 0 : refusal.QuietRounds + 1;
        if (refusal.QuietRounds < MaxQuietRounds)
        {
            _ = Thread.Yield();
        }
        else
        {
            _ = Poll.Wait(_uffd.Handle, RefusalPause);
        }
    }

    /// <summary>How long a placement has been refused, and how many attempts there were since an event was read.</summary>
    private record struct Refusal(long Since, int QuietRounds);
}

/// <summary>A stretch of the memory file and its place in the VMM.</summary>
/// <param name="Address">Address in the VMM.</param>
/// <param name="Offset">Offset in the memory file.</param>
/// <param name="Length">Bytes, a multiple of <paramref name="PageSize"/>.</param>
/// <param name="PageSize">Page size of the region.</param>
internal readonly record struct CopyPiece(ulong Address, long Offset, ulong Length, ulong PageSize);
