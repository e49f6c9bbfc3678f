using System.Globalization;
using System.Net.Sockets;
using Dh.Guest;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Pool;

/// <summary>Restores a pool's sandboxes.</summary>
/// <param name="options">How.</param>
internal sealed class SandboxMachines(SandboxOptions options) : IPoolMachines
{
    // What a VMM takes beside the guest's memory, before one was measured.
    private const long VmmBytes = 96L << 20;

    // Where processors are short, a run that has just begun comes first: before what is made ready, and before a run that has lasted long.
    private const int ReadyingCpuWeight = 50;
    private const int RunCpuWeight = 100;
    private const int LongRunCpuWeight = 25;

    private readonly SandboxOptions _options = options.WithCpuWeight(ReadyingCpuWeight);

    private volatile Snapshot? _snapshot;
    private long _largestBytes;

    /// <summary>What the next ones are restored from; null when there is nothing.</summary>
    public Snapshot? Snapshot
    {
        get => _snapshot;
        set
        {
            _snapshot = value;
            Interlocked.Exchange(ref _largestBytes, value is null ? 0 : Estimate(value));
        }
    }

    /// <inheritdoc/>
    public long BytesPerMachine => Interlocked.Read(ref _largestBytes);

    /// <inheritdoc/>
    public async Task<IPoolMachine> RestoreAsync(CancellationToken cancellationToken)
    {
        var snapshot = _snapshot ?? throw new DhException(DhErrorReason.NotFound, "the snapshot is gone. Run `dh vm prepare`.");
        return new SandboxMachine(this, await Sandbox.RestoreAsync(snapshot, _options, cancellationToken).ConfigureAwait(false));
    }

    /// <summary>What a process has resident, in bytes; 0 when it has ended.</summary>
    /// <param name="processId">The process.</param>
    public static long ResidentBytes(int processId)
    {
        try
        {
            // proc_pid_statm(5): the second field, in pages.
            return long.Parse(File.ReadAllText($"/proc/{processId}/statm").Split(' ')[1], CultureInfo.InvariantCulture) * Environment.SystemPageSize;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return 0;
        }
    }

    private void Measured(long bytes)
    {
        for (long largest; bytes > (largest = Interlocked.Read(ref _largestBytes));)
        {
            Interlocked.CompareExchange(ref _largestBytes, bytes, largest);
        }
    }

    private long Estimate(Snapshot snapshot)
    {
        long all = snapshot.Manifest.DataBytes;
        bool isPartial = !_options.Fill && _options.MemoryPolicy is not MemoryPolicy.Eager && File.Exists(snapshot.WorkingSetPath);
        return VmmBytes + (isPartial ? Math.Min(all, 2 * new FileInfo(snapshot.WorkingSetPath).Length) : all);
    }

    /// <summary>A sandbox in a pool.</summary>
    internal sealed class SandboxMachine(SandboxMachines owner, Sandbox sandbox) : IPoolMachine
    {
        private static readonly ExecutionRequest Nothing = new() { Source = "print('dh')\n1 + 1" };

        /// <summary>What is handed out.</summary>
        public Sandbox Sandbox => sandbox;

        /// <inheritdoc/>
        public Task Ended => sandbox.VmmExited;

        /// <inheritdoc/>
        public async Task WarmUpAsync(CancellationToken cancellationToken)
        {
            // The second one goes through what the first one's end begins: the fork of the next process.
            for (int i = 0; i < 2; i++)
            {
                var result = await sandbox.ExecuteAsync(Nothing, Discarded.Output, cancellationToken).ConfigureAwait(false);
                cancellationToken.ThrowIfCancellationRequested();
                if (result.ExitCode != 0)
                {
                    throw new DhException(DhErrorReason.Guest, $"code that does nothing ended with {result.ExitCode} in the guest: {Untrusted.OneLine(result.Error?.Message)}");
                }
            }

            await sandbox.CorrectClockAsync(cancellationToken).ConfigureAwait(false);
            owner.Measured(ResidentBytes(sandbox.VmmProcessId));
        }

        /// <summary>Ends the use of the guest channel here.</summary>
        /// <returns>The guest channel, which stays the sandbox's, and the number of the last request.</returns>
        public (Socket Channel, long LastRequest) HandOver() => sandbox.HandOver();

        /// <summary>Lets a run that has just begun come before all else that the pool does.</summary>
        public void Prefer() => sandbox.SetCpuWeight(RunCpuWeight);

        /// <summary>Lets others come before a run that has lasted long.</summary>
        public void Defer() => sandbox.SetCpuWeight(LongRunCpuWeight);

        /// <inheritdoc/>
        public void GiveWay(bool isGivingWay) => sandbox.SetIdle(isGivingWay);

        /// <inheritdoc/>
        public ValueTask DisposeAsync() => sandbox.DisposeAsync();

        private sealed class Discarded : IOutputSink
        {
            public static Discarded Output { get; } = new();

            public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken) => ValueTask.CompletedTask;
        }
    }
}
