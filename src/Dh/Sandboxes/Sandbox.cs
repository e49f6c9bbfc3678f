using System.Diagnostics;
using System.Net.Sockets;
using Dh.Guest;
using Dh.Linux;
using Dh.Paging;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.Sandboxes;

/// <summary>
/// One microVM, restored from a snapshot, with its guest channel and its run directory, until it is destroyed:
/// <code>
/// Restoring -> Ready -> Running -> Ready ... -> disposed
///     |          |         |
///     +----------+---------+--> failed: a DhException; dispose it
/// </code>
/// It is used by one caller at a time. Disposing ends the VMM, has it reaped, closes the page server's userfaultfd and removes the run
/// directory, in that order.
/// </summary>
public sealed class Sandbox : ISandbox
{
    // How long the page server and the launcher take at most to see that a machine has ended.
    private static readonly TimeSpan EndTimeLimit = TimeSpan.FromSeconds(1);

    private readonly FileLock _lease;
    private readonly string _name;
    private readonly IVmm _vmm;
    private readonly PageServer? _pageServer;
    private readonly string? _staleRuns;
    private Socket? _guest; // the VMM's
    private GuestSession? _session;
    private TimeSpan _timeLimit; // for each answer of the guest that is no run's

    private Sandbox(Snapshot snapshot, FileLock lease, string name, IVmm vmm, PageServer? pageServer, MemoryPolicy policy, string? notice, string? staleRuns)
    {
        _name = name;
        _staleRuns = staleRuns;
        Snapshot = snapshot;
        _lease = lease;
        _vmm = vmm;
        _pageServer = pageServer;
        MemoryPolicy = policy;
        Notice = notice;
    }

    /// <summary>What it was restored from.</summary>
    public Snapshot Snapshot { get; }

    /// <inheritdoc/>
    public MemoryPolicy MemoryPolicy { get; }

    /// <summary>What the page server did; null without one.</summary>
    public PopulationResult? Population { get; private set; }

    /// <inheritdoc/>
    public string? Notice { get; private set; }

    /// <inheritdoc/>
    public IsolationClass Isolation { get; private set; }

    /// <summary>The layers of the VMM's cage that were looked at: of a Firecracker its filters of system calls; none where there is no cage.</summary>
    public IReadOnlyList<CageLayer> Cage => _vmm.Cage;

    /// <summary>From the call of <see cref="RestoreAsync"/> until the guest had answered.</summary>
    public TimeSpan RestoreTime { get; private set; }

    /// <summary>The VMM's process, for diagnosis.</summary>
    public int VmmProcessId => _vmm.ProcessId;

    /// <summary>When the VMM was started, in <see cref="Stopwatch"/> ticks: what came before is this library's and its caller's own.</summary>
    public long VmmStartedAt => _vmm.StartedAt;

