using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>
/// Sends and receives descriptors over unix sockets (SCM_RIGHTS, unix(7)). A received descriptor is close-on-exec and has an owner before
/// anything else is looked at; ancillary data that was cut short (MSG_CTRUNC) is refused.
/// </summary>
public static class FdPassing
{
    /// <summary>The most descriptors that one message may carry here; the kernel's own limit is 253 (SCM_MAX_FD).</summary>
    public const int MaxDescriptors = 8;

    /// <summary>Sends bytes, with descriptors when there are some.</summary>
    /// <param name="socket">A connected unix socket.</param>
    /// <param name="bytes">At least one byte: descriptors do not travel alone on a stream socket.</param>
    /// <param name="descriptors">At most <see cref="MaxDescriptors"/>; they stay open here.</param>
    /// <exception cref="LinuxException">The peer is gone (EPIPE), or the call failed; also when a stream socket took only a part.</exception>
    public static unsafe void Send(SafeHandle socket, ReadOnlySpan<byte> bytes, params ReadOnlySpan<SafeFileHandle> descriptors)
    {
        ArgumentNullException.ThrowIfNull(socket);
        ArgumentOutOfRangeException.ThrowIfZero(bytes.Length);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(descriptors.Length, MaxDescriptors);
        byte* control = stackalloc byte[ControlSpace];
        int held = 0;
        try
        {
            for (; held < descriptors.Length; held++)
            {
                bool added = false;
                descriptors[held].DangerousAddRef(ref added);
                ((int*)(control + sizeof(CMsgHdr)))[held] = (int)descriptors[held].DangerousGetHandle();
            }

            fixed (byte* data = bytes)
            {
                // SAFETY: every pointer in the message points to this stack frame or to pinned memory, with the lengths given beside it.
                var iov = new IoVec { Base = data, Length = (nuint)bytes.Length };
                var message = new MsgHdr { Iov = &iov, IovLength = 1 };
                if (descriptors.Length > 0)
                {
                    nuint length = (nuint)(sizeof(CMsgHdr) + (descriptors.Length * sizeof(int)));
                    *(CMsgHdr*)control = new CMsgHdr { Length = length, Level = SOL_SOCKET, Type = SCM_RIGHTS };
                    message.Control = control;
                    message.ControlLength = (length + 7) & ~(nuint)7;
                }

                nint sent;
                do
                {
                    sent = Libc.SendMsg(socket, &message, MSG_NOSIGNAL);
                }
                while (sent < 0 && LinuxException.LastErrno == Errno.EINTR);

                if (sent != bytes.Length)
                {
                    throw sent < 0 ? LinuxException.Last("sendmsg") : new LinuxException($"sendmsg took {sent} of {bytes.Length} bytes", Errno.EMSGSIZE);
                }
            }
        }
        finally
        {
            while (held-- > 0)
            {
                descriptors[held].DangerousRelease();
            }
        }
    }

    /// <summary>Receives bytes and whatever descriptors come with them, without blocking.</summary>
    /// <param name="socket">A connected unix socket.</param>
    /// <param name="buffer">Where the bytes go.</param>
    /// <param name="descriptors">Received descriptors are added; the caller owns them, also when this throws.</param>
    /// <returns>The number of bytes; 0 at end of file; -1 when nothing waits.</returns>
    /// <exception cref="LinuxException">The call failed, or descriptors were cut off (EMSGSIZE).</exception>
    public static unsafe int Receive(SafeHandle socket, Span<byte> buffer, ICollection<SafeFileHandle> descriptors)
    {
        ArgumentNullException.ThrowIfNull(socket);
        ArgumentNullException.ThrowIfNull(descriptors);
        byte* control = stackalloc byte[ControlSpace];
        fixed (byte* data = buffer)
        {
            // SAFETY: as in Send; the kernel writes at most the lengths given and sets ControlLength and Flags to what it wrote.
            var iov = new IoVec { Base = data, Length = (nuint)buffer.Length };
            var message = new MsgHdr { Iov = &iov, IovLength = 1, Control = control, ControlLength = (nuint)ControlSpace };
            nint received;
            do
            {
                received = Libc.RecvMsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
            }
            while (received < 0 && LinuxException.LastErrno == Errno.EINTR);

            if (received < 0)
            {
                return LinuxException.LastErrno == Errno.EAGAIN ? -1 : throw LinuxException.Last("recvmsg");
            }

            for (nuint at = 0; at + (nuint)sizeof(CMsgHdr) <= message.ControlLength;)
            {
                var header = (CMsgHdr*)(control + at);
                if (header->Length < (nuint)sizeof(CMsgHdr) || header->Length > message.ControlLength - at)
                {
                    break;
                }

                if (header->Level == SOL_SOCKET && header->Type == SCM_RIGHTS)
                {
                    int count = (int)(header->Length - (nuint)sizeof(CMsgHdr)) / sizeof(int);
                    for (int i = 0; i < count; i++)
                    {
                        descriptors.Add(new SafeFileHandle(((int*)(header + 1))[i], ownsHandle: true));
                    }
                }

                at += (header->Length + 7) & ~(nuint)7;
            }

            return (message.Flags & MSG_CTRUNC) == 0
                ? (int)received
                : throw new LinuxException("recvmsg: descriptors were cut off (MSG_CTRUNC)", Errno.EMSGSIZE);
        }
    }

    private static int ControlSpace => Unsafe.SizeOf<CMsgHdr>() + (MaxDescriptors * sizeof(int));
}
