using System.Runtime.InteropServices;
using System.Text;
using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>
/// Starts a child that inherits exactly the descriptors it is given, under the numbers it expects, in a session of its own and with
/// default signals (posix_spawn(3)): what <see cref="System.Diagnostics.Process"/> cannot do.
/// </summary>
public sealed class ChildProcess : IDisposable
{
    private const int FirstFreeDescriptor = 64;

    // glibc: sizeof(posix_spawn_file_actions_t) 80, posix_spawnattr_t 336, sigset_t 128 on x86-64 (checked by test/abi-check).
    internal const int FileActionsSize = 80;
    internal const int AttributesSize = 336;
    internal const int SignalSetSize = 128;

    private ChildProcess(int pid, PidFd pidFd)
    {
        Pid = pid;
        PidFd = pidFd;
    }

    /// <summary>Its number; valid until it is reaped by <see cref="WaitAndReap"/>.</summary>
    public int Pid { get; }

    /// <summary>The child by descriptor.</summary>
    public PidFd PidFd { get; }

    /// <summary>Starts a program. Its standard input is /dev/null; standard output and error are this process's unless given.</summary>
    /// <param name="path">The program's absolute path.</param>
    /// <param name="arguments">Its arguments, without the program's own name.</param>
    /// <param name="environment">Its whole environment.</param>
    /// <param name="descriptors">Descriptor number in the child, and what it is; numbers below 64, without gaps from the first one above 9 on. Everything above the last is closed.</param>
    /// <exception cref="LinuxException">ENOENT: no such program; EAGAIN, ENOMEM: no process is left.</exception>
    public static unsafe ChildProcess Start(
        string path,
        IReadOnlyList<string> arguments,
        IReadOnlyDictionary<string, string> environment,
        IReadOnlyList<(int Number, SafeHandle Descriptor)> descriptors)
    {
        ArgumentNullException.ThrowIfNull(path);
        ArgumentNullException.ThrowIfNull(arguments);
        ArgumentNullException.ThrowIfNull(environment);
        ArgumentNullException.ThrowIfNull(descriptors);
        byte* actions = stackalloc byte[FileActionsSize];
        byte* attributes = stackalloc byte[AttributesSize];
        byte* signals = stackalloc byte[SignalSetSize];
        var duplicates = new List<SafeFileHandle>(descriptors.Count);
        // SAFETY: the three buffers have glibc's sizes and are initialised before use; argv and envp are NULL-terminated arrays of
        // NUL-terminated strings that live in unmanaged memory until the finally block; the child shares nothing with us after the call.
        Check(Libc.PosixSpawnFileActionsInit(actions), "posix_spawn_file_actions_init");
        Check(Libc.PosixSpawnAttrInit(attributes), "posix_spawnattr_init");
        byte** argv = Strings([path, .. arguments]);
        byte** envp = Strings([.. environment.Select(variable => $"{variable.Key}={variable.Value}")]);
        try
        {
            Check(Libc.SigEmptySet(signals), "sigemptyset");
            Check(Libc.PosixSpawnAttrSetSigMask(attributes, signals), "posix_spawnattr_setsigmask");
            Check(Libc.SigFillSet(signals), "sigfillset");
            Check(Libc.PosixSpawnAttrSetSigDefault(attributes, signals), "posix_spawnattr_setsigdefault");
            Check(Libc.PosixSpawnAttrSetFlags(attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSID), "posix_spawnattr_setflags");
            Check(Libc.PosixSpawnFileActionsAddOpen(actions, 0, "/dev/null", O_RDONLY, 0), "posix_spawn_file_actions_addopen");
            foreach (var (number, descriptor) in descriptors)
            {
                // A descriptor may stand on a number that another one is to get: move all of them out of the way first.
                ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(number, FirstFreeDescriptor);
                var duplicate = DuplicateAbove(descriptor, FirstFreeDescriptor);
                duplicates.Add(duplicate);
                Check(Libc.PosixSpawnFileActionsAddDup2(actions, (int)duplicate.DangerousGetHandle(), number), "posix_spawn_file_actions_adddup2");
            }

            // This process may itself have inherited descriptors without close-on-exec: none of them may reach the child.
            int last = descriptors.Count == 0 ? 2 : Math.Max(2, descriptors.Max(descriptor => descriptor.Number));
            Check(Libc.PosixSpawnFileActionsAddCloseFrom(actions, last + 1), "posix_spawn_file_actions_addclosefrom_np");
            int error = Libc.PosixSpawn(out int pid, path, actions, attributes, argv, envp);
            Check(error, $"posix_spawn {path}");
            return new ChildProcess(pid, PidFd.Open(pid));
        }
        finally
        {
            duplicates.ForEach(duplicate => duplicate.Dispose());
            FreeStrings(argv);
            FreeStrings(envp);
            _ = Libc.PosixSpawnFileActionsDestroy(actions);
            _ = Libc.PosixSpawnAttrDestroy(attributes);
        }
    }

    /// <summary>Waits until the child has ended and reaps it.</summary>
    /// <param name="timeout">At most this long.</param>
    /// <returns>False when it still runs.</returns>
    public bool WaitAndReap(TimeSpan timeout)
    {
        if (!PidFd.WaitForExit(timeout))
        {
            return false;
        }

        PidFd.Reap();
        return true;
    }

    /// <summary>Closes the descriptor of the child; the child goes on.</summary>
    public void Dispose() => PidFd.Dispose();

    private static SafeFileHandle DuplicateAbove(SafeHandle descriptor, int lowest)
    {
        bool added = false;
        try
        {
            descriptor.DangerousAddRef(ref added);
            using var borrowed = new SafeFileHandle(descriptor.DangerousGetHandle(), ownsHandle: false);
            int fd = Libc.Fcntl(borrowed, F_DUPFD_CLOEXEC, lowest);
            return fd >= 0 ? new SafeFileHandle(fd, ownsHandle: true) : throw LinuxException.Last("fcntl F_DUPFD_CLOEXEC");
        }
        finally
        {
            if (added)
            {
                descriptor.DangerousRelease();
            }
        }
    }

    private static void Check(int error, string operation)
    {
        if (error != 0)
        {
            throw new LinuxException(operation, (Errno)error);
        }
    }

    private static unsafe byte** Strings(string[] values)
    {
        // SAFETY: one pointer more than values, zeroed, so that the array is NULL-terminated at every moment FreeStrings may see it.
        byte** array = (byte**)NativeMemory.AllocZeroed((nuint)values.Length + 1, (nuint)sizeof(byte*));
        for (int i = 0; i < values.Length; i++)
        {
            int length = Encoding.UTF8.GetByteCount(values[i]);
            array[i] = (byte*)NativeMemory.AllocZeroed((nuint)length + 1);
            Encoding.UTF8.GetBytes(values[i], new Span<byte>(array[i], length));
        }

        return array;
    }

    private static unsafe void FreeStrings(byte** array)
    {
        for (byte** at = array; *at is not null; at++)
        {
            NativeMemory.Free(*at);
        }

        NativeMemory.Free(array);
    }
}