    /// <summary>Restores a sandbox that is ready to run code.</summary>
    /// <param name="snapshot">From what.</param>
    /// <param name="options">How; null for the defaults.</param>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be restored; nothing is left.</exception>
    public static async Task<Sandbox> RestoreAsync(Snapshot snapshot, SandboxOptions? options = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(snapshot);
        options ??= new SandboxOptions();
        long start = Stopwatch.GetTimestamp();
        var driver = await VmmCandidate.FindAsync(snapshot.Manifest.Vmm, options.Programs, DhHome.EnsurePrivate(options.Home.CacheDirectory), cancellationToken).ConfigureAwait(false);
        // What this VMM can have at best; what it has is known when it is about to run.
        RequireIsolation(Sandboxes.Isolation.Of(snapshot.Manifest.Accelerator, driver.IsJailed, driver.IsCaged), [], options);
        var host = await RestoreHost.OfAsync(snapshot, driver, options.Home, options.Installation, cancellationToken).ConfigureAwait(false);
        host.Require(snapshot);
        var lease = SnapshotStore.Lease(snapshot);
        IVmm? vmm = null;
        PageServer? pageServer = null;
        Sandbox? sandbox = null;
        try
        {
            var (memory, notice) = MemoryChoice.Of(snapshot, driver, options.MemoryPolicy);
            var policy = MemoryPolicy.File;
            string runs = DhHome.EnsurePrivate(options.Home.RunDirectory);
            string? staleRuns = StaleRunDirectories.Remove(runs) ? null : runs;
            string name = Guid.NewGuid().ToString("N");
            vmm = await driver.RestoreAsync(snapshot.Machine, memory, snapshot.StatePath, VmmOptions(name, options), cancellationToken).ConfigureAwait(false);
            if (memory is MemoryBackend.Uffd)
            {
                // The VMM takes longer to its handshake than the page server to open its source.
                (policy, var source, notice) = MemoryChoice.OpenSource(snapshot, options.MemoryPolicy);
                pageServer = vmm.ServeMemory(source, new PageServerOptions
                {
                    Policy = policy switch { MemoryPolicy.Eager => PopulationPolicy.Eager, MemoryPolicy.Prefetch => PopulationPolicy.Prefetch, _ => PopulationPolicy.Lazy },
                    Fill = options.Fill,
                    Record = options.Record,
                    // The VMM's limit comes first, and its explanation after one more: its message says which step did not end.
                    HandshakeTimeLimit = TimeSpan.FromTicks(Math.Min((options.RestoreTimeLimit + (2 * EndTimeLimit)).Ticks, TimeSpan.TicksPerHour)),
                    Failed = _ => vmm.Kill(),
                    Hold = vmm.Hold,
                });
            }

            sandbox = new Sandbox(snapshot, lease, name, vmm, pageServer, policy, notice, staleRuns);
            await sandbox.StartAsync(driver, options, cancellationToken).ConfigureAwait(false);
            sandbox.RestoreTime = Stopwatch.GetElapsedTime(start);
            RestoreLog.Append(options.Home, snapshot.Manifest.Id, new PastRestore(DateTimeOffset.UtcNow, policy.ToString().ToLowerInvariant(), sandbox.RestoreTime));
            return sandbox;
        }
        catch
        {
            if (sandbox is not null)
            {
                await sandbox.DisposeAsync().ConfigureAwait(false);
            }
            else
            {
                await EndAsync(vmm, pageServer, lease).ConfigureAwait(false);
            }

            throw;
        }
    }

    /// <inheritdoc/>
    public async Task<ExecutionResult> ExecuteAsync(ExecutionRequest request, IOutputSink output, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(request);
        ArgumentNullException.ThrowIfNull(output);
        try
        {
            return await _session!.ExecuteAsync(request, output, cancellationToken).ConfigureAwait(false);
        }
        catch (DhException e) when (e.Reason == DhErrorReason.Guest)
        {
            throw await ExplainAsync(e, "while code ran").ConfigureAwait(false);
        }
    }

    /// <summary>Ends the recording of touched pages.</summary>
    /// <param name="result">What the recorded code has ended with: what the guest touched later does not count.</param>
    /// <returns>The pages, in the order of the first touch.</returns>
    internal IReadOnlyList<TouchedPage> StopRecording(ExecutionResult result) => _pageServer?.StopRecording(result.ReceivedAt) ?? [];

    /// <summary>What the page server has done; null without one.</summary>
    internal PageServerStatistics? PageServerStatistics => _pageServer?.Statistics;

    /// <summary>Asks the guest to give memory back, or to take it again. The snapshot's machine must have a balloon.</summary>
    /// <param name="mib">What the guest is to have.</param>
    /// <param name="cancellationToken">Gives up.</param>
    internal Task SetBalloonAsync(int mib, CancellationToken cancellationToken) => _vmm.SetBalloonAsync(mib, cancellationToken);

    /// <summary>Completes when the VMM has ended, however; never fails.</summary>
    internal Task<VmmExit> VmmExited => _vmm.Exited;

