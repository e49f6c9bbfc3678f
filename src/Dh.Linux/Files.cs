using Dh.Linux.Abi;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>What publishing a file safely takes.</summary>
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
}
