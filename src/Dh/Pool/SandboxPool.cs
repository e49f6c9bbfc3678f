using System.Diagnostics;
using System.Globalization;

namespace Dh.Pool;

/// <summary>
/// Keeps machines ready, hands each out once, and replaces it. Each machine has an owner of its own (<see cref="PoolSlot"/>); what is here
/// is who gets which, under one lock, and how many are begun.
/// </summary>
internal sealed class SandboxPool : IAsyncDisposable
{
    private const int KeptWaits = 1000;
    private const int MaxDoublings = 5;
    private static readonly TimeSpan ReplaceAfter = TimeSpan.FromMilliseconds(100);

    private readonly Lock _lock = new();
    private readonly IPoolMachines _machines;
    private readonly Func<long> _availableBytes;
    private readonly PoolLimits _limits;
    private readonly HashSet<PoolSlot> _slots = [];
    private readonly LinkedList<PoolSlot> _ready = new();
    private readonly LinkedList<Waiter> _waiters = new();
    private readonly Queue<double> _waitsMs = new();
    private TaskCompletionSource? _empty;
    private int _size;
    private int _ceiling = int.MaxValue;
    private int _lastNumber;
    private int _failuresInRow;
    private long _restored;
    private long _handedOut;
    private long _failed;
    private bool _isBackingOff;
    private int _backoffs;
    private bool _ending;
    private bool _isShort;
    private string _lastFailure = "";

    /// <summary>Makes an empty pool; <see cref="Resize"/> begins to fill it.</summary>
    /// <param name="machines">Makes its machines.</param>
    /// <param name="availableBytes">How much memory may still be taken, in bytes.</param>
    /// <param name="limits">How many at once, and how long.</param>
    /// <param name="log">Is told what happens.</param>
    public SandboxPool(IPoolMachines machines, Func<long> availableBytes, PoolLimits limits, PoolLog log)
    {
        _machines = machines;
        _availableBytes = availableBytes;
        _limits = limits;
        Log = log;
    }

    /// <summary>Where events go.</summary>
    public PoolLog Log { get; }

