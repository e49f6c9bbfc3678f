namespace Dh.Paging;

/// <summary>The page server refused its client, or could not place a page; the VMM cannot go on.</summary>
/// <param name="message">What happened, to which file or peer.</param>
/// <param name="inner">What caused it.</param>
public sealed class PageServerException(string message, Exception? inner = null) : DhException(DhErrorReason.PageServer, message, inner)
{
    /// <summary>Whether the VMM ended first: then its own words say why.</summary>
    public bool PeerEnded { get; init; }

    /// <summary>Whether it is the working set that cannot be used: a guest does without.</summary>
    internal bool WorkingSetDamaged { get; init; }
}
