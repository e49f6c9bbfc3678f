using Dh.Linux;

namespace Dh.Paging;

/// <summary>Where the contents of guest memory come from.</summary>
public interface IMemorySource : IDisposable
{
    /// <summary>The file, for messages.</summary>
    string Path { get; }

    /// <summary>Bytes of guest memory.</summary>
    long Length { get; }

    /// <summary>What holds data, in order; the rest is zero and is never read.</summary>
    IReadOnlyList<FileExtent> DataExtents { get; }

    /// <summary>The working set: what <see cref="PopulationPolicy.Prefetch"/> places before the machine resumes, in the order in which it is read fastest. Empty when there is none.</summary>
    IReadOnlyList<FileExtent> PrefetchExtents { get; }

    /// <summary>Opens a way to the contents for one thread, which disposes it before the source is disposed.</summary>
    IMemoryReader OpenReader();

    /// <summary>Brings what will be needed first near, piece by piece, until all is there or <paramref name="enough"/> says to stop. An aid only.</summary>
    /// <param name="enough">Asked before every piece.</param>
    void ReadAhead(Func<bool> enough);

    /// <summary>Called when the working set is placed: what is kept near for it may go. It stays readable. An aid only.</summary>
    void EndPopulation()
    {
    }
}

/// <summary>One thread's way to the contents of guest memory.</summary>
public interface IMemoryReader : IDisposable
{
    /// <summary>Whether an address stays good as long as the reader, and not only until the next call.</summary>
    bool IsMapped { get; }

    /// <summary>
    /// The address in this process of bytes that the kernel can copy from, good until the next call. Bytes of a mapped file may vanish when
    /// the file is truncated: the copy then fails.
    /// </summary>
    /// <param name="offset">Offset in guest memory, page-aligned.</param>
    /// <param name="length">In: bytes that are wanted, whole pages. Out: bytes that are there in one piece: all, or at least 2 MiB, the largest page.</param>
    /// <exception cref="PageServerException">The contents cannot be read; the message names the file.</exception>
    nuint Read(long offset, ref ulong length);
}

internal static class MemoryReaders
{
    /// <summary>Reads; what a damaged working set does not have comes from the memory file.</summary>
    /// <param name="reader">The reader.</param>
    /// <param name="offset">See <see cref="IMemoryReader.Read"/>.</param>
    /// <param name="length">See <see cref="IMemoryReader.Read"/>.</param>
    /// <param name="warning">Set to what is wrong with the working set, unless it is set already.</param>
    /// <exception cref="PageServerException">The memory file cannot be read.</exception>
    public static nuint ReadUndamaged(this IMemoryReader reader, long offset, ref ulong length, ref string? warning)
    {
        ulong wanted = length;
        try
        {
            return reader.Read(offset, ref length);
        }
        catch (PageServerException e) when (e.WorkingSetDamaged)
        {
            Interlocked.CompareExchange(ref warning, e.Message, null);
            length = wanted;
            return reader.Read(offset, ref length);
        }
    }
}
