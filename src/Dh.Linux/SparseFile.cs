using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>A stretch of a file.</summary>
/// <param name="Offset">Start in bytes.</param>
/// <param name="Length">Length in bytes.</param>
public readonly record struct FileExtent(long Offset, long Length)
{
    /// <summary>The first byte behind it.</summary>
    public long End => Offset + Length;
}

/// <summary>Data and holes of sparse files (lseek(2), fallocate(2)).</summary>
public static class SparseFile
{
    /// <summary>
    /// The stretches that hold data, in order; what lies between them are holes, which read as zeros. A file system without holes
    /// reports the whole file as data.
    /// </summary>
    /// <param name="file">An open file; its position changes.</param>
    /// <param name="length">Its length in bytes.</param>
    /// <exception cref="LinuxException">The file system failed.</exception>
    public static IReadOnlyList<FileExtent> GetDataExtents(SafeFileHandle file, long length)
    {
        var extents = new List<FileExtent>();
        for (long at = 0; at < length;)
        {
            long data = Libc.Lseek(file, at, SEEK_DATA);
            if (data < 0)
            {
                // lseek(2): ENXIO says that no data follows.
                return LinuxException.LastErrno == Errno.ENXIO ? extents : throw LinuxException.Last($"lseek SEEK_DATA {at}");
            }

            long hole = Libc.Lseek(file, data, SEEK_HOLE);
            if (hole < 0)
            {
                throw LinuxException.Last($"lseek SEEK_HOLE {data}");
            }

            hole = Math.Min(hole, length);
            if (hole > data)
            {
                extents.Add(new FileExtent(data, hole - data));
            }

            at = Math.Max(hole, data + 1);
        }

        return extents;
    }

    /// <summary>Makes a hole; the file keeps its length (FALLOC_FL_PUNCH_HOLE).</summary>
    /// <param name="file">A file open for writing.</param>
    /// <param name="extent">What to give back.</param>
    /// <exception cref="LinuxException">EOPNOTSUPP: this file system has no holes.</exception>
    public static void PunchHole(SafeFileHandle file, FileExtent extent)
    {
        if (Libc.Fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, extent.Offset, extent.Length) != 0)
        {
            throw LinuxException.Last($"fallocate PUNCH_HOLE {extent.Offset}+{extent.Length}");
        }
    }

    /// <summary>Drops a file's clean pages from the page cache (POSIX_FADV_DONTNEED), so that the next read comes from the disk.</summary>
    /// <param name="file">An open file.</param>
    public static void DropFromPageCache(SafeFileHandle file) => _ = Libc.PosixFadvise(file, 0, 0, POSIX_FADV_DONTNEED);
}