    /// <summary>The last lines of the VMM's own output and of the guest's console; empty when there are none.</summary>
    internal string LastWords => _vmm.LastWords();

    /// <summary>Brings the guest's clock forward to the host's, more closely than a run does that finds the machine busy.</summary>
    /// <param name="cancellationToken">Gives up; the sandbox is of no more use then.</param>
    /// <exception cref="DhException">The guest did not answer in time, or wrongly.</exception>
    internal async Task CorrectClockAsync(CancellationToken cancellationToken)
    {
        try
        {
            await _session!.CorrectClockAsync(_timeLimit, cancellationToken).ConfigureAwait(false);
        }
        catch (DhException e) when (e.Reason == DhErrorReason.Guest)
        {
            throw await ExplainAsync(e, "while its clock was set").ConfigureAwait(false);
        }
    }

    /// <summary>Ends the use of the guest channel here, so that another process can go on with it; what is left to do here is to dispose this.</summary>
    /// <returns>The guest channel, which stays the VMM's, and the number of the last request.</returns>
    /// <exception cref="DhException">The guest has sent something that nobody has asked for.</exception>
    internal (Socket Channel, long LastRequest) HandOver() => (_guest!, _session!.HandOver());

    /// <summary>Gives the machine another share of the processors, for when they are short; nothing happens where it has no cgroup.</summary>
    /// <param name="cpuWeight">1 to 10,000; 100 is usual.</param>
    internal void SetCpuWeight(int cpuWeight) => Cgroups.Host.SetCpuWeight(_name, cpuWeight);

    /// <summary>Lets the machine have only the processor time that nothing else wants, or its share again; nothing happens where it has no cgroup.</summary>
    /// <param name="isIdle">Whether it gives way.</param>
    internal void SetIdle(bool isIdle) => Cgroups.Host.SetIdle(_name, isIdle);

    /// <summary>Leaves reaping and removal to the launcher when this is disposed: for a program that is about to exit.</summary>
    public void LeaveTeardown() => _vmm.LeaveTeardown();

    /// <inheritdoc/>
    public async ValueTask DisposeAsync()
    {
        _session?.Dispose();
        await EndAsync(_vmm, _pageServer, _lease).ConfigureAwait(false);
        if (Directory.Exists(_staleRuns))
        {
            _ = StaleRunDirectories.Remove(_staleRuns); // what was still ending when this began has ended by now
        }
    }

    private static async Task EndAsync(IVmm? vmm, PageServer? pageServer, FileLock lease)
    {
        try
        {
            if (vmm is not null)
            {
                await vmm.DisposeAsync().ConfigureAwait(false);
            }
        }
        finally
        {
            if (pageServer is not null)
            {
                await pageServer.DisposeAsync().ConfigureAwait(false);
            }

            lease.Dispose();
        }
    }

    private static VmmStartOptions VmmOptions(string name, SandboxOptions options) => new()
    {
        RunDirectory = Path.Combine(options.Home.RunDirectory, name),
        Installation = options.Installation,
        StepTimeLimit = options.RestoreTimeLimit,
        Caged = options.Caged,
        CpuWeight = options.CpuWeight,
    };

    private static void RequireIsolation(IsolationClass isolation, IReadOnlyList<CageLayer> layers, SandboxOptions options)
    {
        if (options.RequireIsolation is { } required && isolation < required)
        {
            string missing = string.Concat(layers.Where(layer => !layer.IsOn && layer.IsRequired)
                .Select(layer => $" Layer {layer.Name} is off ({Untrusted.OneLine(layer.Reason ?? "")}): {layer.Advice}."));
            throw new DhException(
                DhErrorReason.Host,
                $"This run would have isolation `{Sandboxes.Isolation.Name(isolation)}`, `{Sandboxes.Isolation.Name(required)}` is required.{missing} `dh doctor` says what is missing.");
        }
    }

