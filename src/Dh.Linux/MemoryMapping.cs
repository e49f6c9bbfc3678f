using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>
/// A shared read-only mapping of a whole file (mmap(2)), as the source of copies that the kernel makes. Its bytes are never handed out as
/// a span: when the file is truncated under the mapping, a read by this process is a SIGBUS, while a read by the kernel is an EFAULT.
/// </summary>
public sealed class MemoryMapping : IDisposable
{
    private nint _address;

    private MemoryMapping(nint address, long length)
    {
        _address = address;
        Length = length;
    }

    /// <summary>Length in bytes.</summary>
    public long Length { get; }

    /// <summary>Address of the first byte in this process.</summary>
    /// <exception cref="ObjectDisposedException">It is unmapped.</exception>
    public nuint Address
    {
        get
        {
            nint address = Volatile.Read(ref _address);
            ObjectDisposedException.ThrowIf(address == 0, this);
            return (nuint)address;
        }
    }

    /// <summary>Maps a file from its start.</summary>
    /// <param name="file">An open file; it may be closed afterwards.</param>
    /// <param name="length">Bytes to map, positive; not beyond the end of the file, or reading there fails.</param>
    /// <exception cref="LinuxException">The kernel refuses.</exception>
    public static MemoryMapping OfFile(SafeFileHandle file, long length)
    {
        ArgumentNullException.ThrowIfNull(file);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        nint address = Libc.Mmap(0, (nuint)length, PROT_READ, MAP_SHARED, file, 0);
        return address != -1 ? new MemoryMapping(address, length) : throw LinuxException.Last($"mmap of {length} bytes");
    }

    /// <summary>
    /// Reads a range into the page cache and maps it (MADV_POPULATE_READ, Linux 5.14). An aid only: false when the kernel would not.
    /// </summary>
    /// <param name="offset">Start in bytes, page-aligned.</param>
    /// <param name="length">Bytes.</param>
    public bool TryPopulate(long offset, long length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset + length, Length);
        return Libc.Madvise((nint)Address + (nint)offset, (nuint)length, MADV_POPULATE_READ) == 0;
    }

    /// <summary>Unmaps. No copy from the mapping may be under way.</summary>
    public void Dispose()
    {
        nint address = Interlocked.Exchange(ref _address, 0);
        if (address != 0 && Libc.Munmap(address, (nuint)Length) != 0)
        {
            throw LinuxException.Last("munmap");
        }
    }
}
