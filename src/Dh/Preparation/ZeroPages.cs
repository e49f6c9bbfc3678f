using Dh.Linux;

namespace Dh.Preparation;

/// <summary>Turns the pages of a memory file that are zero into holes: what is a hole is never read, copied, or kept on the disk.</summary>
internal static class ZeroPages
{
    private const int PageSize = 4096;
    private const int BufferSize = 4 << 20;

    /// <summary>Punches the holes.</summary>
    /// <param name="path">The memory file.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The bytes that are data.</returns>
    public static long Punch(string path, CancellationToken cancellationToken)
    {
        using var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite);
        long length = RandomAccess.GetLength(file), data = 0;
        byte[] buffer = new byte[BufferSize];
        foreach (var extent in SparseFile.GetDataExtents(file, length))
        {
            for (long at = extent.Offset; at < extent.End; at += BufferSize)
            {
                cancellationToken.ThrowIfCancellationRequested();
                int read = RandomAccess.Read(file, buffer.AsSpan(0, (int)Math.Min(BufferSize, extent.End - at)), at);
                int zeroFrom = -1;
                for (int page = 0; page < read; page += PageSize)
                {
                    bool isZero = buffer.AsSpan(page, Math.Min(PageSize, read - page)).IndexOfAnyExcept((byte)0) < 0;
                    data += isZero ? 0 : PageSize;
                    if (isZero && zeroFrom < 0)
                    {
                        zeroFrom = page;
                    }
                    else if (!isZero && zeroFrom >= 0)
                    {
                        SparseFile.PunchHole(file, new FileExtent(at + zeroFrom, page - zeroFrom));
                        zeroFrom = -1;
                    }
                }

                if (zeroFrom >= 0)
                {
                    SparseFile.PunchHole(file, new FileExtent(at + zeroFrom, read - zeroFrom));
                }
            }
        }

        return data;
    }
}
