using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// What can be worked out of a population while the VMM starts, and would cost half a millisecond after its handshake: right when guest memory
/// turns out to be one region of ordinary pages, as with most VMMs. The address is not known before.
/// </summary>
internal sealed class ForeseenLayout
{
    private readonly GuestRegion _region;
    private readonly List<CopyPiece> _pieces;

    /// <param name="source">The contents of guest memory.</param>
    /// <param name="placed">What of it is placed before the machine resumes.</param>
    public ForeseenLayout(IMemorySource source, IReadOnlyList<FileExtent> placed)
    {
        _region = new GuestRegion(0, (ulong)source.Length, 0, GuestRegion.NormalPageSize);
        _pieces = PopulationPlan.Of([_region], placed);
        Pages = PageStates.Of(_region, source);
    }

    /// <summary>What is known of each page; for one <see cref="GuestMemory"/>.</summary>
    public PageStates Pages { get; }

    /// <summary>Whether guest memory is as it was foreseen.</summary>
    /// <param name="regions">The handshake's regions.</param>
    public bool Fits(IReadOnlyList<GuestRegion> regions) => regions.Count == 1 && regions[0] with { BaseHostVirtAddr = 0 } == _region;

    /// <summary>The pieces that are placed, at their addresses.</summary>
    /// <param name="regions">Regions that it fits.</param>
    public List<CopyPiece> PiecesAt(IReadOnlyList<GuestRegion> regions) =>
        _pieces.ConvertAll(piece => piece with { Address = piece.Address + regions[0].BaseHostVirtAddr });
}
