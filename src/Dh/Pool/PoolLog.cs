using System.Globalization;

namespace Dh.Pool;

/// <summary>What a pool tells of, one line each. The numbers are fixed: programs go by them.</summary>
internal enum PoolEvent
{
    /// <summary>The daemon listens.</summary>
    Started = 1,

    /// <summary>As many sandboxes are ready as were asked for.</summary>
    Full = 2,

    /// <summary>The daemon is asked to end.</summary>
    Stopping = 3,

    /// <summary>The daemon ends, and nothing of it is left.</summary>
    Stopped = 4,

    /// <summary>A sandbox is ready.</summary>
    Ready = 10,

    /// <summary>A sandbox was handed out.</summary>
    HandedOut = 11,

    /// <summary>A sandbox ends.</summary>
    Ending = 12,

    /// <summary>A sandbox could not be restored, or has ended by itself.</summary>
    Failed = 13,

    /// <summary>Of a sandbox's end something is left.</summary>
    NotEnded = 14,

    /// <summary>A request was not met.</summary>
    Refused = 20,

    /// <summary>A peer was turned away: another user's, or one that says what makes no sense.</summary>
    TurnedAway = 21,

    /// <summary>The pool has another size now.</summary>
    Resized = 30,

    /// <summary>The snapshot has changed: what was restored from the old one ends.</summary>
    SnapshotChanged = 31,

    /// <summary>Memory does not suffice for more sandboxes.</summary>
    MemoryShort = 32,

    /// <summary>This host is short of memory: fewer are kept ready.</summary>
    MemoryPressure = 33,
}

/// <summary>Writes a pool's events: when, the event's number and name, what it is about.</summary>
/// <param name="write">Takes one line, without its end; called by one thread at a time.</param>
internal sealed class PoolLog(Action<string> write)
{
    private readonly Lock _lock = new();

    /// <summary>Tells of an event.</summary>
    /// <param name="what">Which.</param>
    /// <param name="detail">What it is about, in one line.</param>
    public void Write(PoolEvent what, string detail)
    {
        string line = string.Create(CultureInfo.InvariantCulture, $"{DateTimeOffset.UtcNow:yyyy-MM-ddTHH:mm:ss.fffZ} {(int)what} {what} {detail}");
        lock (_lock)
        {
            write(line);
        }
    }
}
