using System.Net.Sockets;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Pool;

/// <summary>A client's connection to a pool's daemon, which must be this user's own.</summary>
internal sealed class PoolConnection : IDisposable
{
    /// <summary>How long a daemon may take to accept and to answer; one that takes longer is stopped, or is no daemon.</summary>
    public static readonly TimeSpan AnswerLimit = TimeSpan.FromSeconds(2);

    private readonly Socket _socket;

    private PoolConnection(Socket socket) => _socket = socket;

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

        byte[] packet = request.ToPacket(); // before the daemon waits for it

        // The limit is for a daemon that accepts nobody any more: the kernel would keep a client waiting for ever.
        var socket = new Socket(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified) { SendTimeout = (int)AnswerLimit.TotalMilliseconds };
        try
        {
            PoolFiles.WithShortPath(path, shortPath => socket.Connect(new UnixDomainSocketEndPoint(shortPath)));
            if (UnixSockets.GetPeerCredentials(socket.SafeHandle).Uid == UnixSockets.CurrentUserId)
            {
                FdPassing.Send(socket.SafeHandle, packet);
                return new PoolConnection(socket);
            }
        }
        catch (Exception e) when (e is SocketException or LinuxException)
        {
            // A socket that a daemon has left behind, or one that went away just now.
        }

        socket.Dispose();
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
                if ((Poll.WaitAny(limit, _socket.SafeHandle, cancelled.Handle) & 1) == 0)
                {
                    cancellationToken.ThrowIfCancellationRequested();
                    return default;
                }
            }

            byte[] packet = GC.AllocateUninitializedArray<byte>(PoolJson.MaxPacket);
            int length = FdPassing.Receive(_socket.SafeHandle, packet, received);
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
