using Dh.Linux;

namespace Dh.Paging;

/// <summary>How an attempt to place pages ended.</summary>
internal enum Placement
{
    /// <summary>The pages are in place, or need no answer any more.</summary>
    Done,

    /// <summary>The VMM is gone.</summary>
    VmmGone,

    /// <summary>The kernel refuses as long as the VMM's memory changes (EAGAIN): read the events, then try again.</summary>
    Refused,
}

/// <summary>A thread of the VMM that waits for a page.</summary>
/// <param name="Address">The address in its page.</param>
/// <param name="IsWrite">Whether it wants to write.</param>
internal readonly record struct Fault(ulong Address, bool IsWrite);

/// <summary>
/// The guest's memory as the page server sees it: the userfaultfd, the regions, and what is known of each page. One thread reads the events
/// and serves the faults; others may copy pieces meanwhile. Events are read under a lock that excludes those copies, because a page that is
/// copied between the reading of a REMOVE and its recording would bring back contents that must read as zeros (docs/design.md, "Page server").
/// </summary>
internal sealed class GuestMemory : IDisposable
{
    /// <summary>Holes from this length on are given back to the kernel: they never become faults.</summary>
    private const ulong GivenBackLength = 64 << 10;

    /// <summary>Each range that is given back may cut a mapping in three, of which a process has at most 65,530 (vm.max_map_count).</summary>
    private const int MaxGivenBack = 4096;

    /// <summary>Holes that are given back between two looks at the events: some tens of microseconds.</summary>
    private const int GivenBackAtOnce = 16;

    /// <summary>Short holes that get their zero pages between two looks at the events: some tens of microseconds.</summary>
    private const int HolesAtOnce = 64;

    /// <summary>Events that are read at a time: a guest that makes them faster than they are read must not keep the copies out for ever.</summary>
    private const int MaxEventBatches = 64;

    private readonly Userfaultfd _uffd;
    private readonly IMemorySource _source;
    private Lock[] _copiers = [];
    private readonly RegionState[] _regions;
    private readonly AddressRanges _givenBack = new();
    private MemoryMapping? _zeros;
    private Queue<(ulong Address, ulong Length)>? _toGiveBack;
    private int _settlingRegion;
    private long _settlingPage;
    private string? _warning;
    private long _copiedBytes;
    private long _zeroedBytes;
    private long _removedBytes;

    /// <summary>Takes over a validated handshake.</summary>
    /// <param name="uffd">The VMM's userfaultfd.</param>
    /// <param name="regions">Its regions.</param>
    /// <param name="source">Their contents.</param>
    /// <param name="foreseen">What was worked out before; this takes over its pages when it fits.</param>
    public GuestMemory(Userfaultfd uffd, IReadOnlyList<GuestRegion> regions, IMemorySource source, ForeseenLayout foreseen)
    {
        _uffd = uffd;
        _source = source;
        Regions = regions;
        _regions = [.. regions.Select(region => new RegionState(region, foreseen.Fits(regions) ? foreseen.Pages : PageStates.Of(region, source)))];
    }

    /// <summary>The regions.</summary>
    public IReadOnlyList<GuestRegion> Regions { get; }

    /// <summary>Readable when there are events.</summary>
    public Userfaultfd Userfaultfd => _uffd;

    /// <summary>Bytes that were copied from the source so far.</summary>
    public long CopiedBytes => Interlocked.Read(ref _copiedBytes);

    /// <summary>Bytes that were placed as zeros, one by one, so far.</summary>
    public long ZeroedBytes => Interlocked.Read(ref _zeroedBytes);

    /// <summary>Bytes that the guest has given back so far.</summary>
    public long RemovedBytes => Interlocked.Read(ref _removedBytes);

    /// <summary>Why the working set could not be used; null when all is well.</summary>
    public string? Warning => Volatile.Read(ref _warning);

    /// <summary>Bytes that read as zeros now.</summary>
    public long CountZeroBytes() => _regions.Sum(region => region.Pages.CountZero() * (long)region.PageSize);

    /// <summary>
    /// Names the threads that will copy, each by a lock that it holds while it copies and that nobody else takes but the reader of the events:
    /// threads that copy do not meet. Called on the thread that reads the events, before they begin.
    /// </summary>
    /// <param name="copiers">The locks; those of before are not in use any more.</param>
    public void SetCopiers(Lock[] copiers) => _copiers = copiers;

