using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>A process, held by a descriptor: unlike a number, it can never come to mean another process (pidfd_open(2)).</summary>
public sealed class PidFd : IDisposable
{
    /// <summary>SIGINT.</summary>
    public const int SigInt = 2;

    /// <summary>SIGKILL.</summary>
    public const int SigKill = 9;

    /// <summary>SIGTERM.</summary>
    public const int SigTerm = 15;

    /// <summary>Takes ownership of a pidfd that was received from another process.</summary>
    /// <param name="handle">The descriptor; closed by <see cref="Dispose"/>.</param>
    public PidFd(SafeFileHandle handle)
    {
        ArgumentNullException.ThrowIfNull(handle);
        Handle = handle;
    }

    /// <summary>The descriptor: readable when the process has ended.</summary>
    public SafeFileHandle Handle { get; }

    /// <summary>Opens a process by its number. Safe only for a child that was not waited for, or a peer whose credentials are checked again afterwards.</summary>
    /// <param name="pid">The process.</param>
    /// <exception cref="LinuxException">ESRCH: there is no such process.</exception>
    public static PidFd Open(int pid)
    {
        nint fd = Libc.Syscall(SYS_pidfd_open, pid, 0, 0, 0);
        return fd >= 0 ? new PidFd(new SafeFileHandle(fd, ownsHandle: true)) : throw LinuxException.Last($"pidfd_open {pid}");
    }

    /// <summary>Sends a signal (pidfd_send_signal(2)).</summary>
    /// <param name="signal">Its number.</param>
    /// <returns>False when the process has been reaped.</returns>
    /// <exception cref="LinuxException">EPERM: it belongs to somebody else.</exception>
    public bool SendSignal(int signal)
    {
        bool added = false;
        try
        {
            Handle.DangerousAddRef(ref added);
            if (Libc.Syscall(SYS_pidfd_send_signal, Handle.DangerousGetHandle(), signal, 0, 0) == 0)
            {
                return true;
            }

            return LinuxException.LastErrno == Errno.ESRCH ? false : throw LinuxException.Last($"pidfd_send_signal {signal}");
        }
        finally
        {
            if (added)
            {
                Handle.DangerousRelease();
            }
        }
    }

    /// <summary>Waits until the process has ended.</summary>
    /// <param name="timeout">At most this long.</param>
    /// <returns>False when it still runs.</returns>
    public bool WaitForExit(TimeSpan timeout) => Poll.Wait(Handle, timeout);

    /// <summary>Reaps the process, which must be a child that has ended (waitid(2)).</summary>
    /// <exception cref="LinuxException">ECHILD: it is no child of this process, or was reaped before.</exception>
    public unsafe void Reap()
    {
        byte* info = stackalloc byte[128];
        bool added = false;
        try
        {
            Handle.DangerousAddRef(ref added);
            // SAFETY: siginfo_t is 128 bytes on Linux (linux/siginfo.h, SI_MAX_SIZE).
            if (Libc.WaitId(P_PIDFD, (uint)Handle.DangerousGetHandle(), info, WEXITED) != 0)
            {
                throw LinuxException.Last("waitid");
            }
        }
        finally
        {
            if (added)
            {
                Handle.DangerousRelease();
            }
        }
    }

    /// <summary>Closes the descriptor; the process goes on.</summary>
    public void Dispose() => Handle.Dispose();
}
