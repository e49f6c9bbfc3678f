namespace Dh.Paging;

/// <summary>How a page server works; what is null or not set has the default that is documented here.</summary>
public sealed class PageServerOptions
{
    private int _workers = 2;
    private TimeSpan _handshakeTimeLimit = TimeSpan.FromSeconds(10);

    /// <summary>What is placed before the machine resumes. Default: eager.</summary>
    public PopulationPolicy Policy { get; init; } = PopulationPolicy.Eager;

    /// <summary>Threads that copy, 1 to 64. Default: 2, with which the copying is bound by memory on every machine that was measured.</summary>
    public int Workers
    {
        get => _workers;
        init
        {
            ArgumentOutOfRangeException.ThrowIfLessThan(value, 1);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(value, 64);
            _workers = value;
        }
    }

    /// <summary>How long the VMM may take to connect and to send its handshake, above 0 and up to an hour. Default: 10 s.</summary>
    public TimeSpan HandshakeTimeLimit
    {
        get => _handshakeTimeLimit;
        init
        {
            ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(value, TimeSpan.Zero);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(value, TimeSpan.FromHours(1));
            _handshakeTimeLimit = value;
        }
    }

    /// <summary>
    /// Called once, on the server's thread, when the server fails after it was started: a VMM whose faults nobody answers hangs for ever,
    /// so this must end it. Default: nobody is called, and the owner ends the VMM when <see cref="PageServer.WaitPopulatedAsync"/> fails.
    /// </summary>
    public Action<PageServerException>? Failed { get; init; }
}