    /// <summary>Copies what is missing of a piece to its place. May be called on several threads, each with its lock of <see cref="SetCopiers"/> held, and on the one that reads the events.</summary>
    /// <param name="piece">The piece.</param>
    /// <param name="reader">The thread's reader.</param>
    /// <exception cref="PageServerException">The memory file or the kernel failed.</exception>
    public Placement CopyPiece(CopyPiece piece, IMemoryReader reader)
    {
        var region = RegionOf(piece.Address)!;
        long page = region.PageOf(piece.Address), end = page + (long)(piece.Length / region.PageSize);
        for (long count; (count = region.Pages.NextMissing(ref page, end)) > 0;)
        {
            var (placement, placed) = CopyRun(region, page, count, reader);
            if (placement != Placement.Done)
            {
                return placement;
            }

            page += placed;
        }

        return Placement.Done;
    }

    /// <summary>
    /// Copies pieces of which nothing is in place yet, in one go, up to one that is another matter: that one is for <see cref="CopyPiece"/>.
    /// Called as that is.
    /// </summary>
    /// <param name="pieces">The pieces.</param>
    /// <param name="reader">The thread's reader.</param>
    /// <param name="copies">Room for the copies.</param>
    /// <returns>How many are in place now, from the first on.</returns>
    /// <exception cref="PageServerException">The memory file cannot be read.</exception>
    public int CopyUntouched(ReadOnlySpan<CopyPiece> pieces, IMemoryReader reader, Span<PageCopy> copies)
    {
        int count = 0, most = reader.IsMapped ? Math.Min(pieces.Length, copies.Length) : 0;
        for (; count < most && IsMissing(pieces[count]); count++)
        {
            var piece = pieces[count];
            ulong length = piece.Length;
            nuint source = reader.ReadUndamaged(piece.Offset, ref length, ref _warning);
            if (length < piece.Length)
            {
                break;
            }

            copies[count] = new PageCopy(piece.Address, source, length);
        }

        int done = _uffd.CopyAll(copies[..count]);
        long bytes = 0;
        foreach (var piece in pieces[..done])
        {
            var region = RegionOf(piece.Address)!;
            region.Pages.MarkPresent(region.PageOf(piece.Address), (long)(piece.Length / region.PageSize));
            bytes += (long)piece.Length;
        }

        Interlocked.Add(ref _copiedBytes, bytes);
        return done;
    }

    /// <summary>
    /// Reads the events that wait, records what was removed, and hands out who waits. Should some be left, no copy goes wrong: the kernel
    /// refuses copies as long as a REMOVE was not read.
    /// </summary>
    /// <param name="faults">Faults are added.</param>
    /// <returns>Whether there was an event.</returns>
    /// <exception cref="PageServerException">The VMM did what no VMM does.</exception>
    public bool ReadEvents(List<Fault> faults)
    {
        bool any = false;
        Span<UserfaultfdEvent> events = stackalloc UserfaultfdEvent[32];
        KeepCopiersOut();
        try
        {
            for (int batch = 0, count = events.Length; batch < MaxEventBatches && count == events.Length; batch++)
            {
                count = _uffd.ReadEvents(events);
                foreach (var e in events[..count])
                {
                    any = true;
                    switch (e.Kind)
                    {
                        case UserfaultfdEventKind.PageFault:
                            faults.Add(new Fault(e.Address, e.IsWrite));
                            break;
                        case UserfaultfdEventKind.Remove or UserfaultfdEventKind.Unmap:
                            _removedBytes += MarkZero(e.Address, e.End);
                            break;
                        default:
                            throw new PageServerException($"The VMM's userfaultfd reported a {e.Kind} event: a VMM neither forks nor moves guest memory while it is served.");
                    }
                }
            }
        }
        finally
        {
            LetCopiersIn();
        }

        return any;
    }

