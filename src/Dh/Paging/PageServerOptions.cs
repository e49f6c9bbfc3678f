using System.Numerics;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>How a page server works; what is null or not set has the default that is documented here.</summary>
public sealed record PageServerOptions
{
    private int _workers = 2;
    private int _blockSize = 64 << 10;
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

    /// <summary>
    /// What is served on demand at once, in bytes: a power of two from 4 KiB to 2 MiB. What is missing in the aligned block around a touched
    /// page comes with it; never less than a page. Default: 64 KiB.
    /// </summary>
    public int BlockSize
    {
        get => _blockSize;
        init
        {
            ArgumentOutOfRangeException.ThrowIfLessThan(value, (int)GuestRegion.NormalPageSize);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(value, (int)GuestRegion.HugePageSize);
            _blockSize = BitOperations.IsPow2(value) ? value : throw new ArgumentOutOfRangeException(nameof(value), value, "A block is a power of two.");
        }
    }

    /// <summary>
    /// Whether all that is missing is copied in the background once the machine may resume, after which the memory is released as with
    /// <see cref="PopulationPolicy.Eager"/>. Default: no; a filled guest takes as much memory as its snapshot has data.
    /// </summary>
    public bool Fill { get; init; }

    /// <summary>
    /// Whether the pages that the guest touches are recorded, until <see cref="PageServer.StopRecording"/>. Only what is served is seen, so the
    /// policy should be <see cref="PopulationPolicy.Lazy"/>; pages are served one by one meanwhile. Default: no.
    /// </summary>
    public bool Record { get; init; }

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
    /// so this must end it. A server that listens ends its peer itself, before this is called. Default: nobody is called, and the owner ends
    /// the VMM when <see cref="PageServer.WaitPopulatedAsync"/> or <see cref="PageServer.Completion"/> fails.
    /// </summary>
    public Action<PageServerException>? Failed { get; init; }

    /// <summary>
    /// Called once, on the server's thread, with the userfaultfd of a guest that will need it, before that may run: what keeps a duplicate open
    /// until the guest is gone saves this process from taking the guest's memory apart, and the guest from missing pages that read as zeros,
    /// when this process ends first. Not called with <see cref="PopulationPolicy.Eager"/>. Default: nobody is called.
    /// </summary>
    public Action<SafeFileHandle>? Hold { get; init; }
}