    /// <summary>Completes when as many machines are ready as were asked for; fails with the first machine's failure before that.</summary>
    public TaskCompletionSource Filled { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

    /// <summary>How many are to be ready.</summary>
    public int Size => Locked(() => _size);

    /// <summary>How many have been handed out and live, or are awaited.</summary>
    public int InUse => Locked(() => Count(SlotState.Running) + _waiters.Count);

    /// <summary>When a machine was asked for last, given back, or ready, in <see cref="Stopwatch"/> ticks.</summary>
    public long UsedAt { get; private set; } = Stopwatch.GetTimestamp();

    /// <summary>Changes how many are to be ready: more are begun at once, surplus ones end.</summary>
    /// <param name="size">0 or more.</param>
    public void Resize(int size)
    {
        lock (_lock)
        {
            _size = size;
            _isBackingOff = false;
            EndSurplus();
            Fill();
        }
    }

    /// <summary>Keeps fewer ready while this host is short of memory, one less with each call, down to one; and more again when it is not.</summary>
    /// <param name="isPressed">Whether it is short of memory now.</param>
    public void Adapt(bool isPressed)
    {
        int before, after;
        lock (_lock)
        {
            before = Wanted;
            _ceiling = isPressed ? Math.Max(1, before - 1) : Wanted < _size ? Wanted + 1 : int.MaxValue;
            EndSurplus();
            Fill();
            after = Wanted;
        }

        if (after < before)
        {
            Log.Write(PoolEvent.MemoryPressure, $"{after} are kept ready");
        }
    }

    /// <summary>Ends all machines that nobody has, and begins others: what they are made from has changed.</summary>
    public void Renew()
    {
        lock (_lock)
        {
            foreach (var slot in _slots.Where(slot => slot.State is SlotState.Restoring or SlotState.Greeting or SlotState.Ready))
            {
                slot.Release();
            }

            _ready.Clear();
            _isBackingOff = false;
            Fill();
        }
    }

    /// <summary>Looks again whether machines can be begun: time has passed, or memory was freed.</summary>
    public void Refill()
    {
        lock (_lock)
        {
            Fill();
        }
    }

    /// <summary>Takes a machine; whoever gets it releases it.</summary>
    /// <param name="cancellationToken">Leaves the queue.</param>
    /// <returns>A machine that nobody has had; completed already when one is ready.</returns>
    /// <exception cref="DhException">There will be none.</exception>
    public Task<PoolSlot> TakeAsync(CancellationToken cancellationToken)
    {
        var waiter = new Waiter();
        lock (_lock)
        {
            if (_ending || _size == 0)
            {
                return Task.FromException<PoolSlot>(new DhException(DhErrorReason.Host, _ending ? "the pool is ending." : "the pool has size 0."));
            }

            UsedAt = Stopwatch.GetTimestamp();
            // The newest: more of what it will touch is still in the processors' caches.
            if (_ready.Last is { Value: var slot })
            {
                _ready.RemoveLast();
                Give(slot, waiter);
                LetLongRunsGiveWay();
                _ = ReplaceAsync(slot);
                return waiter.Taken.Task;
            }

            waiter.Node = _waiters.AddLast(waiter);
            Fill();
            if (Starting == 0 && Hopelessness() is { } why)
            {
                _waiters.Remove(waiter.Node);
                waiter.Node = null;
                return Task.FromException<PoolSlot>(new DhException(DhErrorReason.Host, why));
            }
        }

        // Outside the lock: a token that is cancelled already calls at once.
        _ = cancellationToken.Register(() => Leave(waiter, cancellationToken));
        return waiter.Taken.Task;
    }

    /// <summary>A run has lasted long: it gives way as long as other machines are made ready, or have runs that have just begun.</summary>
    /// <param name="slot">Where it runs.</param>
    public void LastsLong(PoolSlot slot)
    {
        lock (_lock)
        {
            slot.IsLong = true;
            LetLongRunsGiveWay();
        }
    }

    /// <summary>Keeps in mind how long somebody has waited for a machine.</summary>
    /// <param name="time">From the connection until the machine was sent.</param>
    public void Waited(TimeSpan time)
    {
        lock (_lock)
        {
            _waitsMs.Enqueue(time.TotalMilliseconds);
            if (_waitsMs.Count > KeptWaits)
            {
                _waitsMs.Dequeue();
            }
        }
    }

    /// <summary>What it does, for a status; its maker adds who it is.</summary>
    public (int Size, int Ready, int Starting, int Running, int Waiting, long Restored, long HandedOut, long Failed, double[] WaitsMs) Counts()
    {
        lock (_lock)
        {
            return (_size, _ready.Count, Starting, Count(SlotState.Running), _waiters.Count, _restored, _handedOut, _failed, [.. _waitsMs]);
        }
    }

    /// <summary>The machines that live.</summary>
    public IReadOnlyList<IPoolMachine> Machines() => Locked<IReadOnlyList<IPoolMachine>>(() => [.. _slots.Select(slot => slot.Machine).OfType<IPoolMachine>()]);

    /// <summary>Ends all machines, also those that somebody has, and refuses whoever waits; completes when nothing is left.</summary>
    public async ValueTask DisposeAsync()
    {
        Task empty;
        lock (_lock)
        {
            _ending = true;
            _size = 0;
            _ready.Clear();
            RefuseWaiters("the pool is ending.");
            foreach (var slot in _slots)
            {
                slot.Release();
            }

            _empty ??= new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            if (_slots.Count == 0)
            {
                _empty.TrySetResult();
            }

            empty = _empty.Task;
        }

        await empty.ConfigureAwait(false);
    }

    // What a slot's owner says.

    /// <summary>Its guest has answered.</summary>
    /// <returns>Whether it was handed out.</returns>
    internal bool Greeted(PoolSlot slot)
    {
        lock (_lock)
        {
            ThrowIfReleased(slot);
            _restored++;
            _failuresInRow = 0;
            slot.State = SlotState.Greeting;
            if (!TryGiveToWaiter(slot))
            {
                return false;
            }

            Fill();
            return true;
        }
    }

    /// <summary>It can be handed out.</summary>
    internal void Ready(PoolSlot slot)
    {
        bool full;
        lock (_lock)
        {
            ThrowIfReleased(slot);
            slot.State = SlotState.Ready;
            UsedAt = Stopwatch.GetTimestamp(); // nobody is idle who still waits for the first one
            if (!TryGiveToWaiter(slot))
            {
                _ready.AddLast(slot);
                EndSurplus();
            }

            Fill();
            full = _ready.Count >= Wanted;
        }

        Log.Write(PoolEvent.Ready, $"sandbox={slot.Number}");
        if (full && Filled.TrySetResult())
        {
            Log.Write(PoolEvent.Full, "");
        }
    }

    /// <summary>It is going to be ended.</summary>
    internal void Ending(PoolSlot slot, string? failure)
    {
        lock (_lock)
        {
            bool before = slot.State is SlotState.Restoring or SlotState.Greeting;
            UsedAt = slot.State == SlotState.Running ? Stopwatch.GetTimestamp() : UsedAt;
            slot.State = SlotState.Ending;
            _ready.Remove(slot);
            if (failure is not null)
            {
                _failed++;
            }

            if (failure is not null && before)
            {
                // Not at once again: what failed mostly fails again, and takes a processor while it does.
                var backoff = _limits.FirstBackoff * (1 << Math.Min(_failuresInRow++, MaxDoublings));
                _lastFailure = failure;
                _isBackingOff = true;
                RefuseWaiters(failure);
                _ = EndBackoffAsync(backoff, ++_backoffs);
            }

            LetLongRunsGiveWay();
        }

        if (failure is not null)
        {
            Log.Write(PoolEvent.Failed, $"sandbox={slot.Number} {Untrusted.OneLine(failure, 1000)}");
            Filled.TrySetException(new DhException(DhErrorReason.Vmm, failure));
        }
        else
        {
            Log.Write(PoolEvent.Ending, $"sandbox={slot.Number}");
        }
    }

    /// <summary>Nothing of it is left.</summary>
    internal void Gone(PoolSlot slot)
    {
        lock (_lock)
        {
            slot.State = SlotState.Gone;
            _slots.Remove(slot);
            if (_slots.Count == 0)
            {
                _empty?.TrySetResult();
            }

            Fill();
        }
    }

    private int Wanted => Math.Min(_size, _ceiling);

    private int Starting => Count(SlotState.Restoring) + Count(SlotState.Greeting);

    private int Count(SlotState state) => _slots.Count(slot => slot.State == state);

    private T Locked<T>(Func<T> read)
    {
        lock (_lock)
        {
            return read();
        }
    }

    // A machine that is to end is handed out to nobody.
    private static void ThrowIfReleased(PoolSlot slot)
    {
        if (slot.IsReleased)
        {
            throw new OperationCanceledException();
        }
    }

    /// <summary>Begins another machine for one that was handed out when that has ended, or soon: a restore would take the processor from the run.</summary>
    private async Task ReplaceAsync(PoolSlot slot)
    {
        await Task.WhenAny(slot.Released, Task.Delay(ReplaceAfter)).ConfigureAwait(false);
        Refill();
    }

    /// <summary>Why nobody who waits will get a machine soon; null when one may come.</summary>
    private string? Hopelessness() =>
        _isBackingOff ? _lastFailure
        : _isShort && !_slots.Any(slot => slot.State is SlotState.Running or SlotState.Ending) ? "memory does not suffice for one more."
        : null;

    private async Task EndBackoffAsync(TimeSpan time, int number)
    {
        await Task.Delay(time).ConfigureAwait(false);
        lock (_lock)
        {
            if (number == _backoffs) // none has begun since
            {
                _isBackingOff = false;
                Fill();
            }
        }
    }

    private void Fill()
    {
        BeginMissing();
        LetLongRunsGiveWay();
    }

    /// <summary>Comes after every change of a state. A machine that is to end does not give way: its processes need a processor for that, too.</summary>
    private void LetLongRunsGiveWay()
    {
        bool othersCome = _slots.Any(slot => slot.State is SlotState.Restoring or SlotState.Greeting || (slot.State == SlotState.Running && !slot.IsLong));
        foreach (var slot in _slots.Where(slot => slot.IsLong))
        {
            bool givesWay = othersCome && slot.State == SlotState.Running;
            if (slot.IsGivingWay != givesWay)
            {
                slot.IsGivingWay = givesWay;
                slot.Machine!.GiveWay(givesWay);
            }
        }
    }

    private void BeginMissing()
    {
        if (_ending || _isBackingOff)
        {
            return;
        }

        int starting = Starting;
        for (int missing = Wanted + _waiters.Count - _ready.Count - starting; missing > 0 && starting < (_waiters.Count > 0 ? _limits.Concurrency : (_limits.Concurrency + 1) / 2); missing--, starting++)
        {
            // What has been begun has not taken its memory yet.
            long bytes = _machines.BytesPerMachine, available = _availableBytes() - (starting * bytes);
            if (available < bytes)
            {
                if (!_isShort)
                {
                    Log.Write(PoolEvent.MemoryShort, string.Create(CultureInfo.InvariantCulture, $"one more sandbox takes {bytes >> 20} MiB, {Math.Max(0, available) >> 20} MiB are to be had"));
                }

                _isShort = true;
                return;
            }

            _isShort = false;
            var slot = new PoolSlot { Number = ++_lastNumber };
            _slots.Add(slot);
            _ = Task.Run(() => slot.RunAsync(this, _machines, _limits.StepLimit));
        }
    }

    private void EndSurplus()
    {
        while (_ready.Count > Wanted && _ready.First is { Value: var slot })
        {
            _ready.RemoveFirst();
            slot.Release();
        }
    }

    private bool TryGiveToWaiter(PoolSlot slot)
    {
        if (_waiters.First is not { Value: var waiter })
        {
            return false;
        }

        _waiters.RemoveFirst();
        Give(slot, waiter);
        return true;
    }

    private void Give(PoolSlot slot, Waiter waiter)
    {
        waiter.Node = null;
        slot.State = SlotState.Running;
        _handedOut++;
        waiter.Taken.SetResult(slot);
    }

    private void Leave(Waiter waiter, CancellationToken cancellationToken)
    {
        lock (_lock)
        {
            if (waiter.Node is null)
            {
                return; // it has got its machine, or was refused
            }

            _waiters.Remove(waiter.Node);
            waiter.Node = null;
        }

        waiter.Taken.TrySetCanceled(cancellationToken);
    }

    private void RefuseWaiters(string why)
    {
        foreach (var waiter in _waiters)
        {
            waiter.Node = null;
            waiter.Taken.SetException(new DhException(DhErrorReason.Vmm, why));
        }

        _waiters.Clear();
    }

    /// <summary>Somebody who has asked for a machine.</summary>
    private sealed class Waiter
    {
        public TaskCompletionSource<PoolSlot> Taken { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

        /// <summary>Its place in the queue; null when it has none (any more).</summary>
        public LinkedListNode<Waiter>? Node { get; set; }
    }
}

/// <summary>What a pool keeps to.</summary>
/// <param name="Concurrency">How many machines are restored at once, at most; half as many while nobody waits.</param>
/// <param name="StepLimit">How long a restore may take, and the run that does nothing, each.</param>
internal sealed record PoolLimits(int Concurrency, TimeSpan StepLimit)
{
    /// <summary>After how much time a restore that has failed is tried again; it doubles with each failure, up to 32 times.</summary>
    public TimeSpan FirstBackoff { get; init; } = TimeSpan.FromSeconds(1);
}
