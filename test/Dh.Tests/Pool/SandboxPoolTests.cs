using System.Collections.Concurrent;
using CsCheck;
using Dh.Pool;

namespace Dh.Tests.Pool;

public sealed class SandboxPoolTests
{
    private const int Concurrency = 3;
    private const int MaxSize = 4;
    private static readonly TimeSpan Soon = TimeSpan.FromSeconds(20);

    private static CancellationToken Test => TestContext.Current.CancellationToken;

    private enum Act
    {
        Take,
        TakeAndLeave,
        Release,
        LastLong,
        EndMachine,
        Resize,
        Renew,
        Refill,
        Pause,
    }

    [Fact]
    public async Task In_any_history_a_machine_has_one_owner_and_every_one_is_ended()
    {
        var act = Gen.Select(Gen.Enum<Act>(), Gen.Int[0, MaxSize]);
        await Gen.Select(Gen.Int[0, 9], act.Array[0, 25].Array[1, 4]).SampleAsync(
            async history =>
            {
                var (failures, workers) = history;
                var machines = new FakeMachines
                {
                    Restoring = number => DoAsync(number, failures),
                    WarmingUp = number => DoAsync(number + 1, failures),
                };
                var pool = NewPool(machines);
                var held = new ConcurrentQueue<PoolSlot>();
                pool.Resize(2);
                await Task.WhenAll(workers.Select(acts => Task.Run(() => WorkAsync(pool, machines, held, acts)))).WaitAsync(Soon, Test);
                await pool.DisposeAsync().AsTask().WaitAsync(Soon, Test);
                Assert.Empty(machines.Mistakes);
                Assert.All(machines.Made, machine => Assert.True(machine.IsGone));
                Assert.InRange(machines.MostRestoring, 0, Concurrency);
                Assert.Equal((0, 0, 0, 0), (pool.Counts().Ready, pool.Counts().Starting, pool.Counts().Running, pool.Counts().Waiting));
            },
            iter: 300, threads: 1);
    }

    [Fact]
    public async Task Who_waits_is_served_in_turn_and_without_a_warm_up()
    {
        var go = new TaskCompletionSource();
        var machines = new FakeMachines { Restoring = _ => go.Task, WarmingUp = _ => throw new InvalidOperationException("nobody waits for that") };
        await using var pool = NewPool(machines);
        pool.Resize(1);
        var first = pool.TakeAsync(Test);
        var second = pool.TakeAsync(Test);
        Assert.False(first.IsCompleted);
        go.SetResult();
        Assert.True((await first.WaitAsync(Soon, Test)).Number != (await second.WaitAsync(Soon, Test)).Number);
    }

    [Fact]
    public async Task What_was_handed_out_is_replaced_and_its_end_is_waited_for()
    {
        var machines = new FakeMachines();
        await using var pool = NewPool(machines);
        pool.Resize(2);
        await pool.Filled.Task.WaitAsync(Soon, Test);
        var slot = await pool.TakeAsync(Test);
        Assert.Equal(SlotState.Running, slot.State);
        slot.Release();
        await UntilAsync(() => pool.Counts() is { Ready: 2, Running: 0 });
        Assert.Equal(SlotState.Gone, slot.State);
        Assert.Single(machines.Made, machine => machine.IsGone);
    }

    [Fact]
    public async Task A_run_that_lasts_long_gives_way_while_others_come_and_only_then()
    {
        var go = new TaskCompletionSource();
        var machines = new FakeMachines { Restoring = number => number <= 3 ? Task.CompletedTask : go.Task };
        await using var pool = NewPool(machines);
        pool.Resize(2);
        await pool.Filled.Task.WaitAsync(Soon, Test);
        var slot = await pool.TakeAsync(Test);
        var machine = (FakeMachines.FakeMachine)slot.Machine!;
        await UntilAsync(() => pool.Counts() is { Ready: 2, Starting: 0 });
        pool.LastsLong(slot);
        Assert.False(machine.IsGivingWay); // nobody else is there
        var other = await pool.TakeAsync(Test);
        Assert.True(machine.IsGivingWay); // for a run that has just begun
        await UntilAsync(() => pool.Counts().Starting == 1);
        pool.LastsLong(other);
        Assert.True(machine.IsGivingWay && ((FakeMachines.FakeMachine)other.Machine!).IsGivingWay); // for one that is made ready
        go.SetResult();
        await UntilAsync(() => pool.Counts() is { Ready: 2, Starting: 0 });
        Assert.False(machine.IsGivingWay || ((FakeMachines.FakeMachine)other.Machine!).IsGivingWay);
        Assert.Empty(machines.Mistakes);
    }

    [Fact]
    public async Task A_machine_that_ends_while_it_is_ready_is_handed_out_to_nobody()
    {
        var machines = new FakeMachines();
        await using var pool = NewPool(machines);
        pool.Resize(1);
        await pool.Filled.Task.WaitAsync(Soon, Test);
        var dead = machines.Made.Single();
        dead.End();
        await UntilAsync(() => dead.IsGone);
        Assert.NotSame(dead, (await pool.TakeAsync(Test).WaitAsync(Soon, Test)).Machine);
        Assert.Equal(1, pool.Counts().Failed);
    }

