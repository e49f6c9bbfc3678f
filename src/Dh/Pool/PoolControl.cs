namespace Dh.Pool;

/// <summary>A pool that runs, as others see and steer it.</summary>
/// <param name="SocketPath">Where its daemon listens.</param>
/// <param name="Status">What it did when it was asked.</param>
public sealed record PoolControl(string SocketPath, PoolStatus Status)
{
    private static readonly TimeSpan StopLimit = TimeSpan.FromSeconds(20);

    /// <summary>The pools of a home whose daemons answer. What dead daemons have left is removed.</summary>
    /// <param name="home">The home.</param>
    public static IReadOnlyList<PoolControl> List(DhHome home)
    {
        var pools = new List<PoolControl>();
        foreach (string path in PoolFiles.Sockets(home))
        {
            if (Ask(path, new PoolRequest { Type = PoolRequest.Status })?.Pool is { } status)
            {
                pools.Add(new PoolControl(path, status));
            }
            else
            {
                RemoveDead(path);
            }
        }

        return pools;
    }

    /// <summary>The logs of a home's pools, also of those that have ended.</summary>
    /// <param name="home">The home.</param>
    public static IReadOnlyList<string> Logs(DhHome home) => PoolFiles.Logs(home);

    /// <summary>Ends the daemon, and waits until nothing of it is left. Runs in flight end, too.</summary>
    /// <exception cref="DhException">It did not end in time.</exception>
    public async Task StopAsync()
    {
        using var connection = PoolConnection.TryAsk(SocketPath, new PoolRequest { Type = PoolRequest.Stop });
        if (connection is null)
        {
            return; // it has ended
        }

        // The daemon closes its lock last.
        _ = connection.Receive(PoolConnection.AnswerLimit, CancellationToken.None);
        try
        {
            using var ended = await Linux.FileLock.AcquireAsync(PoolFiles.LockBeside(SocketPath), shared: false, StopLimit, null, CancellationToken.None).ConfigureAwait(false);
        }
        catch (TimeoutException e)
        {
            throw new DhException(DhErrorReason.Host, $"The pool's daemon (process {Status.ProcessId}) did not end within {StopLimit.TotalSeconds:0} s.", e);
        }
    }

    /// <summary>Changes how many sandboxes are ready.</summary>
    /// <param name="size">0 to 10,000.</param>
    /// <exception cref="DhException">Memory does not suffice, the size makes no sense, or the daemon does not answer.</exception>
    public void Scale(int size)
    {
        var answer = Ask(SocketPath, new PoolRequest { Type = PoolRequest.Scale, Size = size })
            ?? throw new DhException(DhErrorReason.Host, $"The pool's daemon (process {Status.ProcessId}) does not answer.");
        if (answer.Type != PoolAnswer.Done)
        {
            throw new DhException(DhErrorReason.Usage, answer.Message ?? "The pool refused it.");
        }
    }

    private static PoolAnswer? Ask(string path, PoolRequest request)
    {
        using var connection = PoolConnection.TryAsk(path, request);
        return connection?.Receive(PoolConnection.AnswerLimit, CancellationToken.None).Answer;
    }

    private static void RemoveDead(string path)
    {
        using var dead = Linux.FileLock.TryAcquire(PoolFiles.LockBeside(path));
        if (dead is not null)
        {
            File.Delete(path);
        }
    }
}
