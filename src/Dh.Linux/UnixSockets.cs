using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>Kinds of connected unix socket pairs.</summary>
public enum UnixSocketKind
{
    /// <summary>A byte stream (SOCK_STREAM).</summary>
    Stream = SOCK_STREAM,

    /// <summary>Messages that keep their borders (SOCK_SEQPACKET).</summary>
    SequencedPacket = SOCK_SEQPACKET,
}

/// <summary>Who is at the other end of a unix socket.</summary>
/// <param name="Pid">The process that connected, listened, or made the pair; it may be gone.</param>
/// <param name="Uid">Its effective user.</param>
/// <param name="Gid">Its effective group.</param>
public readonly record struct PeerCredentials(int Pid, uint Uid, uint Gid);

/// <summary>Unix sockets beyond what <see cref="Socket"/> offers.</summary>
public static class UnixSockets
{
    /// <summary>The longest path that a socket can be bound to, in bytes (struct sockaddr_un, unix(7)).</summary>
    public const int MaxPathLength = 107;

    /// <summary>Two connected sockets without a path, close-on-exec (socketpair(2)).</summary>
    /// <param name="kind">Byte stream or messages.</param>
    /// <exception cref="LinuxException">No descriptor is left (EMFILE, ENFILE).</exception>
    public static unsafe (SafeSocketHandle Ours, SafeSocketHandle Theirs) CreatePair(UnixSocketKind kind)
    {
        int* fds = stackalloc int[2];
        // SAFETY: the kernel writes two ints.
        return Libc.SocketPair(AF_UNIX, (int)kind | SOCK_CLOEXEC, 0, fds) == 0
            ? (new SafeSocketHandle(fds[0], ownsHandle: true), new SafeSocketHandle(fds[1], ownsHandle: true))
            : throw LinuxException.Last("socketpair");
    }

    /// <summary>As <see cref="CreatePair"/>, with this process's end ready for asynchronous use.</summary>
    /// <param name="kind">Byte stream or messages.</param>
    /// <exception cref="LinuxException">No descriptor is left (EMFILE, ENFILE), or what the kernel says of a new one makes no sense.</exception>
    public static (Socket Ours, SafeSocketHandle Theirs) CreateSocketPair(UnixSocketKind kind)
    {
        var (ours, theirs) = CreatePair(kind);
        try
        {
            return (new Socket(ours), theirs);
        }
        catch (SocketException e)
        {
            ours.Dispose();
            theirs.Dispose();
            throw new LinuxException("looking at a new socket pair", (Errno)e.NativeErrorCode);
        }
    }

    /// <summary>Connects to a listening unix socket (connect(2)). <see cref="Socket"/> does that, too, and begins a thread, as a
    /// <see cref="SafeSocketHandle"/> does that a system call returns: hence another handle.</summary>
    /// <param name="path">At most <see cref="MaxPathLength"/> bytes.</param>
    /// <param name="kind">Byte stream or messages.</param>
    /// <param name="limit">How long the connection, and each send, may wait (SO_SNDTIMEO); more than 0.</param>
    /// <exception cref="LinuxException">Nobody listens there (ECONNREFUSED, ENOENT), the time is over (EAGAIN), no descriptor is left.</exception>
    /// <exception cref="ArgumentException">The path is too long.</exception>
    public static unsafe SafeFileHandle Connect(string path, UnixSocketKind kind, TimeSpan limit)
    {
        const int FamilyLength = sizeof(ushort), AddressLength = FamilyLength + MaxPathLength + 1;
        ArgumentNullException.ThrowIfNull(path);
        ArgumentOutOfRangeException.ThrowIfLessThan(limit, TimeSpan.FromMicroseconds(1));
        byte* address = stackalloc byte[AddressLength]; // struct sockaddr_un: the family, then the path, which ends with a zero
        long* time = stackalloc long[2] { (long)limit.TotalSeconds, limit.Ticks / TimeSpan.TicksPerMicrosecond % 1_000_000 }; // struct timeval
        new Span<byte>(address, AddressLength).Clear();
        *(ushort*)address = AF_UNIX;
        if (!Encoding.UTF8.TryGetBytes(path, new Span<byte>(address + FamilyLength, MaxPathLength), out int length))
        {
            throw new ArgumentException($"A socket's path has at most {MaxPathLength} bytes, not {Encoding.UTF8.GetByteCount(path)}.", nameof(path));
        }

        var socket = Libc.Socket(AF_UNIX, (int)kind | SOCK_CLOEXEC, 0);
        bool connected = false;
        try
        {
            // SAFETY: the kernel reads two longs.
            if (socket.IsInvalid || Libc.SetSockOpt(socket, SOL_SOCKET, SO_SNDTIMEO, time, 2 * sizeof(long)) != 0)
            {
                throw LinuxException.Last("a new socket");
            }

            do
            {
                // SAFETY: the kernel reads the family, the path and a zero behind it, all of them within the address.
                connected = Libc.Connect(socket, address, (uint)(FamilyLength + length + 1)) == 0;
            }
            while (!connected && LinuxException.LastErrno == Errno.EINTR);

            return connected ? socket : throw LinuxException.Last($"connect {path}");
        }
        finally
        {
            if (!connected)
            {
                socket.Dispose();
            }
        }
    }

    /// <summary>
    /// The credentials that the kernel recorded for the peer (SO_PEERCRED). On an inherited socketpair they name the process that made the pair.
    /// </summary>
    /// <param name="socket">A connected unix socket.</param>
    /// <exception cref="LinuxException">It is no unix socket.</exception>
    public static unsafe PeerCredentials GetPeerCredentials(SafeHandle socket)
    {
        var credentials = default(UCred);
        uint length = (uint)sizeof(UCred);
        // SAFETY: credentials has the layout and size of struct ucred.
        return Libc.GetSockOpt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0
            ? new PeerCredentials(credentials.Pid, credentials.Uid, credentials.Gid)
            : throw LinuxException.Last("getsockopt SO_PEERCRED");
    }

    /// <summary>
    /// The process at the other end of a socket that was accepted from a listening one: the kernel's own descriptor for it (SO_PEERPIDFD,
    /// Linux 6.5), or one opened by its number while it still holds its end.
    /// </summary>
    /// <param name="socket">A connected unix socket.</param>
    /// <exception cref="LinuxException">The process is gone.</exception>
    public static unsafe PidFd OpenPeer(SafeSocketHandle socket)
    {
        int fd = -1;
        uint length = sizeof(int);
        // SAFETY: the kernel writes one int.
        return Libc.GetSockOpt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &length) == 0
            ? new PidFd(new SafeFileHandle(fd, ownsHandle: true))
            : PidFd.Open(GetPeerCredentials(socket).Pid);
    }

    /// <summary>The user that this process runs as (getuid(2)).</summary>
    public static uint CurrentUserId => Libc.GetUid();
}