    /// <summary>Answers a fault: the thread goes on when this returns <see cref="Placement.Done"/>. Called on the thread that reads the events.</summary>
    /// <param name="fault">The fault.</param>
    /// <param name="reader">The thread's reader.</param>
    /// <param name="blockSize">Bytes, a power of two: what is missing in the aligned block around the page comes with it.</param>
    /// <returns>The placement; when it is refused, read the events and call again.</returns>
    /// <exception cref="PageServerException">The memory file or the kernel failed.</exception>
    public Placement Serve(Fault fault, IMemoryReader reader, ulong blockSize)
    {
        if (RegionOf(fault.Address) is not { } region)
        {
            throw new PageServerException($"The VMM's userfaultfd reported a fault at {fault.Address:x}, outside of the regions of its handshake.");
        }

        long page = region.PageOf(fault.Address);
        if (region.Pages.IsPresent(page))
        {
            return PlaceVanished(region, page);
        }

        var (page0, end) = region.BlockAround(page, blockSize);
        if (region.Pages.IsZero(page))
        {
            if (_givenBack.Contains(fault.Address))
            {
                return Placement.Done; // the kernel has answered it
            }

            long zero = page;
            return PlaceZeros(region, zero, region.Pages.NextAbsentZero(ref zero, end));
        }

        for (long first = page0, count; (count = region.Pages.NextMissing(ref first, end)) > 0;)
        {
            var (placement, placed) = CopyRun(region, first, count, reader, readAhead: true);
            if (placement != Placement.Done)
            {
                return placement;
            }

            first += placed;
        }

        return Placement.Done;
    }

    /// <summary>Where in the memory file the page of a fault comes from; null when it reads as zeros.</summary>
    public long? SourceOffset(Fault fault) =>
        RegionOf(fault.Address) is { } region && !region.Pages.IsZero(region.PageOf(fault.Address)) ? region.OffsetOf(region.PageOf(fault.Address)) : null;

    /// <summary>
    /// Sees to the holes before the guest does, a part at a time: the long ones go back to the kernel, whose own zero pages they are from then
    /// on; the short ones get zero pages. A guest takes such pages for something new, and each would be a fault. Called
    /// on the thread that reads the events.
    /// </summary>
    /// <returns>Whether there is more to do; after false it is not called again.</returns>
    /// <exception cref="PageServerException">The kernel failed.</exception>
    public bool SettleHoles()
    {
        _toGiveBack ??= HolesToGiveBack();
        if (_toGiveBack.Count > 0)
        {
            return GiveBackSome(_toGiveBack);
        }

        for (int placed = 0; _settlingRegion < _regions.Length; _settlingRegion++, _settlingPage = 0)
        {
            var region = _regions[_settlingRegion];
            for (long count; (count = region.Pages.NextAbsentZero(ref _settlingPage, region.Pages.Pages)) > 0; _settlingPage += count)
            {
                // A hole that is refused, because the guest changes its memory just now, is left to its faults.
                if ((ulong)count * region.PageSize < GivenBackLength && !_givenBack.Contains(region.AddressOf(_settlingPage)) && PlaceZeros(region, _settlingPage, count) == Placement.VmmGone)
                {
                    return false;
                }

                if (++placed == HolesAtOnce)
                {
                    return true;
                }
            }
        }

        return false;
    }

    /// <summary>Gives every region back to the kernel: what is missing reads as zeros from now on, and nobody waits for this server any more.</summary>
    /// <returns>False when the VMM is gone.</returns>
    public bool Release()
    {
        bool alive = true;
        foreach (var region in Regions)
        {
            alive &= Unregister(region.BaseHostVirtAddr, region.Size);
        }

        return alive;
    }

    /// <summary>
    /// Whether a thread of the VMM is still inside madvise, having entered before <see cref="Release"/>: it waits until its REMOVE is read,
    /// and may not have queued it yet. As long as there is one, the kernel answers EAGAIN to whatever is placed.
    /// </summary>
    public bool IsChanging() => _uffd.ZeroPage(Regions[0].BaseHostVirtAddr, Regions[0].PageSize).Outcome == PagePlacement.Again;

    /// <summary>Closes the userfaultfd. No copy may be under way.</summary>
    public void Dispose()
    {
        _uffd.Dispose();
        _zeros?.Dispose();
    }

