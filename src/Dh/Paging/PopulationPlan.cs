using Dh.Linux;

namespace Dh.Paging;

/// <summary>Which pieces of the memory file are copied where: data only, clipped to the regions, small enough to be shared out to workers.</summary>
internal static class PopulationPlan
{
    /// <summary>
    /// Large enough that a system call does not count (4 MiB take about a millisecond), small enough that workers finish together.
    /// </summary>
    public const ulong PieceLength = 4 << 20;

    /// <summary>Makes the pieces, in the order of the regions.</summary>
    /// <param name="regions">Valid regions.</param>
    /// <param name="extents">What holds data, in order.</param>
    public static List<CopyPiece> Of(IReadOnlyList<GuestRegion> regions, IReadOnlyList<FileExtent> extents)
    {
        var pieces = new List<CopyPiece>();
        foreach (var region in regions)
        {
            ulong end = region.Offset + region.Size, reached = region.Offset;
            foreach (var extent in extents)
            {
                // Holes are as fine as the file system's blocks; pages of the region may be larger. Two extents may share a page.
                ulong from = Math.Max(reached, RoundDown((ulong)extent.Offset, region.PageSize));
                ulong to = Math.Min(end, RoundDown((ulong)extent.End + region.PageSize - 1, region.PageSize));
                for (ulong at = from; at < to; at += PieceLength)
                {
                    pieces.Add(new CopyPiece(region.BaseHostVirtAddr + (at - region.Offset), (long)at, Math.Min(PieceLength, to - at), region.PageSize));
                }

                reached = Math.Max(reached, to);
            }
        }

        return pieces;
    }

    private static ulong RoundDown(ulong value, ulong unit) => value & ~(unit - 1);
}
