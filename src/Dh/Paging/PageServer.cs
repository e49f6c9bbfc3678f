using System.Diagnostics;
using System.Net.Sockets;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// Fills a VMM's guest memory through a userfaultfd that the VMM hands over (Firecracker's handshake: regions as JSON, the descriptor by
/// SCM_RIGHTS). It is threads in the process that owns the sandbox:
/// <code>
/// waiting for the handshake -> populating -> serving on demand -> filling --> released
///            |                     |                |                |
///            |                     |                +----------------+--> the VMM ended, or disposed
///            +---------------------+----------------+----------------+--> failed: the VMM must be ended
/// </code>
/// <em>Released</em>: every data page is in place, all regions are unregistered and the userfaultfd is closed; the guest needs no page server
/// from then on. With the policy <see cref="PopulationPolicy.Eager"/> that follows the population at once; with the others only when the rest
/// is filled in the background. Dispose it after the VMM was reaped, unless it has released.
/// </summary>
public sealed class PageServer : IAsyncDisposable
{
    private readonly Socket? _listener;
    private readonly string? _socketPath;
    private readonly int? _peerProcessId;
    private readonly IMemorySource _source;
    private readonly PageServerOptions _options;
    private readonly WakeEvent _stop = new();
    private readonly TaskCompletionSource<PopulationResult> _populated = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource<PageServerEnd> _completion = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _closed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private Thread? _readAhead;
    private SafeSocketHandle? _connection;
    private Socket? _accepted;
    private PidFd? _peer;
    private volatile bool _stopping;
    private volatile bool _handshakeDone;
    private volatile GuestMemory? _memory;
    private volatile FaultLoop? _loop;
    private volatile PageServerException? _failure;
    private long _plannedBytes;
    private int _disposed;

    private PageServer(
        SafeSocketHandle? connection, Socket? accepted, Socket? listener, string? socketPath, IMemorySource source, PageServerOptions options, int? peerProcessId = null)
    {
        _peerProcessId = peerProcessId;
        _connection = connection;
        _accepted = accepted;
        _listener = listener;
        _socketPath = socketPath;
        _source = source;
        _options = options;
        new Thread(Run) { IsBackground = true, Name = "dh page server" }.Start();
    }

    /// <summary>How far the population has come.</summary>
    public PopulationProgress Progress => new(_memory?.CopiedBytes ?? 0, Interlocked.Read(ref _plannedBytes));

    /// <summary>What has been done so far.</summary>
    public PageServerStatistics Statistics => _memory is { } memory
        ? new PageServerStatistics(memory.CopiedBytes, memory.ZeroedBytes, memory.RemovedBytes, _loop?.FaultCount ?? 0)
        : default;

    /// <summary>
    /// Completes when the server has come to its end and closed everything; fails with a <see cref="PageServerException"/> when it could not
    /// go on, in whatever state.
    /// </summary>
    public Task<PageServerEnd> Completion => _completion.Task;

    /// <summary>What it fails with, known before the VMM is killed for it; null when nothing has failed.</summary>
    internal PageServerException? Failure => _failure;

    /// <summary>Serves a VMM through a socket that is connected to it already.</summary>
    /// <param name="connection">Our end; the server owns it from now on.</param>
    /// <param name="source">Contents of guest memory; the server owns it from now on.</param>
    /// <param name="options">How; null for the defaults.</param>
    /// <exception cref="PlatformNotSupportedException">This is not Linux.</exception>
    public static PageServer Start(SafeSocketHandle connection, IMemorySource source, PageServerOptions? options = null)
    {
        ThrowUnlessLinux();
        ArgumentNullException.ThrowIfNull(connection);
        ArgumentNullException.ThrowIfNull(source);
        return new PageServer(connection, null, null, null, source, options ?? new PageServerOptions());
    }

    /// <summary>Serves a VMM that has connected to a listening socket: it must be this user's or root's, and is killed when the server fails.</summary>
    /// <param name="accepted">The accepted socket; the server owns it from now on.</param>
    /// <param name="source">Contents of guest memory; the server owns it from now on.</param>
    /// <param name="options">How; null for the defaults.</param>
    /// <exception cref="PlatformNotSupportedException">This is not Linux.</exception>
    public static PageServer StartAccepted(Socket accepted, IMemorySource source, PageServerOptions? options = null)
    {
        ThrowUnlessLinux();
        ArgumentNullException.ThrowIfNull(accepted);
        ArgumentNullException.ThrowIfNull(source);
        return new PageServer(null, accepted, null, null, source, options ?? new PageServerOptions());
    }

