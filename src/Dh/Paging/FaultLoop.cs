using System.Diagnostics;
using System.Net.Sockets;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>Why a <see cref="FaultLoop"/> came back.</summary>
internal enum FaultLoopEnd
{
    /// <summary>The copying threads have finished.</summary>
    WorkersDone,

    /// <summary>The VMM has ended.</summary>
    VmmEnded,

    /// <summary>The server is to stop.</summary>
    Stopped,
}

/// <summary>
/// The one thread that reads the userfaultfd's events, answers faults, and sees the VMM's end. It sleeps in poll(2) without a timer, and
/// allocates nothing for a fault.
/// </summary>
internal sealed class FaultLoop : IDisposable
{
    /// <summary>A VMM says nothing after its handshake; what little one might say is passed over.</summary>
    private const int MaxChatter = 64 << 10;

    private readonly GuestMemory _memory;
    private readonly SafeSocketHandle _connection;
    private readonly WakeEvent _stop;
    private readonly ulong _blockSize;
    private readonly IMemoryReader _reader;
    private readonly List<Fault> _faults = new(64);
    private readonly List<(TouchedPage Page, long At)> _touched = [];
    private volatile bool _recording;
    private long _faultCount;
    private int _chatter;

    public FaultLoop(GuestMemory memory, IMemorySource source, SafeSocketHandle connection, WakeEvent stop, PageServerOptions options)
    {
        _memory = memory;
        _connection = connection;
        _stop = stop;
        _blockSize = (ulong)options.BlockSize;
        _recording = options.Record;
        _reader = source.OpenReader();
    }

    /// <summary>The thread's reader.</summary>
    public IMemoryReader Reader => _reader;

    /// <summary>Faults that were answered so far.</summary>
    public long FaultCount => Interlocked.Read(ref _faultCount);

    /// <summary>Serves until the workers are done, the VMM has ended, or the server is to stop.</summary>
    /// <param name="workers">What copies meanwhile; null for nothing.</param>
    /// <param name="chore">What this thread does besides, a part at a time, as long as there is nothing to serve and the answer is that there is more; null for nothing.</param>
    /// <exception cref="PageServerException">The memory file or the kernel failed, or the VMM did what no VMM does.</exception>
    public FaultLoopEnd Run(CopyWorkers? workers, Func<bool>? chore)
    {
        const int Stop = 1, Vmm = 2, Events = 4, Done = 8;
        bool busy = chore is not null;
        while (true)
        {
            var patience = busy ? TimeSpan.Zero : Timeout.InfiniteTimeSpan;
            int ready = workers is null
                ? Poll.WaitAny(patience, _stop.Handle, _connection, _memory.Userfaultfd.Handle)
                : Poll.WaitAny(patience, _stop.Handle, _connection, _memory.Userfaultfd.Handle, workers.Done.Handle);
            if ((ready & Stop) != 0)
            {
                return FaultLoopEnd.Stopped;
            }

            if ((ready & Events) != 0 && !AnswerEvents(workers))
            {
                return FaultLoopEnd.VmmEnded;
            }

            if ((ready & Vmm) != 0 && HasVmmEnded())
            {
                return FaultLoopEnd.VmmEnded;
            }

            if ((ready & Done) != 0)
            {
                return CopyRefused(workers!) ? FaultLoopEnd.WorkersDone : FaultLoopEnd.VmmEnded;
            }

            busy = busy && chore!();
        }
    }

    /// <summary>Gives guest memory back to the kernel: nobody waits for this server from then on.</summary>
    /// <returns>False when the VMM is gone.</returns>
    public bool Release()
    {
        _ = _memory.ReadEvents(_faults);
        bool alive = _memory.Release();
        var refusal = new Refusal();
        while (_memory.IsChanging())
        {
            refusal.Wait(_memory.ReadEvents(_faults), _memory.Userfaultfd);
        }

        _faults.Clear(); // the kernel has answered them
        return alive;
    }

    /// <summary>Ends the recording.</summary>
    /// <param name="until">Until when it counts, in <see cref="Stopwatch"/> ticks.</param>
    /// <returns>The pages that were touched, in the order of the first touch.</returns>
    public IReadOnlyList<TouchedPage> StopRecording(long until)
    {
        lock (_touched)
        {
            _recording = false;
            return [.. _touched.TakeWhile(touch => touch.At <= until).Select(touch => touch.Page)];
        }
    }

    public void Dispose() => _reader.Dispose();

    private bool AnswerEvents(CopyWorkers? workers)
    {
        if (!_memory.ReadEvents(_faults))
        {
            // Readable, and yet there is nothing: poll(2) says so of a descriptor that somebody has made blocking.
            _memory.Userfaultfd.SetNonBlocking();
            return true;
        }

        if (workers is not null)
        {
            workers.Yield = true;
        }

        bool alive = AnswerFaults();
        if (workers is not null)
        {
            workers.Yield = false;
        }

        return alive;
    }

    /// <summary>Copies what the workers could not.</summary>
    private bool CopyRefused(CopyWorkers workers)
    {
        foreach (var piece in workers.Refused)
        {
            var refusal = new Refusal();
            for (Placement placement; (placement = _memory.CopyPiece(piece, _reader)) != Placement.Done;)
            {
                if (placement == Placement.VmmGone)
                {
                    return false;
                }

                refusal.Wait(_memory.ReadEvents(_faults), _memory.Userfaultfd);
            }

            if (!AnswerFaults())
            {
                return false;
            }
        }

        return true;
    }

    private bool AnswerFaults()
    {
        // The list may grow meanwhile.
        for (int i = 0; i < _faults.Count; i++)
        {
            if (!Answer(_faults[i]))
            {
                return false;
            }
        }

        _faults.Clear();
        return true;
    }

    private bool Answer(Fault fault)
    {
        if (_recording)
        {
            Record(fault);
        }

        var refusal = new Refusal();
        while (true)
        {
            switch (_memory.Serve(fault, _reader, _recording ? GuestRegion.NormalPageSize : _blockSize))
            {
                case Placement.Done:
                    Interlocked.Increment(ref _faultCount);
                    return true;
                case Placement.VmmGone:
                    return false;
                default:
                    refusal.Wait(_memory.ReadEvents(_faults), _memory.Userfaultfd);
                    break;
            }
        }
    }

    private void Record(Fault fault)
    {
        lock (_touched)
        {
            if (_recording && _memory.SourceOffset(fault) is { } offset)
            {
                _touched.Add((new TouchedPage(offset, fault.IsWrite), Stopwatch.GetTimestamp()));
            }
        }
    }

    /// <summary>End of file says that the VMM has ended: it keeps its end open as long as it lives.</summary>
    private bool HasVmmEnded()
    {
        var descriptors = new List<SafeFileHandle>();
        try
        {
            int received = FdPassing.Receive(_connection, stackalloc byte[1024], descriptors);
            _chatter += Math.Max(0, received);
            return _chatter > MaxChatter
                ? throw new PageServerException($"The VMM sent more than {MaxChatter} bytes after its handshake.")
                : received == 0;
        }
        catch (LinuxException e) when (e.Errno == Errno.ECONNRESET)
        {
            return true;
        }
        finally
        {
            descriptors.ForEach(descriptor => descriptor.Dispose());
        }
    }
}
