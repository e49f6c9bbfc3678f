using System.Collections.Concurrent;
using Dh.Pool;

namespace Dh.Tests.Pool;

/// <summary>Machines that are nothing but their state: they say when a pool does with them what it must not.</summary>
internal sealed class FakeMachines : IPoolMachines
{
    private int _restoring;
    private int _made;

    /// <summary>What a machine takes.</summary>
    public long BytesPerMachine { get; init; } = 1;

    /// <summary>What the next restores do before they are done.</summary>
    public Func<int, Task> Restoring { get; set; } = _ => Task.CompletedTask;

    /// <summary>What the next warm-ups do.</summary>
    public Func<int, Task> WarmingUp { get; set; } = _ => Task.CompletedTask;

    /// <summary>How many restores were under way at once, at most.</summary>
    public int MostRestoring { get; private set; }

    /// <summary>What was made.</summary>
    public ConcurrentBag<FakeMachine> Made { get; } = [];

    /// <summary>What a pool has done that it must not do.</summary>
    public ConcurrentQueue<string> Mistakes { get; } = new();

    public async Task<IPoolMachine> RestoreAsync(CancellationToken cancellationToken)
    {
        lock (Made)
        {
            MostRestoring = Math.Max(MostRestoring, ++_restoring);
        }

        try
        {
            int number = Interlocked.Increment(ref _made);
            await Restoring(number).WaitAsync(cancellationToken);
            var machine = new FakeMachine(this, number);
            Made.Add(machine);
            return machine;
        }
        finally
        {
            lock (Made)
            {
                _restoring--;
            }
        }
    }

    internal sealed class FakeMachine(FakeMachines all, int number) : IPoolMachine
    {
        private readonly TaskCompletionSource _ended = new(TaskCreationOptions.RunContinuationsAsynchronously);
        private int _owners;
        private int _disposals;

        public bool IsGone => _disposals > 0;

        /// <summary>Whether it has only the processor time that nothing else wants.</summary>
        public bool IsGivingWay { get; private set; }

        public Task Ended => _ended.Task;

        public async Task WarmUpAsync(CancellationToken cancellationToken)
        {
            if (_owners > 0 || _disposals > 0)
            {
                all.Mistakes.Enqueue($"machine {number} is warmed up when it is somebody's, or gone");
            }

            await all.WarmingUp(number).WaitAsync(cancellationToken);
        }

        /// <summary>It ends by itself.</summary>
        public void End() => _ended.TrySetResult();

        /// <summary>Somebody has got it.</summary>
        public void Own()
        {
            if (Interlocked.Increment(ref _owners) != 1)
            {
                all.Mistakes.Enqueue($"machine {number} has a second owner");
            }
        }

        public void GiveWay(bool isGivingWay)
        {
            if (isGivingWay == IsGivingWay || _disposals > 0)
            {
                all.Mistakes.Enqueue($"machine {number} is told again, or when it is gone, that it gives way: {isGivingWay}");
            }

            IsGivingWay = isGivingWay;
        }

        public ValueTask DisposeAsync()
        {
            if (IsGivingWay)
            {
                all.Mistakes.Enqueue($"machine {number} is ended when it has no processor to end on");
            }

            if (Interlocked.Increment(ref _disposals) != 1)
            {
                all.Mistakes.Enqueue($"machine {number} is ended twice");
            }

            End();
            return ValueTask.CompletedTask;
        }
    }
}
