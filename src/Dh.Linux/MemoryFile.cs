using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>A file without a name, in memory (memfd_create(2)).</summary>
public static class MemoryFile
{
    /// <summary>Makes a file with the given contents, positioned at its start, close-on-exec: for handing more to a child than a pipe holds.</summary>
    /// <param name="name">What /proc shows for it.</param>
    /// <param name="contents">Its bytes.</param>
    /// <exception cref="LinuxException">No descriptor or memory is left.</exception>
    public static unsafe SafeFileHandle Create(string name, ReadOnlySpan<byte> contents)
    {
        var file = Create(name, MFD_CLOEXEC);
        try
        {
            fixed (byte* start = contents)
            {
                // SAFETY: the pinned bytes.
                Write(file, 0, (nuint)start, (ulong)contents.Length);
            }

            return file;
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Makes a file of holes whose length nobody can change any more (F_SEAL_SHRINK, F_SEAL_GROW), close-on-exec: to be mapped by processes
    /// that do not trust each other.
    /// </summary>
    /// <param name="name">What /proc shows for it.</param>
    /// <param name="length">Its length in bytes, above 0.</param>
    /// <exception cref="LinuxException">No descriptor or address space is left.</exception>
    public static SafeFileHandle CreateSealed(string name, long length)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        var file = Create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (Libc.Ftruncate(file, length) != 0 || Libc.Fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        {
            var failure = LinuxException.Last($"sealing a memory file of {length} bytes");
            file.Dispose();
            throw failure;
        }

        return file;
    }

    /// <summary>Writes memory of this process to a file (pwrite(2)), all of it.</summary>
    /// <param name="file">A file open for writing.</param>
    /// <param name="offset">Where in it.</param>
    /// <param name="source">The address of the bytes; they may be those of a mapped file, and vanish.</param>
    /// <param name="length">How many bytes.</param>
    /// <exception cref="LinuxException">EFAULT: the bytes cannot be read; ENOMEM, ENOSPC: no memory is left. A part may be written.</exception>
    public static unsafe void Write(SafeFileHandle file, long offset, nuint source, ulong length)
    {
        for (ulong done = 0; done < length;)
        {
            // SAFETY: the kernel reads the bytes, and answers EFAULT where there are none.
            nint written = Libc.PWrite(file, (void*)(source + (nuint)done), (nuint)(length - done), offset + (long)done);
            if (written > 0)
            {
                done += (ulong)written;
            }
            else if (LinuxException.LastErrno != Errno.EINTR)
            {
                throw LinuxException.Last($"pwrite of {length} bytes to a memory file at {offset}");
            }
        }
    }

    private static SafeFileHandle Create(string name, uint flags)
    {
        var file = Libc.MemFdCreate(name, flags);
        if (file.IsInvalid)
        {
            var failure = LinuxException.Last("memfd_create");
            file.Dispose();
            throw failure;
        }

        return file;
    }
}
