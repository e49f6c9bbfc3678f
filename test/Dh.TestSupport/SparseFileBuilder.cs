namespace Dh.TestSupport;

/// <summary>Makes memory files for tests: random stretches of data between holes, always the same for the same seed.</summary>
public static class SparseFileBuilder
{
    private const int PageSize = 4096;

    /// <summary>Writes a sparse file.</summary>
    /// <param name="path">Where.</param>
    /// <param name="length">Its length in bytes, a multiple of 4,096.</param>
    /// <param name="seed">What it looks like.</param>
    /// <param name="maxRunPages">Data and holes alternate in runs of 1 to this many pages.</param>
    /// <param name="holes">Whether there are holes at all.</param>
    /// <returns>The path.</returns>
    public static string Write(string path, long length, int seed = 1, int maxRunPages = 300, bool holes = true)
    {
#pragma warning disable CA5394 // The same bytes in every run.
        var random = new Random(seed);
        using var file = File.OpenHandle(path, FileMode.Create, FileAccess.ReadWrite);
        RandomAccess.SetLength(file, length);
        byte[] buffer = new byte[maxRunPages * PageSize];
        bool data = random.Next(2) == 0;
        for (long at = 0; at < length; data = !data)
        {
            int run = (int)Math.Min(random.Next(1, maxRunPages + 1) * PageSize, length - at);
            if (data || !holes)
            {
                random.NextBytes(buffer.AsSpan(0, run));
                RandomAccess.Write(file, buffer.AsSpan(0, run), at);
            }

            at += run;
        }
#pragma warning restore CA5394

        return path;
    }
}