    /// <summary>What lies between the data, the longest first, whether zeros were placed there or not: without them it is the same.</summary>
    private Queue<(ulong Address, ulong Length)> HolesToGiveBack()
    {
        var holes = new List<(ulong Address, ulong Length)>();
        foreach (var region in _regions)
        {
            ulong end = region.Region.Offset + region.Region.Size, from = region.Region.Offset;
            foreach (var extent in _source.DataExtents.Append(new FileExtent((long)end, 0)))
            {
                ulong to = Math.Min((ulong)extent.Offset & ~(region.PageSize - 1), end);
                if (to > from && to - from >= GivenBackLength)
                {
                    holes.Add((region.Region.BaseHostVirtAddr + (from - region.Region.Offset), to - from));
                }

                from = Math.Max(from, ((ulong)extent.End + region.PageSize - 1) & ~(region.PageSize - 1));
            }
        }

        return new Queue<(ulong, ulong)>(holes.OrderByDescending(hole => hole.Length).Take(MaxGivenBack));
    }

    /// <returns>False when the VMM is gone.</returns>
    private bool GiveBackSome(Queue<(ulong Address, ulong Length)> holes)
    {
        for (int i = 0; i < GivenBackAtOnce && holes.TryDequeue(out var hole); i++)
        {
            if (!Unregister(hole.Address, hole.Length))
            {
                return false;
            }

            _givenBack.Add(hole.Address, hole.Address + hole.Length);
            // Zeros of the working set that were to come there do not come any more.
            KeepCopiersOut();
            MarkZero(hole.Address, hole.Address + hole.Length);
            LetCopiersIn();
        }

        return true;
    }

    private void KeepCopiersOut()
    {
        foreach (var copier in _copiers)
        {
            copier.Enter();
        }
    }

    private void LetCopiersIn()
    {
        foreach (var copier in _copiers)
        {
            copier.Exit();
        }
    }

    private bool IsMissing(in CopyPiece piece)
    {
        var region = RegionOf(piece.Address)!;
        long first = region.PageOf(piece.Address), page = first, end = first + (long)(piece.Length / region.PageSize);
        return region.Pages.NextMissing(ref page, end) == end - first;
    }

    private bool Unregister(ulong address, ulong length)
    {
        try
        {
            return _uffd.Unregister(address, length);
        }
        catch (LinuxException e)
        {
            throw new PageServerException($"Guest memory at {address:x} could not be given back: {e.Message}", e);
        }
    }

    private RegionState? RegionOf(ulong address)
    {
        foreach (var region in _regions)
        {
            if (address - region.Region.BaseHostVirtAddr < region.Region.Size)
            {
                return region;
            }
        }

        return null;
    }

    /// <summary>Notes that a range reads as zeros from now on.</summary>
    /// <returns>How many bytes of it are guest memory.</returns>
    private long MarkZero(ulong start, ulong end)
    {
        long bytes = 0;
        foreach (var region in _regions)
        {
            ulong from = Math.Max(start, region.Region.BaseHostVirtAddr), to = Math.Min(end, region.Region.BaseHostVirtAddr + region.Region.Size);
            if (from < to)
            {
                long first = region.PageOf(from), behind = region.PageOf(to - 1) + 1;
                region.Pages.MarkZero(first, behind - first);
                bytes += (long)(to - from);
            }
        }

        return bytes;
    }

    /// <summary>Copies the first part of a run of missing pages.</summary>
    /// <param name="region">The region.</param>
    /// <param name="page">The first page.</param>
    /// <param name="count">How many are missing from there on.</param>
    /// <param name="reader">The thread's reader.</param>
    /// <param name="readAhead">Whether just these pages are read from the disk: what is around a page that is touched by chance is not needed soon.</param>
    /// <returns>How it ended, and how many pages are settled now.</returns>
    private (Placement Placement, long Pages) CopyRun(RegionState region, long page, long count, IMemoryReader reader, bool readAhead = false)
    {
        for (bool again = false; ; again = true)
        {
            ulong length = (ulong)count * region.PageSize;
            nuint source = reader.ReadUndamaged(region.OffsetOf(page), ref length, ref _warning);
            if (readAhead)
            {
                MemoryMapping.ReadAhead(source, length);
            }

            var result = Place(region, page, length, source);
            switch (result.Outcome)
            {
                case PagePlacement.Complete or PagePlacement.Partial:
                    long pages = result.Bytes / (long)region.PageSize;
                    region.Pages.MarkPresent(page, pages);
                    Interlocked.Add(ref _copiedBytes, result.Bytes);
                    return (Placement.Done, pages);
                case PagePlacement.SourceFault when !again:
                    break; // a working set that was cut: it is found out when it is asked again
                case PagePlacement.SourceFault:
                    throw new PageServerException(
                        $"Memory file {_source.Path} could not be read at offset {region.OffsetOf(page)}: it was truncated while it was in use. Run `dh vm prepare --force`.");
                default:
                    return Settle(region, page, result.Outcome);
            }
        }
    }

