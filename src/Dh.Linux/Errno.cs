using System.Runtime.InteropServices;
using Dh.Linux.Abi;

namespace Dh.Linux;

/// <summary>The error numbers that this code tells apart (asm-generic/errno-base.h, asm-generic/errno.h); others keep their number.</summary>
public enum Errno
{
    /// <summary>No error.</summary>
    None = 0,

    /// <summary>Operation not permitted.</summary>
    EPERM = 1,

    /// <summary>No such file or directory.</summary>
    ENOENT = 2,

    /// <summary>No such process.</summary>
    ESRCH = 3,

    /// <summary>Interrupted system call.</summary>
    EINTR = 4,

    /// <summary>Input/output error.</summary>
    EIO = 5,

    /// <summary>No such device or address; for SEEK_DATA: no data beyond the offset.</summary>
    ENXIO = 6,

    /// <summary>Try again.</summary>
    EAGAIN = 11,

    /// <summary>Out of memory.</summary>
    ENOMEM = 12,

    /// <summary>Permission denied.</summary>
    EACCES = 13,

    /// <summary>Bad address.</summary>
    EFAULT = 14,

    /// <summary>Already exists.</summary>
    EEXIST = 17,

    /// <summary>Another file system.</summary>
    EXDEV = 18,

    /// <summary>No such device.</summary>
    ENODEV = 19,

    /// <summary>Not a directory.</summary>
    ENOTDIR = 20,

    /// <summary>Invalid argument.</summary>
    EINVAL = 22,

    /// <summary>No space left on the device.</summary>
    ENOSPC = 28,

    /// <summary>Broken pipe.</summary>
    EPIPE = 32,

    /// <summary>Function not implemented.</summary>
    ENOSYS = 38,

    /// <summary>Message too long, or ancillary data that did not fit.</summary>
    EMSGSIZE = 90,

    /// <summary>Operation not supported.</summary>
    EOPNOTSUPP = 95,

    /// <summary>Connection reset by the peer.</summary>
    ECONNRESET = 104,
}

/// <summary>Names and words of error numbers, for messages.</summary>
public static class ErrnoText
{
    /// <summary>"ENOENT (No such file or directory)"; the number where the C library knows no name (strerrorname_np(3), glibc 2.32).</summary>
    /// <param name="errno">The error number.</param>
    public static unsafe string Describe(this Errno errno)
    {
        // SAFETY: both functions return null or a pointer to a constant, NUL-terminated string of the C library.
        byte* name = Libc.StrErrorName((int)errno);
        byte* words = Libc.StrErrorDescription((int)errno);
        return name is null || words is null ? $"errno {(int)errno}" : $"{Marshal.PtrToStringUTF8((nint)name)} ({Marshal.PtrToStringUTF8((nint)words)})";
    }
}
