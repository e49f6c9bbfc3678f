using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>What files and directories can be done with beyond what <see cref="File"/> offers.</summary>
public static class Files
{
    /// <summary>Writes a file's or directory's data to the disk (fsync(2)).</summary>
    /// <param name="path">The file or directory.</param>
    /// <exception cref="LinuxException">The disk failed.</exception>
    public static void Sync(string path)
    {
        using var handle = Libc.Open(path, O_RDONLY | O_CLOEXEC, 0);
        if (handle.IsInvalid || Libc.Fsync(handle) != 0)
        {
            throw LinuxException.Last($"fsync {path}");
        }
    }

    /// <summary>Whether a file or directory is there (access(2)); unlike <see cref="Path.Exists"/> it does not take an error for a no.</summary>
    /// <param name="path">The file or directory; a symbolic link is followed.</param>
    /// <exception cref="LinuxException">It cannot be said: the disk failed, a directory above may not be searched.</exception>
    public static bool Exists(string path) =>
        Libc.Access(path, F_OK) == 0
        || (LinuxException.LastErrno is Errno.ENOENT or Errno.ENOTDIR ? false : throw LinuxException.Last($"access {path}"));

    /// <summary>Reads from where the descriptor stands (read(2)); <see cref="RandomAccess"/> wants one that has an offset.</summary>
    /// <param name="file">A file, pipe, terminal or socket open for reading.</param>
    /// <param name="buffer">Where the bytes go.</param>
    /// <returns>How many were read; 0 at the end.</returns>
    /// <exception cref="LinuxException">The call failed; EAGAIN: a descriptor that does not wait has nothing.</exception>
    public static unsafe int Read(SafeFileHandle file, Span<byte> buffer)
    {
        ArgumentNullException.ThrowIfNull(file);
        fixed (byte* start = buffer)
        {
            nint read;
            do
            {
                // SAFETY: at most the pinned bytes are written.
                read = Libc.Read(file, start, (nuint)buffer.Length);
            }
            while (read < 0 && LinuxException.LastErrno == Errno.EINTR);

            return read >= 0 ? (int)read : throw LinuxException.Last("read");
        }
    }

    /// <summary>Writes bytes where the descriptor stands (write(2)), all of them; waits where it is non-blocking and full.</summary>
    /// <param name="file">A file, pipe, terminal or socket open for writing.</param>
    /// <param name="bytes">The bytes.</param>
    /// <exception cref="LinuxException">EPIPE: nobody reads; ENOSPC: no space is left. A part may be written.</exception>
    public static unsafe void WriteAll(SafeFileHandle file, ReadOnlySpan<byte> bytes)
    {
        ArgumentNullException.ThrowIfNull(file);
        fixed (byte* start = bytes)
        {
            for (int done = 0; done < bytes.Length;)
            {
                // SAFETY: at most the rest of the pinned bytes is read.
                nint written = Libc.Write(file, start + done, (nuint)(bytes.Length - done));
                if (written >= 0)
                {
                    done += (int)written;
                }
                else if (LinuxException.LastErrno == Errno.EAGAIN)
                {
                    Poll.WaitWritable(file);
                }
                else if (LinuxException.LastErrno != Errno.EINTR)
                {
                    throw LinuxException.Last("write");
                }
            }
        }
    }

    /// <summary>Writes where the descriptor stands what it takes at once (pwritev2(2) with RWF_NOWAIT).</summary>
    /// <param name="file">A file, pipe, terminal or socket open for writing.</param>
    /// <param name="bytes">The bytes.</param>
    /// <returns>How many of them were written: none also where that cannot be had without waiting, or fails; <see cref="WriteAll"/> tells.</returns>
    public static unsafe int WriteAtOnce(SafeFileHandle file, ReadOnlySpan<byte> bytes)
    {
        ArgumentNullException.ThrowIfNull(file);
        fixed (byte* start = bytes)
        {
            var vector = new IoVec { Base = start, Length = (nuint)bytes.Length };
            // SAFETY: one entry on this stack frame, which stands for the pinned bytes. Offset -1 is where the descriptor stands.
            return (int)Math.Max(0, Libc.PWriteV2(file, &vector, 1, -1, RWF_NOWAIT));
        }
    }

    /// <summary>Renames a file, directory or symbolic link, replacing a file or link that is there, in one step (rename(2)).</summary>
    /// <param name="from">What; a link itself, not what it points to.</param>
    /// <param name="to">Its new path, on the same file system.</param>
    /// <exception cref="LinuxException">It cannot be renamed.</exception>
    public static void Rename(string from, string to)
    {
        if (Libc.Rename(from, to) != 0)
        {
            throw LinuxException.Last($"rename {from} to {to}");
        }
    }

    /// <summary>Opens a directory, for paths below it that do not depend on how long its own is: <c>/proc/self/fd/N/NAME</c>.</summary>
    /// <param name="path">The directory; not a symbolic link.</param>
    /// <returns>The directory; the caller disposes it.</returns>
    /// <exception cref="LinuxException">ENOENT: there is none; ENOTDIR: it is something else.</exception>
    public static SafeFileHandle OpenDirectory(string path)
    {
        var handle = Libc.Open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
        if (!handle.IsInvalid)
        {
            return handle;
        }

        var error = LinuxException.Last($"open {path}");
        handle.Dispose();
        throw error;
    }

    /// <summary>Gives a file one more name (link(2)).</summary>
    /// <param name="existing">The file.</param>
    /// <param name="path">The new name, on the same file system; nothing may exist there.</param>
    /// <exception cref="LinuxException">EXDEV: another file system; EEXIST: the name is taken.</exception>
    public static void Link(string existing, string path)
    {
        if (Libc.Link(existing, path) != 0)
        {
            throw LinuxException.Last($"link {existing} to {path}");
        }
    }

    /// <summary>Gives a file, a directory, or a symbolic link itself, to another user (lchown(2)).</summary>
    /// <param name="path">What.</param>
    /// <param name="userId">The new owner.</param>
    /// <param name="groupId">The new group.</param>
    /// <exception cref="LinuxException">EPERM: only root may.</exception>
    public static void ChangeOwner(string path, uint userId, uint groupId)
    {
        if (Libc.LChown(path, userId, groupId) != 0)
        {
            throw LinuxException.Last($"lchown {path}");
        }
    }
}
