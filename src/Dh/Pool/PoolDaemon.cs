using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using Dh.Linux;
using Dh.Sandboxes;
using Dh.Snapshots;
using Microsoft.Win32.SafeHandles;

namespace Dh.Pool;

/// <summary>
/// The process that keeps a pool: listens on its socket, hands sandboxes out, ends what it has handed out when the client's connection ends.
/// One for each kind; a lock on a file, which ends with the process, keeps a second one away.
/// </summary>
public sealed class PoolDaemon : IAsyncDisposable
{
    private const int Backlog = 512;
    private const int MaxConnections = 1024;
    private const int MaxLeaveWaits = 10;
    private static readonly TimeSpan RequestLimit = TimeSpan.FromSeconds(5);
    private static readonly TimeSpan MaintenanceInterval = TimeSpan.FromSeconds(2);
    private static readonly TimeSpan EndLimit = TimeSpan.FromSeconds(10);
    private static readonly TimeSpan QueuedInterval = PoolConnection.AnswerLimit / 4;
    private static readonly TimeSpan LongRun = TimeSpan.FromSeconds(1);
    private static readonly TimeSpan LeaveInterval = TimeSpan.FromMilliseconds(1);

    private readonly PoolOptions _options;
    private readonly SnapshotStore _store;
    private readonly string _socketPath;
    private readonly FileLock _lock;
    private readonly Socket _listener;
    private readonly SandboxMachines _machines;
    private readonly SandboxPool _pool;
    private readonly PoolLog _log;
    private readonly CancellationTokenSource _stop = new();
    private readonly HashSet<Task> _connections = [];
    private readonly long _startedAt = Stopwatch.GetTimestamp();

    private PoolDaemon(PoolOptions options, SnapshotStore store, string socketPath, FileLock mutex, Socket listener, SandboxMachines machines, PoolLog log)
    {
        _options = options;
        _store = store;
        _socketPath = socketPath;
        _lock = mutex;
        _listener = listener;
        _machines = machines;
        _log = log;
        _pool = new SandboxPool(machines, () => HostMemory.AvailableBytes, new PoolLimits(Environment.ProcessorCount, options.Sandbox.RestoreTimeLimit), log);
    }

