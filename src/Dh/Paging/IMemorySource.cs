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

    /// <summary>The address in this process of bytes that the kernel can copy from. They may vanish when the file is truncated: the copy then fails.</summary>
    /// <param name="offset">Offset in guest memory.</param>
    /// <param name="length">Bytes.</param>
    nuint Locate(long offset, long length);

    /// <summary>Brings data near, piece by piece, until all is there or <paramref name="enough"/> says to stop. An aid only.</summary>
    /// <param name="enough">Asked before every piece.</param>
    void ReadAhead(Func<bool> enough);
}
