namespace Dh.Paging;

/// <summary>What the page server places before the machine resumes.</summary>
public enum PopulationPolicy
{
    /// <summary>All data pages; then the regions are given back to the kernel and no page server is needed any more.</summary>
    Eager,
}

/// <summary>How far a population has come; a consistent-enough view for a progress line.</summary>
/// <param name="PlacedBytes">Bytes in place.</param>
/// <param name="PlannedBytes">Bytes that will be placed; 0 before the handshake.</param>
public readonly record struct PopulationProgress(long PlacedBytes, long PlannedBytes);

/// <summary>What a population did.</summary>
/// <param name="Policy">What was asked for.</param>
/// <param name="RegionCount">Regions of guest memory.</param>
/// <param name="TotalBytes">Bytes of guest memory.</param>
/// <param name="CopiedBytes">Bytes that were copied from the memory file.</param>
/// <param name="ZeroBytes">Bytes that are holes, or that the guest gave back meanwhile: they read as zeros.</param>
/// <param name="HandshakeTime">From the server's start until the handshake was complete.</param>
/// <param name="PopulationTime">From there until every page that the policy asks for was in place.</param>
public sealed record PopulationResult(
    PopulationPolicy Policy, int RegionCount, long TotalBytes, long CopiedBytes, long ZeroBytes, TimeSpan HandshakeTime, TimeSpan PopulationTime)
{
    /// <summary>The line that a verbose run shows.</summary>
    public override string ToString() =>
        $"UFFD: populated {RegionCount} regions, {TotalBytes >> 20} MiB ({PolicyName}: {CopiedBytes >> 20} MiB copied, {ZeroBytes >> 20} MiB zero, {PopulationTime.TotalMilliseconds:0} ms)";

    private string PolicyName => Policy switch { PopulationPolicy.Eager => "eager", _ => Policy.ToString() };
}