    /// <summary>Listens on a path for one VMM. The socket has mode 0600, and its peer must be this user or root.</summary>
    /// <param name="socketPath">Where; at most 107 bytes; nothing may exist there.</param>
    /// <param name="source">Contents of guest memory; the server owns it from now on, also when this throws.</param>
    /// <param name="options">How; null for the defaults.</param>
    /// <exception cref="PlatformNotSupportedException">This is not Linux.</exception>
    /// <exception cref="PageServerException">The path is too long, taken, or not writable.</exception>
    public static PageServer Listen(string socketPath, IMemorySource source, PageServerOptions? options = null)
    {
        ThrowUnlessLinux();
        ArgumentNullException.ThrowIfNull(socketPath);
        ArgumentNullException.ThrowIfNull(source);
        Socket? listener = null;
        try
        {
            listener = Bind(socketPath);
            return new PageServer(null, null, listener, socketPath, source, options ?? new PageServerOptions());
        }
        catch
        {
            listener?.Dispose();
            source.Dispose();
            throw;
        }
    }

    /// <summary>Waits for one VMM on a socket that listens already. Its peer must be this process, whatever its user; others are turned away.</summary>
    /// <param name="listener">The listening socket; the server owns it from now on.</param>
    /// <param name="peerProcessId">The VMM, which is not reaped as long as this server may wait.</param>
    /// <param name="source">Contents of guest memory; the server owns it from now on.</param>
    /// <param name="options">How.</param>
    internal static PageServer StartListening(Socket listener, int peerProcessId, IMemorySource source, PageServerOptions options)
    {
        ThrowUnlessLinux();
        return new PageServer(null, null, listener, null, source, options, peerProcessId);
    }

    /// <summary>Whether the VMM's regions and its userfaultfd have come.</summary>
    internal bool HandshakeReceived => _handshakeDone;

