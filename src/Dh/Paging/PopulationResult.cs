namespace Dh.Paging;

/// <summary>What the page server places before the machine resumes.</summary>
public enum PopulationPolicy
{
    /// <summary>All data pages; then the regions are given back to the kernel and no page server is needed any more.</summary>
    Eager,

    /// <summary>The working set of the source; what else is touched is served on demand as long as the guest lives.</summary>
    Prefetch,

    /// <summary>Nothing; everything is served on demand.</summary>
    Lazy,
}

/// <summary>How far a population has come; a consistent-enough view for a progress line.</summary>
/// <param name="PlacedBytes">Bytes in place.</param>
/// <param name="PlannedBytes">Bytes that will be placed; 0 before the handshake.</param>
public readonly record struct PopulationProgress(long PlacedBytes, long PlannedBytes);

/// <summary>What a population did.</summary>
/// <param name="Policy">What was asked for.</param>
/// <param name="RegionCount">Regions of guest memory.</param>
/// <param name="TotalBytes">Bytes of guest memory.</param>
/// <param name="CopiedBytes">Bytes that were copied from the source.</param>
/// <param name="ZeroBytes">Bytes that are holes, or that the guest gave back meanwhile: they read as zeros.</param>
/// <param name="HandshakeTime">From the server's start until the handshake was complete.</param>
/// <param name="PopulationTime">From there until every page that the policy asks for was in place.</param>
public sealed record PopulationResult(
    PopulationPolicy Policy, int RegionCount, long TotalBytes, long CopiedBytes, long ZeroBytes, TimeSpan HandshakeTime, TimeSpan PopulationTime)
{
    /// <summary>Bytes that will come when the guest touches them.</summary>
    public long OnDemandBytes => TotalBytes - CopiedBytes - ZeroBytes;

    /// <summary>What is not as one would expect, for the user: a working set that cannot be used. Null when all is well.</summary>
    public string? Warning { get; init; }

    /// <summary>The line that a verbose run shows.</summary>
    public override string ToString()
    {
        string policy = Policy switch { PopulationPolicy.Eager => "eager", PopulationPolicy.Prefetch => "prefetch", _ => "lazy" };
        string onDemand = Policy == PopulationPolicy.Eager ? "" : $"{OnDemandBytes >> 20} MiB on demand, ";
        return $"UFFD: populated {RegionCount} regions, {TotalBytes >> 20} MiB ({policy}: {CopiedBytes >> 20} MiB copied, {onDemand}{ZeroBytes >> 20} MiB zero, {PopulationTime.TotalMilliseconds:0} ms)";
    }
}

/// <summary>How a page server came to its end.</summary>
public enum PageServerEnd
{
    /// <summary>All data was in place, and the regions were given back to the kernel: the guest goes on without it.</summary>
    Released,

    /// <summary>The VMM ended: its end of the handshake socket was closed.</summary>
    VmmEnded,

    /// <summary>It was disposed.</summary>
    Stopped,
}

/// <summary>What a page server has done since it was started.</summary>
/// <param name="CopiedBytes">Bytes copied from the source, before and after the machine resumed.</param>
/// <param name="ZeroedBytes">Bytes placed as zeros on demand.</param>
/// <param name="RemovedBytes">Bytes that the guest gave back.</param>
/// <param name="Faults">Page faults that were answered.</param>
public readonly record struct PageServerStatistics(long CopiedBytes, long ZeroedBytes, long RemovedBytes, long Faults);
