using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// Copies pieces of the memory file to their places: threads of its own, and on request the one that serves faults and reads events, which does
/// so between two looks at those.
/// </summary>
internal sealed class CopyWorkers : IDisposable
{
    /// <summary>
    /// What a thread takes at a time, at least; a piece is never cut. A thread that reads events, and one that copies with the thread that does,
    /// lets those wait for as long: some tenths of a millisecond.
    /// </summary>
    private const ulong BatchLength = 512 << 10;

    /// <summary>Pieces that are copied in one go, in which nothing but the copies takes time: runs of a working set have two pages in the mean.</summary>
    private const int CopiesAtOnce = 128;

    private readonly IMemorySource _source;
    private readonly bool _inBackground;
    private readonly ManualResetEventSlim _begin = new(initialState: false, spinCount: 0);
    private readonly ConcurrentQueue<CopyPiece> _refused = new();
    private readonly WakeEvent _done = new();
    private readonly Thread[] _threads;
    private readonly Lock[] _locks;
    private GuestMemory? _memory;
    private List<CopyPiece> _pieces = [];
    private int[] _batches = [0];
    private PageServerException? _failure;
    private int _next = -1;
    private int _running;
    private volatile bool _stop;
    private volatile bool _vmmGone;

    /// <summary>Starts the threads, which wait: starting one takes as long as copying a megabyte.</summary>
    /// <param name="source">Where from.</param>
    /// <param name="count">How many copy; in the foreground one of them is the thread that serves faults (<see cref="CopySome"/>).</param>
    /// <param name="inBackground">Whether everybody else comes first.</param>
    public CopyWorkers(IMemorySource source, int count, bool inBackground)
    {
        _source = source;
        _inBackground = inBackground;
        _threads = new Thread[inBackground ? count : count - 1];
        _locks = new Lock[_threads.Length];
        _running = count;
        for (int i = 0; i < _threads.Length; i++)
        {
            var copier = _locks[i] = new Lock();
            _threads[i] = new Thread(() => Run(copier)) { IsBackground = true, Name = inBackground ? "dh page filler" : "dh page worker" };
            _threads[i].Start();
        }
    }

    /// <summary>Lets the threads copy. Called once.</summary>
    /// <param name="memory">Where to.</param>
    /// <param name="pieces">What, in this order.</param>
    public void Begin(GuestMemory memory, List<CopyPiece> pieces)
    {
        _memory = memory;
        _pieces = pieces;
        _batches = [.. BatchStarts(pieces), pieces.Count];
        memory.SetCopiers(_locks);
        _begin.Set();
    }

    /// <summary>Copies the next pieces on the calling thread, which is the one that reads the events.</summary>
    /// <param name="reader">The thread's reader.</param>
    /// <returns>Whether there may be more; after false it is not called again.</returns>
    /// <exception cref="PageServerException">The memory file or the kernel failed.</exception>
    public bool CopySome(IMemoryReader reader)
    {
        if (CopyBatch(reader, null))
        {
            return true;
        }

        Finish();
        return false;
    }

    /// <summary>Readable when all have finished.</summary>
    public WakeEvent Done => _done;

    /// <summary>Why they finished early; null when all pieces are in place, or the VMM is gone.</summary>
    public PageServerException? Failure => Volatile.Read(ref _failure);

    /// <summary>Whether they finished because the VMM is gone.</summary>
    public bool VmmGone => _vmmGone;

    /// <summary>
    /// Pieces that the kernel refused while the VMM's memory changed. Trying again is for the thread that reads the events: only directly
    /// after the reading is there a moment in which the kernel accepts copies, when a guest gives back one range after the other.
    /// </summary>
    public IReadOnlyCollection<CopyPiece> Refused => _refused;

    /// <summary>Set while faults wait: background threads pause.</summary>
    public bool Yield { get; set; }

    /// <summary>Stops the threads and waits for them.</summary>
    public void Dispose()
    {
        _stop = true;
        _begin.Set();
        Array.ForEach(_threads, thread => thread.Join());
        _done.Dispose();
        _begin.Dispose();
    }

    private void Run(Lock copier)
    {
        try
        {
            if (_inBackground)
            {
                CurrentThread.LowerPriority();
            }

            using var reader = _source.OpenReader();
            _begin.Wait();
            while (CopyBatch(reader, copier))
            {
                // on to the next one
            }
        }
#pragma warning disable CA1031 // Whatever ends this thread must reach the owner as its exception, never the runtime as a crash.
        catch (Exception e)
#pragma warning restore CA1031
        {
            var failure = e as PageServerException ?? new PageServerException($"Copying {_source.Path} failed: {e.Message}", e);
            Interlocked.CompareExchange(ref _failure, failure, null);
            _stop = true;
        }
        finally
        {
            Finish();
        }
    }

    private void Finish()
    {
        if (Interlocked.Decrement(ref _running) == 0)
        {
            _done.Set();
        }
    }

    private static IEnumerable<int> BatchStarts(List<CopyPiece> pieces)
    {
        ulong length = BatchLength;
        for (int i = 0; i < pieces.Count; length += pieces[i++].Length)
        {
            if (length >= BatchLength)
            {
                length = 0;
                yield return i;
            }
        }
    }

    /// <summary>Copies the next batch of pieces.</summary>
    /// <returns>False when there is none.</returns>
    private bool CopyBatch(IMemoryReader reader, Lock? copier)
    {
        int batch = _stop || _vmmGone ? _batches.Length : Interlocked.Increment(ref _next);
        if (batch >= _batches.Length - 1)
        {
            return false;
        }

        while (_inBackground && Yield && !_stop)
        {
            _ = Thread.Yield();
        }

        copier?.Enter();
        try
        {
            var pieces = CollectionsMarshal.AsSpan(_pieces)[_batches[batch].._batches[batch + 1]];
            Span<PageCopy> copies = stackalloc PageCopy[CopiesAtOnce];
            while (!pieces.IsEmpty)
            {
                int done = _memory!.CopyUntouched(pieces, reader, copies);
                if (done == 0)
                {
                    switch (_memory.CopyPiece(pieces[0], reader))
                    {
                        case Placement.VmmGone:
                            _vmmGone = true;
                            return false;
                        case Placement.Refused:
                            _refused.Enqueue(pieces[0]);
                            break;
                    }

                    done = 1;
                }

                pieces = pieces[done..];
            }
        }
        finally
        {
            copier?.Exit();
        }

        return true;
    }
}
