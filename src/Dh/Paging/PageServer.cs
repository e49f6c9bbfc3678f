using System.Diagnostics;
using System.Net.Sockets;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// Fills a VMM's guest memory through a userfaultfd that the VMM hands over (Firecracker's handshake: regions as JSON, the descriptor by
/// SCM_RIGHTS). It is threads in the process that owns the sandbox:
/// <code>
/// waiting for the handshake -> populating -> released
///            |                     |
///            +---------------------+--> failed (Failed is called: the VMM must be ended)
/// </code>
/// With the policy <see cref="PopulationPolicy.Eager"/> it copies every data page and then <em>releases</em>: all regions are unregistered
/// and the userfaultfd is closed; the guest needs no page server from then on.
/// Dispose it after the VMM was reaped, unless <see cref="WaitPopulatedAsync"/> has succeeded with an eager policy.
/// </summary>
public sealed class PageServer : IAsyncDisposable
{
    private readonly Socket? _listener;
    private readonly string? _socketPath;
    private readonly IMemorySource _source;
    private readonly PageServerOptions _options;
    private readonly WakeEvent _stop = new();
    private readonly TaskCompletionSource<PopulationResult> _populated = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _ended = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private readonly Thread _readAhead;
    private SafeSocketHandle? _connection;
    private Socket? _accepted;
    private volatile bool _stopping;
    private volatile bool _handshakeDone;
    private volatile GuestMemory? _memory;
    private long _plannedBytes;
    private int _disposed;

    private PageServer(SafeSocketHandle? connection, Socket? listener, string? socketPath, IMemorySource source, PageServerOptions options)
    {
        _connection = connection;
        _listener = listener;
        _socketPath = socketPath;
        _source = source;
        _options = options;
        _readAhead = new Thread(ReadAhead) { IsBackground = true, Name = "dh page read-ahead" };
        _readAhead.Start();
        new Thread(Run) { IsBackground = true, Name = "dh page server" }.Start();
    }

    /// <summary>How far the population has come.</summary>
    public PopulationProgress Progress => new(_memory?.CopiedBytes ?? 0, Interlocked.Read(ref _plannedBytes));

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
        return new PageServer(connection, null, null, source, options ?? new PageServerOptions());
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
            int length = System.Text.Encoding.UTF8.GetByteCount(socketPath);
            if (length is 0 or > UnixSockets.MaxPathLength)
            {
                throw new PageServerException($"Socket path {socketPath} has {length} bytes; a unix socket takes 1 to {UnixSockets.MaxPathLength}: use a shorter or a relative path.");
            }

            listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            listener.Bind(new UnixDomainSocketEndPoint(socketPath));
            // Nobody can connect before listen(2), so the mode is right before it counts.
            if (!OperatingSystem.IsWindows())
            {
                File.SetUnixFileMode(socketPath, UnixFileMode.UserRead | UnixFileMode.UserWrite);
            }

