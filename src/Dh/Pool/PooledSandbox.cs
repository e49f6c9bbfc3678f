using System.Diagnostics;
using Dh.Guest;
using Dh.Sandboxes;
using Dh.Snapshots;
using Microsoft.Win32.SafeHandles;

namespace Dh.Pool;

/// <summary>
/// A sandbox that a pool has handed out: this process speaks to its guest directly, the daemon owns the machine. It ends when this is
/// disposed, when this process ends in whatever way (the daemon sees the end of the connection), and when the daemon does (the launcher
/// sees that).
/// </summary>
public sealed class PooledSandbox : ISandbox
{
    // How long a client stays in the queue before it restores on its own.
    private static readonly TimeSpan QueueLimit = TimeSpan.FromSeconds(60);

    // How long the daemon takes at most to say how a machine has ended.
    private static readonly TimeSpan EndLimit = TimeSpan.FromSeconds(1);

    private readonly PoolConnection _connection;
    private readonly SafeFileHandle _guest;
    private readonly GuestSession _session;

    private PooledSandbox(PoolConnection connection, SafeFileHandle guest, long lastRequest)
    {
        _connection = connection;
        _guest = guest;
        _session = GuestSession.Resume(new DescriptorTransport(guest), lastRequest);
    }

    /// <inheritdoc/>
    public MemoryPolicy MemoryPolicy { get; private init; }

    /// <inheritdoc/>
    public string? Notice { get; private init; }

    /// <inheritdoc/>
    public IsolationClass Isolation { get; private init; }

    /// <summary>From the call of <see cref="TryTake"/> until the sandbox was here.</summary>
    public TimeSpan RestoreTime { get; private init; }

    /// <summary>
    /// Whether <see cref="ExecuteAsync"/> waits for the guest on its caller's thread, instead of one of its own: for a program that has nothing else
    /// to do. Default: no.
    /// </summary>
    public bool WaitsOnCallingThread { get; set; }

    /// <summary>Takes a sandbox out of the pool that keeps such, and waits for one where none is ready.</summary>
    /// <param name="snapshot">Of what.</param>
    /// <param name="options">How it must have been restored; null for the defaults.</param>
    /// <param name="say">Is told why there is none, in one line, when there is a pool.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The sandbox, in which nobody's code has run; null when there is no such pool, or none to be had from it: nothing has happened then.</returns>
    public static PooledSandbox? TryTake(Snapshot snapshot, SandboxOptions? options = null, Action<string>? say = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(snapshot);
        options ??= new SandboxOptions();
        long start = Stopwatch.GetTimestamp();
        string? isolation = options.RequireIsolation is { } required ? Sandboxes.Isolation.Name(required) : null;
        var request = new PoolRequest { Type = PoolRequest.Take, Snapshot = snapshot.Manifest.Id, RequireIsolation = isolation };
        var connection = PoolConnection.TryAsk(PoolFiles.SocketOf(PoolKind.Of(snapshot, options)), request);
        if (connection is null)
        {
            return null;
        }

        PooledSandbox? taken = null;
        try
        {
            var (answer, channel) = connection.Receive(PoolConnection.AnswerLimit, cancellationToken);
            while (answer is { Type: PoolAnswer.Queued } && Stopwatch.GetElapsedTime(start) < QueueLimit)
            {
                (answer, channel) = connection.Receive(PoolConnection.AnswerLimit, cancellationToken);
            }

            if (answer is { Type: PoolAnswer.Sandbox } && channel is not null
                && Enum.TryParse<MemoryPolicy>(answer.MemoryPolicy, out var policy) && Sandboxes.Isolation.TryParse(answer.Isolation ?? "", out var granted))
            {
                taken = new PooledSandbox(connection, channel, answer.LastRequest)
                {
                    MemoryPolicy = policy,
                    Isolation = granted,
                    Notice = answer.Notice,
                    RestoreTime = Stopwatch.GetElapsedTime(start),
                };
                return taken;
            }

            channel?.Dispose();
            say?.Invoke(answer switch
            {
                { Type: PoolAnswer.Refused } => $"The pool has no sandbox for this run: {answer.Message}",
                { Type: PoolAnswer.Queued } or null => "The pool did not hand out a sandbox in time.",
                _ => "The pool's answer makes no sense.",
            });
            return null;
        }
        finally
        {
            if (taken is null)
            {
                connection.Dispose();
            }
        }
    }

    /// <inheritdoc/>
    public Task<ExecutionResult> ExecuteAsync(ExecutionRequest request, IOutputSink output, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(request);
        ArgumentNullException.ThrowIfNull(output);
        return WaitsOnCallingThread
            ? RunAsync(request, output, cancellationToken)
            : Task.Factory.StartNew(() => RunAsync(request, output, cancellationToken), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default).Unwrap();
    }

    /// <inheritdoc/>
    public ValueTask DisposeAsync()
    {
        _session.Dispose();
        _guest.Dispose();
        _connection.Dispose();
        return ValueTask.CompletedTask;
    }

    private async Task<ExecutionResult> RunAsync(ExecutionRequest request, IOutputSink output, CancellationToken cancellationToken)
    {
        try
        {
            return await _session.ExecuteAsync(request, output, cancellationToken).ConfigureAwait(false);
        }
        catch (DhException e) when (e.Reason == DhErrorReason.Guest)
        {
            var (answer, _) = _connection.Receive(EndLimit, CancellationToken.None);
            throw answer switch
            {
                { Type: PoolAnswer.Ended } => new DhException(
                    DhErrorReason.Vmm, $"The microVM ended while code ran ({answer.Message}).{(answer.LastWords is { Length: > 0 } words ? $" Its last words:\n{words}" : "")}", e),
                _ => new DhException(DhErrorReason.Guest, $"{e.Message} Its pool's daemon has ended, or does not say why (dh vm pool logs).", e),
            };
        }
    }
}
