namespace Dh.Pool;

/// <summary>Where a machine of a pool is in its life.</summary>
internal enum SlotState
{
    /// <summary>The VMM starts, memory comes back, the guest becomes its own.</summary>
    Restoring,

    /// <summary>The guest answers, and runs code that does nothing.</summary>
    Greeting,

    /// <summary>It waits for whoever takes it.</summary>
    Ready,

    /// <summary>Somebody has it.</summary>
    Running,

    /// <summary>It is being killed, reaped and removed.</summary>
    Ending,

    /// <summary>Nothing of it is left.</summary>
    Gone,
}

/// <summary>
/// One machine of a pool, from its restore to its end. One task owns it, <see cref="RunAsync"/>; the others only ask, by completing what it
/// waits for:
/// <code>
/// Restoring --> Greeting --> Ready --Take--> Running --Release--> Ending --> Gone
///     |            |           |                |                   |
///     +------------+-----------+----------------+-------------------+
///       failed, time over, the machine has ended, Release: nothing is used again, and nothing is handed out twice
/// </code>
/// A machine whose guest has answered is handed out from Greeting to somebody who waits: the code that does nothing would only delay it.
/// Every wait but Ready and Running is bounded; those end with the machine, too.
/// </summary>
#pragma warning disable CA1001 // A source without a timer and without a wait handle holds nothing, and is cancelled when nobody else may know the slot any more.
internal sealed class PoolSlot
#pragma warning restore CA1001
{
    private readonly TaskCompletionSource _released = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly CancellationTokenSource _stop = new();

    /// <summary>Its number, counted from 1 in its pool.</summary>
    public required int Number { get; init; }

    /// <summary>Where it is. Changed by its owner, and to Running by the pool, under the pool's lock.</summary>
    public SlotState State { get; set; } = SlotState.Restoring;

    /// <summary>Whether its run has lasted long. Changed by the pool, under its lock, as the next one.</summary>
    public bool IsLong { get; set; }

    /// <summary>Whether its machine has been told to give way.</summary>
    public bool IsGivingWay { get; set; }

    /// <summary>The machine; null while it is restored. Who has taken the slot may use it.</summary>
    public IPoolMachine? Machine { get; private set; }

    /// <summary>Ends the machine, wherever it is in its life. May be called at any time, more than once.</summary>
    public void Release()
    {
        _released.TrySetResult();
        _ = _stop.CancelAsync(); // what it wakes runs elsewhere: the caller may hold the pool's lock
    }

    /// <summary>Whether <see cref="Release"/> was called.</summary>
    public bool IsReleased => _released.Task.IsCompleted;

    /// <summary>Completes when <see cref="Release"/> is called.</summary>
    public Task Released => _released.Task;

    /// <summary>Lives the machine's life.</summary>
    /// <param name="pool">The pool that it belongs to.</param>
    /// <param name="machines">Makes the machine.</param>
    /// <param name="stepLimit">How long the restore and the code that does nothing may take, each.</param>
    public async Task RunAsync(SandboxPool pool, IPoolMachines machines, TimeSpan stepLimit)
    {
        string? failure = null;
        try
        {
            await StartAsync(pool, machines, stepLimit).ConfigureAwait(false);
            await Task.WhenAny(_released.Task, Machine!.Ended).ConfigureAwait(false);
            failure = _released.Task.IsCompleted ? null : "the machine has ended by itself";
        }
        catch (OperationCanceledException) when (_stop.IsCancellationRequested)
        {
            // Released before it was ready.
        }
        catch (OperationCanceledException)
        {
            failure = $"it was not ready within {stepLimit.TotalSeconds:0} s";
        }
#pragma warning disable CA1031 // Whatever befalls one machine is told by its pool, and must not end the others.
        catch (Exception e)
#pragma warning restore CA1031
        {
            failure = e.Message;
        }

        pool.Ending(this, failure);
        try
        {
            if (Machine is not null)
            {
                await Machine.DisposeAsync().ConfigureAwait(false);
            }
        }
#pragma warning disable CA1031 // As above: what could not be ended is told.
        catch (Exception e)
#pragma warning restore CA1031
        {
            pool.Log.Write(PoolEvent.NotEnded, $"sandbox={Number} {Untrusted.OneLine(e.Message)}");
        }
        finally
        {
            pool.Gone(this);
        }
    }

    private async Task StartAsync(SandboxPool pool, IPoolMachines machines, TimeSpan stepLimit)
    {
        using (var limit = Limit(stepLimit))
        {
            Machine = await machines.RestoreAsync(limit.Token).ConfigureAwait(false);
        }

        if (pool.Greeted(this))
        {
            return; // somebody has waited for it
        }

        using (var limit = Limit(stepLimit))
        {
            await Machine.WarmUpAsync(limit.Token).ConfigureAwait(false);
        }

        pool.Ready(this);
    }

    private CancellationTokenSource Limit(TimeSpan stepLimit)
    {
        var limit = CancellationTokenSource.CreateLinkedTokenSource(_stop.Token);
        limit.CancelAfter(stepLimit);
        return limit;
    }
}
