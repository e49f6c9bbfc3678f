using System.Diagnostics;
using System.Runtime.InteropServices;
using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>Waiting for descriptors (poll(2)); a signal handler that interrupts a wait does not end it.</summary>
public static class Poll
{
    /// <summary>The most descriptors that one wait takes.</summary>
    public const int MaxDescriptors = 8;

    /// <summary>Waits until a descriptor is readable, at end of file, or in error.</summary>
    /// <param name="descriptor">What to wait for.</param>
    /// <param name="timeout">At most this long; <see cref="Timeout.InfiniteTimeSpan"/> for ever.</param>
    /// <returns>False when the time is over.</returns>
    public static bool Wait(SafeHandle descriptor, TimeSpan timeout) => WaitAny(timeout, descriptor) != 0;

    /// <summary>Waits until one of the descriptors is readable, at end of file, or in error.</summary>
    /// <param name="timeout">At most this long; <see cref="Timeout.InfiniteTimeSpan"/> for ever.</param>
    /// <param name="descriptors">What to wait for, at most <see cref="MaxDescriptors"/>.</param>
    /// <returns>A mask: bit i stands for the i-th descriptor; 0 when the time is over.</returns>
    /// <exception cref="LinuxException">The call failed.</exception>
    public static unsafe int WaitAny(TimeSpan timeout, params ReadOnlySpan<SafeHandle> descriptors)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(descriptors.Length, MaxDescriptors);
        PollFd* fds = stackalloc PollFd[MaxDescriptors];
        long deadline = timeout == Timeout.InfiniteTimeSpan ? long.MaxValue : Stopwatch.GetTimestamp() + (long)(timeout.TotalSeconds * Stopwatch.Frequency);
        int held = 0;
        try
        {
            for (; held < descriptors.Length; held++)
            {
                bool added = false;
                descriptors[held].DangerousAddRef(ref added);
                fds[held] = new PollFd { Fd = (int)descriptors[held].DangerousGetHandle(), Events = POLLIN };
            }

            while (true)
            {
                // SAFETY: fds holds at least `held` entries, whose descriptors are kept open by the references taken above.
                int ready = Libc.Poll(fds, (nuint)held, MillisecondsUntil(deadline));
                if (ready < 0 && LinuxException.LastErrno != Errno.EINTR)
                {
                    throw LinuxException.Last("poll");
                }

                if (ready > 0)
                {
                    int mask = 0;
                    for (int i = 0; i < held; i++)
                    {
                        mask |= fds[i].Revents != 0 ? 1 << i : 0;
                    }

                    return mask;
                }

                if (deadline != long.MaxValue && Stopwatch.GetTimestamp() >= deadline)
                {
                    return 0;
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

    /// <summary>Waits, for ever, until a descriptor takes bytes, or is in error.</summary>
    internal static unsafe void WaitWritable(SafeFileHandle descriptor)
    {
        bool added = false;
        try
        {
            descriptor.DangerousAddRef(ref added);
            var fd = new PollFd { Fd = (int)descriptor.DangerousGetHandle(), Events = POLLOUT };
            // SAFETY: one entry on this stack frame, whose descriptor is kept open by the reference taken above.
            if (Libc.Poll(&fd, 1, -1) < 0 && LinuxException.LastErrno != Errno.EINTR)
            {
                throw LinuxException.Last("poll");
            }
        }
        finally
        {
            if (added)
            {
                descriptor.DangerousRelease();
            }
        }
    }

    private static int MillisecondsUntil(long deadline)
    {
        if (deadline == long.MaxValue)
        {
            return -1;
        }

        double milliseconds = (deadline - Stopwatch.GetTimestamp()) * 1000.0 / Stopwatch.Frequency;
        return (int)Math.Clamp(Math.Ceiling(milliseconds), 0, int.MaxValue);
    }
}

/// <summary>A descriptor that becomes readable when <see cref="Set"/> is called: wakes a thread out of <see cref="Poll"/> (eventfd(2)).</summary>
public sealed class WakeEvent : IDisposable
{
    /// <summary>Makes it, not set.</summary>
    /// <exception cref="LinuxException">No descriptor is left.</exception>
    public WakeEvent()
    {
        Handle = Libc.EventFd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (Handle.IsInvalid)
        {
            throw LinuxException.Last("eventfd");
        }
    }

    /// <summary>The descriptor to poll.</summary>
    public SafeFileHandle Handle { get; }

    /// <summary>Makes the descriptor readable; it stays so.</summary>
    public unsafe void Set()
    {
        ulong one = 1;
        // SAFETY: an eventfd takes 8 bytes. It fails only with EAGAIN, when the counter is full: then it is readable already.
        _ = Libc.Write(Handle, &one, sizeof(ulong));
    }

    /// <summary>Closes the descriptor; nobody may be polling it.</summary>
    public void Dispose() => Handle.Dispose();
}