    private Placement PlaceZeros(RegionState region, long page, long count)
    {
        ulong address = region.AddressOf(page), length = (ulong)count * region.PageSize;
        _ = _givenBack.Covers(address, ref length);
        var result = Place(region, page, length, source: 0);
        if (result.Outcome is not (PagePlacement.Complete or PagePlacement.Partial))
        {
            return Settle(region, page, result.Outcome).Placement;
        }

        region.Pages.MarkPresent(page, result.Bytes / (long)region.PageSize);
        Interlocked.Add(ref _zeroedBytes, result.Bytes);
        return Placement.Done;
    }

    /// <summary>
    /// A fault of a page that was placed: mostly a stale one, answered meanwhile. But a VMM that does not ask for REMOVE events may give back
    /// pages unseen; those read as zeros.
    /// </summary>
    private Placement PlaceVanished(RegionState region, long page)
    {
        var result = Place(region, page, region.PageSize, source: 0);
        return result.Outcome is PagePlacement.Complete or PagePlacement.Partial ? Placement.Done : Settle(region, page, result.Outcome).Placement;
    }

    /// <summary>What an outcome that placed nothing means.</summary>
    private (Placement Placement, long Pages) Settle(RegionState region, long page, PagePlacement outcome)
    {
        switch (outcome)
        {
            case PagePlacement.Exists:
                region.Pages.MarkPresent(page, 1);
                _uffd.Wake(region.AddressOf(page), region.PageSize);
                return (Placement.Done, 1);
            case PagePlacement.Again:
                return (Placement.Refused, 0);
            case PagePlacement.Gone:
                return (Placement.VmmGone, 0);
            default:
                throw new PageServerException(
                    $"Guest memory at {region.AddressOf(page):x} could not be placed: it is not registered with the userfaultfd that the VMM has sent ({outcome}).");
        }
    }

    private PagePlacementResult Place(RegionState region, long page, ulong length, nuint source)
    {
        ulong address = region.AddressOf(page);
        try
        {
            if (source != 0)
            {
                return _uffd.Copy(address, source, length);
            }

            return region.PageSize == GuestRegion.NormalPageSize
                ? _uffd.ZeroPage(address, length)
                : _uffd.Copy(address, (_zeros ??= MemoryMapping.Buffer((int)region.PageSize)).Address, region.PageSize); // UFFDIO_ZEROPAGE knows no huge pages
        }
        catch (LinuxException e)
        {
            throw new PageServerException($"Pages of {_source.Path} at offset {region.OffsetOf(page)} could not be placed: {e.Message}", e);
        }
    }

    /// <summary>A region and its pages.</summary>
    private sealed class RegionState(GuestRegion region, PageStates pages)
    {
        public GuestRegion Region { get; } = region;

        public ulong PageSize { get; } = region.PageSize;

        public PageStates Pages { get; } = pages;

        public long PageOf(ulong address) => (long)((address - Region.BaseHostVirtAddr) / PageSize);

        public ulong AddressOf(long page) => Region.BaseHostVirtAddr + ((ulong)page * PageSize);

        public long OffsetOf(long page) => (long)(Region.Offset + ((ulong)page * PageSize));

        /// <summary>The pages of the block around a page: aligned in the memory file, clipped to the region.</summary>
        public (long First, long End) BlockAround(long page, ulong blockSize)
        {
            ulong size = Math.Max(blockSize, PageSize), start = (ulong)OffsetOf(page) & ~(size - 1);
            ulong from = Math.Max(start, Region.Offset), to = Math.Min(start + size, Region.Offset + Region.Size);
            return ((long)((from - Region.Offset) / PageSize), (long)((to - Region.Offset) / PageSize));
        }
    }
}
