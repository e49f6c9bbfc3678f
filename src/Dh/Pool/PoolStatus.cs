namespace Dh.Pool;

/// <summary>What a pool is and does.</summary>
public sealed record PoolStatus
{
    /// <summary>The daemon's process.</summary>
    public required int ProcessId { get; init; }

    /// <summary>The template of its sandboxes.</summary>
    public required string Template { get; init; }

    /// <summary>The version of their engine.</summary>
    public required string Version { get; init; }

    /// <summary>The snapshot that they are restored from.</summary>
    public required string Snapshot { get; init; }

    /// <summary>How many are to be ready.</summary>
    public required int Size { get; init; }

    /// <summary>How many are ready.</summary>
    public required int Ready { get; init; }

    /// <summary>How many are being restored.</summary>
    public required int Starting { get; init; }

    /// <summary>How many have been handed out and live.</summary>
    public required int Running { get; init; }

    /// <summary>How many clients wait.</summary>
    public required int Waiting { get; init; }

    /// <summary>How many have been restored since the daemon began.</summary>
    public required long Restored { get; init; }

    /// <summary>How many of those have been handed out.</summary>
    public required long HandedOut { get; init; }

    /// <summary>How many restores have failed, and how many machines have ended by themselves.</summary>
    public required long Failed { get; init; }

    /// <summary>How long clients have waited for the last 1,000 sandboxes, from their connection until those were sent, in milliseconds: the median; null before the first.</summary>
    public double? WaitP50Ms { get; init; }

    /// <summary>The same, 99th percentile.</summary>
    public double? WaitP99Ms { get; init; }

    /// <summary>What the VMMs and the daemon have resident, in bytes.</summary>
    public required long MemoryBytes { get; init; }

    /// <summary>How long the daemon has run, in seconds.</summary>
    public required double UptimeSeconds { get; init; }
}