    [Fact]
    public async Task A_restore_that_fails_is_told_to_who_waits_and_not_tried_again_at_once()
    {
        var machines = new FakeMachines { Restoring = _ => Task.FromException(new DhException(DhErrorReason.Vmm, "no such machine")) };
        await using var pool = new SandboxPool(machines, () => long.MaxValue / 2, new PoolLimits(Concurrency, Soon) { FirstBackoff = Soon }, new PoolLog(_ => { }));
        pool.Resize(1);
        var waiting = await Assert.ThrowsAsync<DhException>(() => pool.TakeAsync(Test).WaitAsync(Soon, Test));
        var late = await Assert.ThrowsAsync<DhException>(() => pool.TakeAsync(Test).WaitAsync(Soon, Test));
        Assert.Equal(("no such machine", "no such machine"), (waiting.Message, late.Message));
        await Assert.ThrowsAsync<DhException>(() => pool.Filled.Task.WaitAsync(Soon, Test));
        Assert.Equal(0, pool.Counts().Starting);
    }

    [Fact]
    public async Task Memory_is_counted_with_what_was_begun()
    {
        var go = new TaskCompletionSource();
        var machines = new FakeMachines { BytesPerMachine = 100, Restoring = _ => go.Task };
        await using var pool = new SandboxPool(machines, () => 250, new PoolLimits(8, Soon), new PoolLog(_ => { }));
        pool.Resize(4);
        Assert.Equal(2, pool.Counts().Starting);
        go.SetResult();
    }

    [Fact]
    public async Task Without_memory_for_one_nobody_waits_in_vain()
    {
        var machines = new FakeMachines { BytesPerMachine = 100 };
        await using var pool = new SandboxPool(machines, () => 99, new PoolLimits(8, Soon), new PoolLog(_ => { }));
        pool.Resize(1);
        var refused = await Assert.ThrowsAsync<DhException>(() => pool.TakeAsync(Test).WaitAsync(Soon, Test));
        Assert.Equal("memory does not suffice for one more.", refused.Message);
        Assert.Empty(machines.Made);
    }

    [Fact]
    public async Task A_pool_of_size_0_or_one_that_ends_hands_out_nothing()
    {
        var pool = NewPool(new FakeMachines());
        await Assert.ThrowsAsync<DhException>(() => pool.TakeAsync(Test));
        pool.Resize(1);
        await pool.DisposeAsync();
        await Assert.ThrowsAsync<DhException>(() => pool.TakeAsync(Test));
    }

    [Fact]
    public async Task A_new_snapshot_ends_what_nobody_has()
    {
        var machines = new FakeMachines();
        await using var pool = NewPool(machines);
        pool.Resize(2);
        await pool.Filled.Task.WaitAsync(Soon, Test);
        var mine = await pool.TakeAsync(Test);
        await UntilAsync(() => pool.Counts().Ready == 2);
        var old = machines.Made.Where(machine => machine != mine.Machine).ToArray();
        pool.Renew();
        await UntilAsync(() => pool.Counts().Ready == 2 && old.All(machine => machine.IsGone));
        Assert.Equal(SlotState.Running, mine.State);
    }

    [Fact]
    public async Task While_memory_is_short_fewer_are_ready_and_then_as_many_as_before()
    {
        await using var pool = NewPool(new FakeMachines());
        pool.Resize(3);
        await pool.Filled.Task.WaitAsync(Soon, Test);
        pool.Adapt(isPressed: true);
        Assert.Equal(2, pool.Counts().Ready);
        pool.Adapt(isPressed: true);
        pool.Adapt(isPressed: true);
        Assert.Equal((3, 1), (pool.Size, pool.Counts().Ready));
        pool.Adapt(isPressed: false);
        pool.Adapt(isPressed: false);
        await UntilAsync(() => pool.Counts().Ready == 3);
    }

    private static SandboxPool NewPool(FakeMachines machines) =>
        new(machines, () => long.MaxValue / 2, new PoolLimits(Concurrency, Soon) { FirstBackoff = TimeSpan.FromMilliseconds(1) }, new PoolLog(_ => { }));

    private static async Task DoAsync(int number, int failures)
    {
        await Task.Yield();
        if ((number * 7) % 10 < failures)
        {
            throw new DhException(DhErrorReason.Vmm, "as planned");
        }
    }

    private static async Task WorkAsync(SandboxPool pool, FakeMachines machines, ConcurrentQueue<PoolSlot> held, (Act Act, int Value)[] acts)
    {
        foreach (var (act, value) in acts)
        {
            switch (act)
            {
                case Act.Take or Act.TakeAndLeave:
                    using (var leave = new CancellationTokenSource(act == Act.Take ? Soon : TimeSpan.FromMilliseconds(value)))
                    {
                        await TakeAsync(pool, held, leave.Token);
                    }

                    break;
                case Act.Release when held.TryDequeue(out var slot):
                    slot.Release();
                    slot.Release();
                    break;
                case Act.LastLong when held.TryPeek(out var slot):
                    pool.LastsLong(slot);
                    break;
                case Act.EndMachine:
                    machines.Made.Skip(value).FirstOrDefault()?.End();
                    break;
                case Act.Resize:
                    pool.Resize(value);
                    break;
                case Act.Renew:
                    pool.Renew();
                    break;
                case Act.Refill:
                    pool.Refill();
                    break;
                case Act.Pause:
                    await Task.Delay(value, Test);
                    break;
            }

            Assert.InRange(pool.Counts().Ready, 0, MaxSize);
        }
    }

    private static async Task TakeAsync(SandboxPool pool, ConcurrentQueue<PoolSlot> held, CancellationToken leave)
    {
        try
        {
            var slot = await pool.TakeAsync(leave);
            ((FakeMachines.FakeMachine)slot.Machine!).Own();
            held.Enqueue(slot);
        }
        catch (Exception e) when (e is DhException or OperationCanceledException)
        {
            // Refused, or out of patience.
        }
    }

    private static async Task UntilAsync(Func<bool> condition)
    {
        using var limit = new CancellationTokenSource(Soon);
        while (!condition())
        {
            await Task.Delay(2, limit.Token);
        }
    }
}