    /// <summary>Takes the pool's lock and listens; <see cref="RunAsync"/> keeps the sandboxes.</summary>
    /// <param name="options">What is kept.</param>
    /// <param name="say">Takes a line for each event, besides the log file; called by one thread at a time.</param>
    /// <exception cref="DhException">There is no such snapshot; another daemon keeps this pool; memory does not suffice; the socket cannot be made.</exception>
    public static PoolDaemon Start(PoolOptions options, Action<string> say)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(say);
        var store = new SnapshotStore(options.Sandbox.Home);
        var machines = new SandboxMachines(options.Sandbox) { Snapshot = store.Open(options.Template, options.Version) };
        Require(options.Size, 0, machines);
        var kind = PoolKind.Of(machines.Snapshot, options.Sandbox);
        _ = DhHome.EnsurePrivate(PoolFiles.DirectoryOf(kind.Home));
        string path = PoolFiles.SocketOf(kind);
        var mutex = FileLock.TryAcquire(PoolFiles.LockOf(kind)) ?? throw new DhException(
            DhErrorReason.Usage, $"There is a pool of {options.Template} {options.Version} already. See `dh vm pool status`; change it with `dh vm pool scale N`.");
        Socket? listener = null;
        try
        {
            var log = new PoolLog(new PoolLogFile(PoolFiles.LogOf(kind), say).Write);
            listener = Listen(path);
            return new PoolDaemon(options, store, path, mutex, listener, machines, log);
        }
        catch
        {
            listener?.Dispose();
            mutex.Dispose();
            throw;
        }
    }

    /// <summary>Keeps the pool until it is told to end: by the token, by a client's request, or because nobody has used it for long.</summary>
    /// <param name="full">Is called once, when as many sandboxes are ready as were asked for.</param>
    /// <param name="cancellationToken">Ends it. Runs in flight end, too.</param>
    /// <exception cref="DhException">The first sandboxes could not be restored, or the metrics' address is taken.</exception>
    public async Task RunAsync(Action full, CancellationToken cancellationToken)
    {
        ArgumentNullException.ThrowIfNull(full);
        await using var outer = cancellationToken.Register(() => Stop("signal"));
        _log.Write(PoolEvent.Started, string.Create(
            CultureInfo.InvariantCulture, $"pid={Environment.ProcessId} {_options.Template} {_options.Version} snapshot={_machines.Snapshot!.Manifest.Id} size={_options.Size} socket={_socketPath}"));
        using var metrics = _options.Metrics is { } address ? PoolMetrics.Serve(address, Status) : null;
        var accepting = AcceptAsync();
        var maintaining = MaintainAsync();
        try
        {
            _pool.Resize(_options.Size);
            if (_options.Size > 0)
            {
                await _pool.Filled.Task.WaitAsync(_stop.Token).ConfigureAwait(false);
            }

            full();
            // Both end when it is told to end; one that ends before has failed, and without it this is no pool.
            await Task.WhenAny(accepting, maintaining).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (_stop.IsCancellationRequested)
        {
            // Told to end before it was full.
        }
        finally
        {
            await _stop.CancelAsync().ConfigureAwait(false);
            await Task.WhenAll(accepting, maintaining).ConfigureAwait(false);
        }
    }

    /// <summary>Ends all sandboxes, removes the socket, gives the lock back.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        _listener.Dispose();
        File.Delete(_socketPath); // whoever looks from now on restores on its own
        await _pool.DisposeAsync().ConfigureAwait(false);
        Task[] connections;
        lock (_connections)
        {
            connections = [.. _connections];
        }

        await Task.WhenAny(Task.WhenAll(connections), Task.Delay(EndLimit)).ConfigureAwait(false);
        _log.Write(PoolEvent.Stopped, $"pid={Environment.ProcessId}");
        _lock.Dispose();
        _stop.Dispose();
    }

    private static Socket Listen(string path)
    {
        File.Delete(path); // the lock is ours: who made it is dead
        var listener = new Socket(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified);
        try
        {
            PoolFiles.WithShortPath(path, shortPath => listener.Bind(new UnixDomainSocketEndPoint(shortPath)));
            listener.Listen(Backlog);
            return listener;
        }
        catch (SocketException e)
        {
            listener.Dispose();
            throw new DhException(DhErrorReason.Host, $"Listening on {path} failed: {e.Message}.", e);
        }
    }

    /// <summary>Counts the memory before anything is begun.</summary>
    private static void Require(int size, int live, SandboxMachines machines)
    {
        long each = machines.BytesPerMachine, available = HostMemory.AvailableBytes + (live * each);
        if (size * each > available)
        {
            throw new DhException(DhErrorReason.Host, string.Create(
                CultureInfo.InvariantCulture, $"{size} sandboxes of {each >> 20} MiB take {size * each >> 20} MiB, and {available >> 20} MiB are to be had: at most {available / each} fit."));
        }
    }

    private void Stop(string why)
    {
        if (!_stop.IsCancellationRequested)
        {
            _log.Write(PoolEvent.Stopping, why);
            _ = _stop.CancelAsync();
        }
    }

    private async Task AcceptAsync()
    {
        try
        {
            while (true)
            {
                var client = await _listener.AcceptAsync(_stop.Token).ConfigureAwait(false);
                long accepted = Stopwatch.GetTimestamp();
                lock (_connections)
                {
                    if (_connections.Count >= MaxConnections)
                    {
                        _log.Write(PoolEvent.TurnedAway, $"more than {MaxConnections} connections");
                        client.Dispose();
                        continue;
                    }

                    var serving = Task.Run(() => ServeAsync(client, accepted));
                    _connections.Add(serving);
                    _ = serving.ContinueWith(Forget, CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
                }
            }
        }
        catch (OperationCanceledException)
        {
            // Told to end.
        }
    }

    private void Forget(Task connection)
    {
        lock (_connections)
        {
            _connections.Remove(connection);
        }
    }

    /// <summary>Looks at what nobody tells: a new snapshot, memory that was freed, time that has passed.</summary>
    private async Task MaintainAsync()
    {
        using var timer = new PeriodicTimer(MaintenanceInterval);
        try
        {
            while (await timer.WaitForNextTickAsync(_stop.Token).ConfigureAwait(false))
            {
                FollowSnapshot();
                _pool.Adapt(HostMemory.IsPressed);
                if (_options.IdleTimeout is { } limit && _pool.InUse == 0 && Stopwatch.GetElapsedTime(_pool.UsedAt) > limit)
                {
                    Stop("idle");
                }
            }
        }
        catch (OperationCanceledException)
        {
            // Told to end.
        }
    }

    private void FollowSnapshot()
    {
        Snapshot? current = null;
        try
        {
            current = _store.Open(_options.Template, _options.Version);
        }
        catch (DhException)
        {
            // It is gone, or damaged: nothing is handed out that nobody could restore.
        }

        if (current?.Manifest.Id != _machines.Snapshot?.Manifest.Id)
        {
            _log.Write(PoolEvent.SnapshotChanged, current is null ? "it is gone" : $"snapshot={current.Manifest.Id}");
            _machines.Snapshot = current;
            _pool.Renew();
        }
    }

    private async Task ServeAsync(Socket client, long accepted)
    {
        using var owned = client;
        try
        {
            var peer = UnixSockets.GetPeerCredentials(client.SafeHandle);
            if (peer.Uid != UnixSockets.CurrentUserId)
            {
                _log.Write(PoolEvent.TurnedAway, $"pid={peer.Pid} is of user {peer.Uid}");
                return;
            }

            byte[] packet = new byte[PoolJson.MaxPacket];
            int length = await ReceiveRequestAsync(client, packet).ConfigureAwait(false);
            var request = length > 0 ? PoolRequest.TryParse(packet.AsMemory(0, length)) : null;
            switch (request?.Type)
            {
                case PoolRequest.Take:
                    await ServeTakeAsync(client, accepted, request).ConfigureAwait(false);
                    break;
                case PoolRequest.Status:
                    Send(client, new PoolAnswer { Type = PoolAnswer.Status, Pool = Status() });
                    break;
                case PoolRequest.Scale:
                    Send(client, Scale(request.Size));
                    break;
                case PoolRequest.Stop:
                    Send(client, new PoolAnswer { Type = PoolAnswer.Done });
                    Stop($"asked for by pid={peer.Pid}");
                    break;
                default:
                    _log.Write(PoolEvent.TurnedAway, $"pid={peer.Pid} {(length > 0 ? "says what makes no sense" : "says nothing")}");
                    break;
            }
        }
        catch (Exception e) when (e is SocketException or LinuxException)
        {
            // The client is gone.
        }
#pragma warning disable CA1031 // A mistake while one client is served must not end the daemon, and is told.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _log.Write(PoolEvent.TurnedAway, Untrusted.OneLine(e.ToString(), 1000));
        }
    }

    private async Task<int> ReceiveRequestAsync(Socket client, byte[] packet)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(_stop.Token);
        limit.CancelAfter(RequestLimit);
        try
        {
            return await client.ReceiveAsync(packet, SocketFlags.None, limit.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            return 0;
        }
    }

    private async Task ServeTakeAsync(Socket client, long accepted, PoolRequest request)
    {
        // A client says nothing more: what is received is its end.
        using var leave = CancellationTokenSource.CreateLinkedTokenSource(_stop.Token);
        var clientGone = WaitGoneAsync(client);
        PoolSlot slot;
        try
        {
            if (request.Snapshot != _machines.Snapshot?.Manifest.Id)
            {
                FollowSnapshot();
            }

            if (request.Snapshot != _machines.Snapshot?.Manifest.Id)
            {
                throw new DhException(DhErrorReason.Snapshot, "it keeps sandboxes of another snapshot.");
            }

            var taking = _pool.TakeAsync(leave.Token);
            while (!taking.IsCompleted)
            {
                // Again and again: a client does not stay in the queue of a daemon that is silent.
                Send(client, new PoolAnswer { Type = PoolAnswer.Queued });
                if (await Task.WhenAny(taking, clientGone, Task.Delay(QueuedInterval)).ConfigureAwait(false) == clientGone)
                {
                    await leave.CancelAsync().ConfigureAwait(false);
                    break;
                }
            }

            slot = await taking.ConfigureAwait(false);
        }
        catch (DhException e)
        {
            _log.Write(PoolEvent.Refused, Untrusted.OneLine(e.Message, 1000));
            Send(client, new PoolAnswer { Type = PoolAnswer.Refused, Message = Untrusted.OneLine(e.Message, 1000) });
            return;
        }
        catch (OperationCanceledException)
        {
            return; // the client did not wait, or the daemon ends
        }

        try
        {
            await HandOutAsync(client, clientGone, accepted, request, slot).ConfigureAwait(false);
        }
        finally
        {
            slot.Release();
        }
    }

    private async Task HandOutAsync(Socket client, Task clientGone, long accepted, PoolRequest request, PoolSlot slot)
    {
        var machine = (SandboxMachines.SandboxMachine)slot.Machine!;
        var sandbox = machine.Sandbox;
        string? refusal = machine.Ended.IsCompleted ? "the machine has just ended."
            : request.Snapshot != sandbox.Snapshot.Manifest.Id ? "it keeps sandboxes of another snapshot."
            : request.RequireIsolation is { } required && !(Isolation.TryParse(required, out var least) && sandbox.Isolation >= least) ? $"it has isolation `{Isolation.Name(sandbox.Isolation)}`."
            : null;
        if (refusal is not null)
        {
            _log.Write(PoolEvent.Refused, refusal);
            Send(client, new PoolAnswer { Type = PoolAnswer.Refused, Message = refusal });
            return;
        }

        using var process = UnixSockets.OpenPeer(client.SafeHandle); // before the client has anything: what fails now costs it nothing
        var (channel, lastRequest) = machine.HandOver();
        var answer = new PoolAnswer
        {
            Type = PoolAnswer.Sandbox,
            LastRequest = lastRequest,
            MemoryPolicy = sandbox.MemoryPolicy.ToString(),
            Isolation = Isolation.Name(sandbox.Isolation),
            Notice = sandbox.Notice,
        };
        using (var descriptor = new SafeFileHandle(channel.Handle, ownsHandle: false))
        {
            FdPassing.Send(client.SafeHandle, answer.ToPacket().Span, descriptor);
        }

        _pool.Waited(Stopwatch.GetElapsedTime(accepted));
        machine.Prefer();
        _log.Write(PoolEvent.HandedOut, $"sandbox={slot.Number} vmm={sandbox.VmmProcessId}");
        var ended = Task.WhenAny(clientGone, sandbox.VmmExited);
        if (await Task.WhenAny(ended, Task.Delay(LongRun)).ConfigureAwait(false) != ended)
        {
            machine.Defer();
            _pool.LastsLong(slot);
        }

        if (await ended.ConfigureAwait(false) != clientGone)
        {
            var exit = await sandbox.VmmExited.ConfigureAwait(false);
            string how = _stop.IsCancellationRequested ? "the pool was stopped" : exit.ToString();
            Send(client, new PoolAnswer { Type = PoolAnswer.Ended, Message = how, LastWords = Tail(sandbox.LastWords) });
        }
        else
        {
            // Most clients end with their run, and somebody waits for that: before a machine is ended, and another begun, which takes the processors.
            for (int i = 0; i < MaxLeaveWaits && !process.WaitForExit(TimeSpan.Zero); i++)
            {
                await Task.Delay(LeaveInterval).ConfigureAwait(false);
            }
        }
    }

    private PoolAnswer Scale(int? size)
    {
        try
        {
            if (size is not (>= 0 and <= PoolOptions.MaxSize))
            {
                throw new DhException(DhErrorReason.Usage, $"A pool has a size of 0 to {PoolOptions.MaxSize}.");
            }

            var counts = _pool.Counts();
            Require(size.Value, counts.Ready + counts.Starting, _machines);
            _pool.Resize(size.Value);
            _log.Write(PoolEvent.Resized, $"size={size}");
            return new PoolAnswer { Type = PoolAnswer.Done };
        }
        catch (DhException e)
        {
            return new PoolAnswer { Type = PoolAnswer.Refused, Message = e.Message };
        }
    }

    private PoolStatus Status()
    {
        var counts = _pool.Counts();
        double[] waits = counts.WaitsMs;
        Array.Sort(waits);
        double? At(double part) => waits.Length == 0 ? null : Math.Round(waits[(int)Math.Min(waits.Length - 1, waits.Length * part)], 3);
        return new PoolStatus
        {
            ProcessId = Environment.ProcessId,
            Template = _options.Template,
            Version = _options.Version,
            Snapshot = _machines.Snapshot?.Manifest.Id ?? "",
            Size = counts.Size,
            Ready = counts.Ready,
            Starting = counts.Starting,
            Running = counts.Running,
            Waiting = counts.Waiting,
            Restored = counts.Restored,
            HandedOut = counts.HandedOut,
            Failed = counts.Failed,
            WaitP50Ms = At(0.5),
            WaitP99Ms = At(0.99),
            MemoryBytes = SandboxMachines.ResidentBytes(Environment.ProcessId) + _pool.Machines().OfType<SandboxMachines.SandboxMachine>().Sum(machine => SandboxMachines.ResidentBytes(machine.Sandbox.VmmProcessId)),
            UptimeSeconds = Math.Round(Stopwatch.GetElapsedTime(_startedAt).TotalSeconds, 1),
        };
    }

    private static async Task WaitGoneAsync(Socket client)
    {
        try
        {
            _ = await client.ReceiveAsync(new byte[1], SocketFlags.None).ConfigureAwait(false);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // That is its end, too.
        }
    }

    private static void Send(Socket client, PoolAnswer answer) =>
        FdPassing.Send(client.SafeHandle, answer.ToPacket().Span);

    // A packet has a limit, and JSON may need six bytes for one of these.
    private static string Tail(string words) => words.Length <= 4000 ? words : words[^4000..];
}