    /// <summary>Makes the socket that VMMs connect to, with mode 0600.</summary>
    /// <param name="socketPath">Where; at most 107 bytes; nothing may exist there.</param>
    /// <exception cref="PageServerException">The path is too long, taken, or not writable.</exception>
    public static Socket Bind(string socketPath)
    {
        ArgumentNullException.ThrowIfNull(socketPath);
        int length = System.Text.Encoding.UTF8.GetByteCount(socketPath);
        if (length is 0 or > UnixSockets.MaxPathLength)
        {
            throw new PageServerException($"Socket path {socketPath} has {length} bytes; a unix socket takes 1 to {UnixSockets.MaxPathLength}: use a shorter or a relative path.");
        }

        var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            listener.Bind(new UnixDomainSocketEndPoint(socketPath));
            // Nobody can connect before listen(2), so the mode is right before it counts.
            if (!OperatingSystem.IsWindows())
            {
                File.SetUnixFileMode(socketPath, UnixFileMode.UserRead | UnixFileMode.UserWrite);
            }

            listener.Listen();
            return listener;
        }
        catch (Exception e)
        {
            listener.Dispose();
            throw e is SocketException or IOException or UnauthorizedAccessException
                ? new PageServerException($"Listening on {socketPath} failed: {e.Message}. Is another page server there, or a socket that one left behind?", e)
                : e;
        }
    }

    /// <summary>Waits until every page that the policy asks for is in place, and for an eager policy until the regions are released.</summary>
    /// <param name="cancellationToken">Ends the wait, not the population.</param>
    /// <exception cref="PageServerException">The handshake was refused or did not come in time, or a page could not be placed: end the VMM.</exception>
    public Task<PopulationResult> WaitPopulatedAsync(CancellationToken cancellationToken = default) => _populated.Task.WaitAsync(cancellationToken);

    /// <summary>Ends a recording (<see cref="PageServerOptions.Record"/>); from now on faults are served in blocks.</summary>
    /// <param name="until">
    /// Until when it counts, in <see cref="Stopwatch"/> ticks: a guest goes on while its result is on its way to whoever calls this. Default: until now.
    /// </param>
    /// <returns>The pages that were touched, in the order of the first touch.</returns>
    public IReadOnlyList<TouchedPage> StopRecording(long until = long.MaxValue) => _loop?.StopRecording(until) ?? [];

    /// <summary>
    /// Stops the threads, then closes the userfaultfd, the sockets and the source. A VMM that has connected to a listening socket, and still
    /// needs this server, is killed.
    /// </summary>
    public async ValueTask DisposeAsync()
    {
        if (Interlocked.Exchange(ref _disposed, 1) == 0)
        {
            _stopping = true;
            _stop.Set();
        }

        await _closed.Task.ConfigureAwait(false);
        _stop.Dispose();
    }

    private static void ThrowUnlessLinux()
    {
        if (!OperatingSystem.IsLinux())
        {
            throw new PlatformNotSupportedException("The page server needs userfaultfd, which only Linux has.");
        }
    }

    private void Run()
    {
        var end = PageServerEnd.Stopped;
        try
        {
            end = Serve();
        }
#pragma warning disable CA1031 // Whatever ends this thread must reach the owner as its exception, never the runtime as a crash.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _failure = e as PageServerException ?? new PageServerException($"The page server for {_source.Path} failed: {e.Message}", e);
            _failure = EndVmm(_failure);
        }

        if (_failure is null && end == PageServerEnd.Stopped)
        {
            _ = _peer?.SendSignal(PidFd.SigKill); // a page server that goes takes its VMM with it
        }

        Close();
        if (_failure is not { } failure)
        {
            _completion.SetResult(end);
        }
        else
        {
            _completion.SetException(failure);
            _ = _completion.Task.Exception; // observed: the owner may have gone without waiting
        }

        _closed.SetResult();
    }

    private PageServerEnd Serve()
    {
        using var workers = new CopyWorkers(_source, _options.Policy == PopulationPolicy.Lazy ? 1 : _options.Workers, inBackground: false);
        BeginReadAhead();
        var foreseen = new ForeseenLayout(_source, PlacedExtents);
        _connection ??= Accept();
        var (regions, uffd) = HandshakeReceiver.Receive(_connection, _stop, _options.HandshakeTimeLimit);
        long handshakeAt = Stopwatch.GetTimestamp();
        _handshakeDone = true;
        try
        {
            GuestRegion.Validate(regions, _source.Length);
            _memory = new GuestMemory(uffd, regions, _source, foreseen);
        }
        finally
        {
            if (_memory is null)
            {
                uffd.Dispose();
            }
        }

        _loop = new FaultLoop(_memory, _source, _connection, _stop, _options);
        string? warning = Populate(_memory, _loop, workers, foreseen.Fits(regions) ? foreseen.PiecesAt(regions) : PopulationPlan.Of(regions, PlacedExtents));
        if (_options.Policy != PopulationPolicy.Eager)
        {
            _options.Hold?.Invoke(uffd.Handle);
        }
        else if (!_loop.Release())
        {
            throw VmmWentAway();
        }

        long total = regions.Sum(region => (long)region.Size), copied = _memory.CopiedBytes;
        _populated.SetResult(new PopulationResult(
            _options.Policy,
            regions.Count,
            total,
            copied,
            _options.Policy == PopulationPolicy.Eager ? total - copied : _memory.CountZeroBytes(),
            Stopwatch.GetElapsedTime(_startedAt, handshakeAt),
            Stopwatch.GetElapsedTime(handshakeAt))
        {
            Warning = warning,
        });
        _source.EndPopulation();
        return _options.Policy == PopulationPolicy.Eager ? PageServerEnd.Released : ServeOnDemand(_memory, _loop);
    }

    /// <summary>Places what the policy asks for; meanwhile faults are answered and events are read.</summary>
    /// <returns>Why the working set could not be used; null when all is well.</returns>
    private string? Populate(GuestMemory memory, FaultLoop loop, CopyWorkers workers, List<CopyPiece> pieces)
    {
        Interlocked.Exchange(ref _plannedBytes, pieces.Sum(piece => (long)piece.Length));
        workers.Begin(memory, pieces);
        var end = loop.Run(workers, () => workers.CopySome(loop.Reader));
        if (end == FaultLoopEnd.Stopped)
        {
            throw new PageServerException("The page server was stopped before guest memory was populated.");
        }

        if (end == FaultLoopEnd.VmmEnded || workers.VmmGone)
        {
            throw VmmWentAway();
        }

        return workers.Failure is { } failure ? throw failure : memory.Warning;
    }

    private PageServerEnd ServeOnDemand(GuestMemory memory, FaultLoop loop)
    {
        // Holes are settled now and not before: that takes the locks of the VMM's memory, for which the copies would have to wait.
        if (_options.Fill)
        {
            var pieces = PopulationPlan.Of(memory.Regions, _source.DataExtents, PopulationPlan.BackgroundPieceLength);
            using var filler = new CopyWorkers(_source, 1, inBackground: true);
            filler.Begin(memory, pieces);
            var end = loop.Run(filler, memory.SettleHoles);
            if (end == FaultLoopEnd.WorkersDone && !filler.VmmGone)
            {
                return filler.Failure is { } failure ? throw failure
                    : loop.Release() ? PageServerEnd.Released
                    : PageServerEnd.VmmEnded;
            }

            return end == FaultLoopEnd.Stopped ? PageServerEnd.Stopped : PageServerEnd.VmmEnded;
        }

        return loop.Run(null, memory.SettleHoles) == FaultLoopEnd.Stopped ? PageServerEnd.Stopped : PageServerEnd.VmmEnded;
    }

    private static PageServerException VmmWentAway() => new("The VMM went away while its memory was populated.") { PeerEnded = true };

    /// <summary>Tells the owner, and ends the VMM: its faults will not be answered any more.</summary>
    /// <returns>The failure, with what failed on top of it.</returns>
    private PageServerException EndVmm(PageServerException failure)
    {
        try
        {
            if (_handshakeDone)
            {
                _ = _peer?.SendSignal(PidFd.SigKill);
            }

            _populated.TrySetException(failure);
            _ = _populated.Task.Exception; // observed: the owner may have gone without waiting
            _options.Failed?.Invoke(failure);
            return failure;
        }
#pragma warning disable CA1031 // A callback that throws must not end the process; its exception goes to the owner with the first one.
        catch (Exception e)
#pragma warning restore CA1031
        {
            return new PageServerException($"{failure.Message} Then the VMM could not be ended: {e.Message}", new AggregateException(failure, e));
        }
    }

    private SafeSocketHandle Accept()
    {
        long deadline = Environment.TickCount64 + (long)_options.HandshakeTimeLimit.TotalMilliseconds;
        while (true)
        {
            _accepted ??= AcceptOne(TimeSpan.FromMilliseconds(Math.Max(0, deadline - Environment.TickCount64)));
            var peer = UnixSockets.GetPeerCredentials(_accepted.SafeHandle);
            if (_peerProcessId is null && peer.Uid != 0 && peer.Uid != UnixSockets.CurrentUserId)
            {
                throw new PageServerException($"A peer is refused: process {peer.Pid} belongs to user {peer.Uid}, not to {UnixSockets.CurrentUserId}.");
            }

            if (_peerProcessId is null || peer.Pid == _peerProcessId)
            {
                _peer = UnixSockets.OpenPeer(_accepted.SafeHandle);
                return _accepted.SafeHandle;
            }

            _accepted.Dispose();
            _accepted = null;
        }
    }

    private Socket AcceptOne(TimeSpan timeLimit)
    {
        int ready = Poll.WaitAny(timeLimit, _listener!.SafeHandle, _stop.Handle);
        if ((ready & 1) == 0)
        {
            throw new PageServerException(ready == 0
                ? $"No VMM connected{(_socketPath is null ? "" : $" to {_socketPath}")} within {_options.HandshakeTimeLimit.TotalSeconds:0.#} s."
                : "The page server was stopped before a VMM connected.");
        }

        return _listener.Accept();
    }

    /// <summary>
    /// While the VMM starts, a core is idle: brings near what the policy asks for, so that the copies find it mapped. Begun after the other
    /// threads: a thread that starts, and one that maps, want the same lock.
    /// </summary>
    private void BeginReadAhead()
    {
        if (_options.Policy == PopulationPolicy.Lazy || (_connection is { } connection && Poll.Wait(connection, TimeSpan.Zero)))
        {
            return;
        }

        _readAhead = new Thread(() => _source.ReadAhead(() => _handshakeDone || _stopping)) { IsBackground = true, Name = "dh page read-ahead" };
        _readAhead.Start();
    }

    /// <summary>What the policy places before the machine resumes.</summary>
    private IReadOnlyList<FileExtent> PlacedExtents => _options.Policy switch
    {
        PopulationPolicy.Eager => _source.DataExtents,
        PopulationPolicy.Prefetch => _source.PrefetchExtents,
        _ => [],
    };

    private void Close()
    {
        _stopping = true;
        _readAhead?.Join();
        _loop?.Dispose();
        _memory?.Dispose();
        _connection?.Dispose();
        _accepted?.Dispose();
        _peer?.Dispose();
        _listener?.Dispose();
        DeleteSocket();
        _source.Dispose();
    }

    private void DeleteSocket()
    {
        try
        {
            if (_socketPath is not null)
            {
                File.Delete(_socketPath);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Its directory went first: there is nothing left to delete.
        }
    }
}