    private async Task StartAsync(IVmmDriver driver, SandboxOptions options, CancellationToken cancellationToken)
    {
        var timeLimit = _timeLimit = options.RestoreTimeLimit;
        var restored = _vmm.WaitRestoredAsync(cancellationToken);
        if (_pageServer is not null)
        {
            var populated = _pageServer.WaitPopulatedAsync(cancellationToken);
            await Task.WhenAny(restored, populated).ConfigureAwait(false);
            if (populated.IsFaulted && !IsPeerEnded(populated.Exception))
            {
                await populated.ConfigureAwait(false);
            }

            try
            {
                await restored.ConfigureAwait(false);
            }
            catch (DhException)
            {
                // A VMM that was killed for the page server's failure has nothing to say of it.
                if (await PageServerFailureAsync().ConfigureAwait(false) is { } failure)
                {
                    throw failure;
                }

                throw;
            }

            try
            {
                Population = await populated.WaitAsync(timeLimit, cancellationToken).ConfigureAwait(false);
            }
            catch (TimeoutException e)
            {
                throw new DhException(DhErrorReason.PageServer, $"Guest memory was not populated from {Snapshot.MemoryPath} within {timeLimit.TotalSeconds:0} s: {_pageServer.Progress.PlacedBytes >> 20} MiB are in place.", e);
            }
            catch (PageServerException e) when (e.PeerEnded)
            {
                throw await ExplainAsync(e, "while its memory was populated").ConfigureAwait(false);
            }

            Notice ??= Population.Warning;
        }

        await restored.ConfigureAwait(false);
        bool complete = Sandboxes.Isolation.IsCaged(Cage);
        Isolation = Sandboxes.Isolation.Of(Snapshot.Manifest.Accelerator, driver.IsJailed && complete, driver.IsCaged && complete);
        RequireIsolation(Isolation, Cage, options);
        await _vmm.ResumeAsync(cancellationToken).ConfigureAwait(false);
        try
        {
            _guest = await _vmm.ConnectGuestAsync(timeLimit, cancellationToken).ConfigureAwait(false);
            _session = new GuestSession(new SocketTransport(_guest));
            await _session.GreetAsync(timeLimit, cancellationToken).ConfigureAwait(false);
        }
        catch (DhException e) when (e.Reason == DhErrorReason.Guest)
        {
            throw await ExplainAsync(e, "before it answered").ConfigureAwait(false);
        }
    }

    private static bool IsPeerEnded(AggregateException? exception) => exception?.InnerException is PageServerException { PeerEnded: true };

    /// <summary>What the page server has failed with, and killed the VMM for; null when it did not.</summary>
    private async Task<PageServerException?> PageServerFailureAsync()
    {
        if (_pageServer is { Failure: null } && _vmm.Exited.IsCompleted)
        {
            await Task.WhenAny(_pageServer.Completion, Task.Delay(EndTimeLimit)).ConfigureAwait(false);
        }

        return _pageServer?.Failure is { PeerEnded: false } failure ? failure : null;
    }

    /// <summary>When the channel ended because the machine did, says how it ended, with its last words.</summary>
    private async Task<DhException> ExplainAsync(DhException e, string when)
    {
        await Task.WhenAny(_vmm.Exited, Task.Delay(EndTimeLimit)).ConfigureAwait(false);
        if (await PageServerFailureAsync().ConfigureAwait(false) is { } failure)
        {
            return failure;
        }

        string words = _vmm.LastWords();
        string tail = words.Length == 0 ? "" : $" Its last words:\n{words}";
        return _vmm.Exited.IsCompletedSuccessfully
            ? new DhException(DhErrorReason.Vmm, $"The microVM ended {when} ({await _vmm.Exited.ConfigureAwait(false)}).{tail}", e)
            : new DhException(DhErrorReason.Guest, $"{e.Message}{tail}", e);
    }
}
