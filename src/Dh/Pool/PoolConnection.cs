using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Pool;

/// <summary>A client's connection to a pool's daemon, which must be this user's own.</summary>
internal sealed class PoolConnection : IDisposable
{
    /// <summary>How long a daemon may take to accept and to answer; one that takes longer is stopped, or is no daemon.</summary>
    public static readonly TimeSpan AnswerLimit = TimeSpan.FromSeconds(2);

    private readonly SafeFileHandle _socket;

    private PoolConnection(SafeFileHandle socket) => _socket = socket;

    /// <summary>Connects, and sends a request.</summary>
    /// <param name="path">The pool's socket.</param>
    /// <param name="request">What the daemon is asked; nothing more is said to it.</param>
    /// <returns>Null when nobody listens there, or somebody else's process does.</returns>
    public static PoolConnection? TryAsk(string path, PoolRequest request)
    {
        if (!File.Exists(path))
        {
            return null;
        }

        var packet = request.ToPacket(); // before the daemon waits for it

        SafeFileHandle? socket = null;
        try
        {
            // The limit is for a daemon that accepts nobody any more: the kernel would keep a client waiting for ever.
            PoolFiles.WithShortPath(path, shortPath => socket = UnixSockets.Connect(shortPath, UnixSocketKind.SequencedPacket, AnswerLimit));
            if (UnixSockets.GetPeerCredentials(socket!).Uid == UnixSockets.CurrentUserId)
            {
                FdPassing.Send(socket!, packet.Span);
                return new PoolConnection(socket!);
            }
        }
        catch (LinuxException)
        {
            // A socket that a daemon has left behind, or one that went away just now.
        }

        socket?.Dispose();
        return null;
    }

    /// <summary>Waits for the daemon's next answer.</summary>
    /// <param name="limit">At most this long.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The answer and the descriptor that came with it; no answer at end of file, when the time is over, or when it makes no sense.</returns>
    public (PoolAnswer? Answer, SafeFileHandle? Descriptor) Receive(TimeSpan limit, CancellationToken cancellationToken)
    {
        var received = new List<SafeFileHandle>();
        SafeFileHandle? first = null;
        try
        {
            using (var cancelled = new WakeEvent())
            using (cancellationToken.Register(cancelled.Set))
            {
                if ((Poll.WaitAny(limit, _socket, cancelled.Handle) & 1) == 0)
                {
                    cancellationToken.ThrowIfCancellationRequested();
                    return default;
                }
            }

            byte[] packet = GC.AllocateUninitializedArray<byte>(PoolJson.MaxPacket);
            int length = FdPassing.Receive(_socket, packet, received);
            var answer = length > 0 ? PoolAnswer.TryParse(packet.AsMemory(0, length)) : null;
            first = answer is null ? null : received.FirstOrDefault();
            return (answer, first);
        }
        catch (LinuxException)
        {
            return default; // the daemon is gone
        }
        finally
        {
            received.ForEach(descriptor =>
            {
                if (descriptor != first)
                {
                    descriptor.Dispose();
                }
            });
        }
    }

    /// <summary>Closes it: the daemon ends what it has handed out through it.</summary>
    public void Dispose() => _socket.Dispose();
}
