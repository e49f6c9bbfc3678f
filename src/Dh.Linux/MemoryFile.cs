using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>A file without a name, in memory: for handing more to a child than a pipe holds (memfd_create(2)).</summary>
public static class MemoryFile
{
    /// <summary>Makes a file with the given contents, positioned at its start, close-on-exec.</summary>
    /// <param name="name">What /proc shows for it.</param>
    /// <param name="contents">Its bytes.</param>
    /// <exception cref="LinuxException">No descriptor or memory is left.</exception>
    public static SafeFileHandle Create(string name, ReadOnlySpan<byte> contents)
    {
        var file = Libc.MemFdCreate(name, MFD_CLOEXEC);
        try
        {
            if (file.IsInvalid)
            {
                throw LinuxException.Last("memfd_create");
            }

            Write(file, contents);
            return file;
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    private static unsafe void Write(SafeFileHandle file, ReadOnlySpan<byte> contents)
    {
        fixed (byte* start = contents)
        {
            for (int done = 0; done < contents.Length;)
            {
                // SAFETY: the bytes are pinned, and the kernel reads no more of them than are left.
                nint written = Libc.PWrite(file, start + done, (nuint)(contents.Length - done), done);
                if (written > 0)
                {
                    done += (int)written;
                }
                else if (LinuxException.LastErrno != Errno.EINTR)
                {
                    throw LinuxException.Last($"pwrite of {contents.Length} bytes to a memory file");
                }
            }
        }
    }
}