            listener.Listen(1);
            return new PageServer(null, listener, socketPath, source, options ?? new PageServerOptions());
        }
        catch (Exception e)
        {
            listener?.Dispose();
            source.Dispose();
            throw e is SocketException or IOException or UnauthorizedAccessException
                ? new PageServerException($"Listening on {socketPath} failed: {e.Message}. Is another page server there, or a socket that one left behind?", e)
                : e;
        }
    }

    /// <summary>Waits until every page that the policy asks for is in place, and for an eager policy until the regions are released.</summary>
    /// <param name="cancellationToken">Ends the wait, not the population.</param>
    /// <exception cref="PageServerException">The handshake was refused or did not come in time, or a page could not be placed: end the VMM.</exception>
    public Task<PopulationResult> WaitPopulatedAsync(CancellationToken cancellationToken = default) => _populated.Task.WaitAsync(cancellationToken);

    /// <summary>Stops the threads, then closes the userfaultfd, the sockets and the source.</summary>
    public async ValueTask DisposeAsync()
    {
        if (Interlocked.Exchange(ref _disposed, 1) == 0)
        {
            _stopping = true;
            _stop.Set();
        }

        await _ended.Task.ConfigureAwait(false);
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
        try
        {
            _connection ??= Accept();
            var (regions, uffd) = HandshakeReceiver.Receive(_connection, _stop, _options.HandshakeTimeLimit);
            _handshakeDone = true;
            long handshakeAt = Stopwatch.GetTimestamp();
            var memory = _memory = new GuestMemory(uffd, regions, _source);
            GuestRegion.Validate(regions, _source.Length);
            Populate(memory);
            long total = regions.Sum(region => (long)region.Size);
            _populated.SetResult(new PopulationResult(
                _options.Policy,
                regions.Count,
                total,
                memory.CopiedBytes,
                total - memory.CopiedBytes,
                Stopwatch.GetElapsedTime(_startedAt, handshakeAt),
                Stopwatch.GetElapsedTime(handshakeAt)));
        }
#pragma warning disable CA1031 // Whatever ends this thread must reach the owner as its exception, never the runtime as a crash.
        catch (Exception e)
#pragma warning restore CA1031
        {
            var failure = e as PageServerException ?? new PageServerException($"The page server for {_source.Path} failed: {e.Message}", e);
            _populated.TrySetException(failure);
            _ = _populated.Task.Exception; // observed: the owner may have gone without waiting
            _options.Failed?.Invoke(failure);
        }
        finally
        {
            Close();
        }
    }

    private void Populate(GuestMemory memory)
    {
        var pieces = PopulationPlan.Of(memory.Regions, _source.DataExtents);
        Interlocked.Exchange(ref _plannedBytes, pieces.Sum(piece => (long)piece.Length));
        int next = -1;
        bool gone = false;
        PageServerException? failure = null;
        var threads = new Thread[Math.Max(0, Math.Min(_options.Workers, pieces.Count) - 1)];
        for (int i = 0; i < threads.Length; i++)
        {
            threads[i] = new Thread(CopyPieces) { IsBackground = true, Name = "dh page worker" };
            threads[i].Start();
        }

        CopyPieces();
        Array.ForEach(threads, thread => thread.Join());
        if (failure is not null)
        {
            throw failure;
        }

        if (_stopping)
        {
            throw new PageServerException("The page server was stopped before guest memory was populated.");
        }

        if (gone || !memory.Release())
        {
            throw new PageServerException("The VMM went away while its memory was populated.") { PeerEnded = true };
        }

        void CopyPieces()
        {
            try
            {
                for (int index; !Volatile.Read(ref gone) && !_stopping && (index = Interlocked.Increment(ref next)) < pieces.Count;)
                {
                    if (!memory.Copy(pieces[index]))
                    {
                        Volatile.Write(ref gone, true);
                    }
                }
            }
            catch (PageServerException e)
            {
                Interlocked.CompareExchange(ref failure, e, null);
                Volatile.Write(ref gone, true);
            }
        }
    }

    private SafeSocketHandle Accept()
    {
        int ready = Poll.WaitAny(_options.HandshakeTimeLimit, _listener!.SafeHandle, _stop.Handle);
        if ((ready & 1) == 0)
        {
            throw new PageServerException(ready == 0
                ? $"No VMM connected to {_socketPath} within {_options.HandshakeTimeLimit.TotalSeconds:0.#} s."
                : "The page server was stopped before a VMM connected.");
        }

        _accepted = _listener.Accept();
        var peer = UnixSockets.GetPeerCredentials(_accepted.SafeHandle);
        if (peer.Uid != 0 && peer.Uid != UnixSockets.CurrentUserId)
        {
            throw new PageServerException($"The peer on {_socketPath} is refused: process {peer.Pid} belongs to user {peer.Uid}, not to {UnixSockets.CurrentUserId}.");
        }

        return _accepted.SafeHandle;
    }

    /// <summary>While the VMM starts, a core is idle: bring the file's pages near, so that the copies find them mapped.</summary>
    private void ReadAhead() => _source.ReadAhead(() => _handshakeDone || _stopping);

    private void Close()
    {
        _stopping = true;
        _readAhead.Join();
        _memory?.Dispose();
        _connection?.Dispose();
        _accepted?.Dispose();
        _listener?.Dispose();
        DeleteSocket();
        _source.Dispose();
        _ended.SetResult();
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
