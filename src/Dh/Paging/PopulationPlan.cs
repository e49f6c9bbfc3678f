using Dh.Linux;

namespace Dh.Paging;

/// <summary>Which pieces of the memory file are copied where: data only, clipped to the regions, small enough to be shared out to workers.</summary>
internal static class PopulationPlan
{
    /// <summary>
    /// Large enough that a system call does not count (4 MiB take about a millisecond), small enough that workers finish together.
    /// </summary>
    public const ulong PieceLength = 4 << 20;

    /// <summary>For copies in the background: the thread that serves faults may have to wait for one (256 KiB take some 70 microseconds).</summary>
    public const ulong BackgroundPieceLength = 256 << 10;

    /// <summary>Makes the pieces, in the order of the extents.</summary>
    /// <param name="regions">Valid regions.</param>
    /// <param name="extents">What is to be placed, in any order; none overlaps another.</param>
    /// <param name="pieceLength">The most that one piece holds; huge pages are never cut.</param>
    public static List<CopyPiece> Of(IReadOnlyList<GuestRegion> regions, IReadOnlyList<FileExtent> extents, ulong pieceLength = PieceLength)
    {
        var pieces = new List<CopyPiece>(extents.Count);
        foreach (var region in regions)
        {
            ulong regionEnd = region.Offset + region.Size, length = Math.Max(pieceLength, region.PageSize);
            var shared = new HashSet<ulong>();
            foreach (var extent in extents)
            {
                ulong from = RoundDown((ulong)extent.Offset, region.PageSize), to = RoundDown((ulong)extent.End + region.PageSize - 1, region.PageSize);
                if ((ulong)(extent.Offset | extent.End) % region.PageSize != 0)
                {
                    // Extents are finer than the region's pages: the first and the last page may belong to others, too, which may come in any order.
                    ulong first = from, last = to - region.PageSize;
                    from = shared.Add(first) ? from : from + region.PageSize;
                    to = last == first || shared.Add(last) ? to : last;
                }

                (from, to) = (Math.Max(region.Offset, from), Math.Min(regionEnd, to));
                if (from >= to)
                {
                    continue;
                }

                for (ulong at = from; at < to; at += length)
                {
                    pieces.Add(new CopyPiece(region.BaseHostVirtAddr + (at - region.Offset), (long)at, Math.Min(length, to - at), region.PageSize));
                }
            }
        }

        return pieces;
    }

    private static ulong RoundDown(ulong value, ulong unit) => value & ~(unit - 1);
}

/// <summary>A stretch of the memory file and its place in the VMM.</summary>
/// <param name="Address">Address in the VMM.</param>
/// <param name="Offset">Offset in the memory file.</param>
/// <param name="Length">Bytes, a multiple of <paramref name="PageSize"/>.</param>
/// <param name="PageSize">Page size of the region.</param>
internal readonly record struct CopyPiece(ulong Address, long Offset, ulong Length, ulong PageSize);
