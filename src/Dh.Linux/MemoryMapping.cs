using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>
/// Memory that the kernel copies from (mmap(2)): a shared read-only mapping of a whole file, or a buffer. The bytes of a file are never
/// handed out as a span: when the file is truncated under the mapping, a read by this process is a SIGBUS, while a read by the kernel is an
/// EFAULT.
/// </summary>
public sealed class MemoryMapping : IDisposable
{
    private readonly bool _isBuffer;
    private nint _address;

    private MemoryMapping(nint address, long length, bool isBuffer)
    {
        _address = address;
        _isBuffer = isBuffer;
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
        return address != -1 ? new MemoryMapping(address, length, isBuffer: false) : throw LinuxException.Last($"mmap of {length} bytes");
    }

    /// <summary>Makes a buffer of zeros, which takes memory only where it is written.</summary>
    /// <param name="length">Bytes, positive and at most 2 GiB - 1; rounded up to whole pages by the kernel.</param>
    /// <exception cref="LinuxException">The kernel refuses.</exception>
    public static MemoryMapping Buffer(int length)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        nint address = Libc.MmapAnonymous(0, (nuint)length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return address != -1 ? new MemoryMapping(address, length, isBuffer: true) : throw LinuxException.Last($"mmap of {length} bytes");
    }

    /// <summary>The bytes of a buffer; not to be used after <see cref="Dispose"/>.</summary>
    /// <exception cref="InvalidOperationException">This maps a file.</exception>
    public unsafe Span<byte> Span => _isBuffer
        // SAFETY: Length bytes are mapped readable and writable at Address, by this object alone, until it is disposed.
        ? new Span<byte>((void*)Address, (int)Length)
        : throw new InvalidOperationException("The bytes of a mapped file may vanish: they are for the kernel only.");

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

    /// <summary>
    /// Takes the pages of a mapped file out of the page tables, in which each would have to be found again when the mapping or the process ends; a
    /// touch maps a page again (MADV_DONTNEED). An aid only.
    /// </summary>
    /// <exception cref="InvalidOperationException">This is a buffer.</exception>
    public void Depopulate() => _ = _isBuffer
        ? throw new InvalidOperationException("The pages of a buffer are its contents.")
        : Libc.Madvise((nint)Address, (nuint)Length, MADV_DONTNEED);

    /// <summary>
    /// Has the kernel read a range of some mapping into the page cache, in one go and no more than that (MADV_WILLNEED): the read-around of a
    /// page fault may be megabytes. An aid only; costs nothing where there is no file behind the address, little where all is in the cache.
    /// </summary>
    /// <param name="address">Start, page-aligned.</param>
    /// <param name="length">Bytes.</param>
    public static void ReadAhead(nuint address, ulong length) => _ = Libc.Madvise((nint)address, (nuint)length, MADV_WILLNEED);

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
