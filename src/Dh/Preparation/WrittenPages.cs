using System.Buffers.Binary;
using System.Globalization;

namespace Dh.Preparation;

/// <summary>
/// Which pages of a private mapping of the memory file a process has written: those that are no pages of the file any more
/// (/proc/PID/pagemap; Documentation/admin-guide/mm/pagemap.rst in the kernel's sources).
/// </summary>
internal static class WrittenPages
{
    private const int PageSize = 4096;
    private const ulong Present = 1UL << 63;
    private const ulong Swapped = 1UL << 62;
    private const ulong OfFile = 1UL << 61;

    /// <summary>Finds them.</summary>
    /// <param name="pid">The process.</param>
    /// <param name="memoryPath">The memory file.</param>
    /// <returns>Their offsets in the file, in order.</returns>
    /// <exception cref="IOException">The process is gone, or belongs to somebody else.</exception>
    public static List<long> Of(int pid, string memoryPath)
    {
        var pages = new List<long>();
        // The directory's own name tells one snapshot's memory file from all others, whatever links led there. In a jail it has another path.
        string name = Path.Combine(Path.GetFileName(Path.GetDirectoryName(memoryPath))!, Path.GetFileName(memoryPath));
        string inode = InodeOf(memoryPath);
        using var pagemap = File.OpenHandle($"/proc/{pid}/pagemap");
        byte[] entries = new byte[sizeof(ulong) * 4096];
        foreach (string line in File.ReadLines($"/proc/{pid}/maps"))
        {
            // START-END PERMISSIONS OFFSET DEVICE INODE PATH
            string[] fields = line.Split(' ', 6, StringSplitOptions.RemoveEmptyEntries);
            if (fields.Length < 6 || !(fields[5].EndsWith(name, StringComparison.Ordinal) || (fields[4] == inode && fields[5].EndsWith(Path.GetFileName(memoryPath), StringComparison.Ordinal))))
            {
                continue;
            }

            string[] range = fields[0].Split('-');
            long start = Hexadecimal(range[0]), end = Hexadecimal(range[1]), offset = Hexadecimal(fields[2]);
            for (long page = start / PageSize; page < end / PageSize;)
            {
                int wanted = (int)Math.Min(entries.Length, ((end / PageSize) - page) * sizeof(ulong));
                int read = RandomAccess.Read(pagemap, entries.AsSpan(0, wanted), page * sizeof(ulong)) / sizeof(ulong);
                if (read == 0)
                {
                    throw new EndOfStreamException($"/proc/{pid}/pagemap ends before page {page}.");
                }

                for (int i = 0; i < read; i++)
                {
                    ulong entry = BinaryPrimitives.ReadUInt64LittleEndian(entries.AsSpan(i * sizeof(ulong)));
                    if ((entry & Swapped) != 0 || (entry & (Present | OfFile)) == Present)
                    {
                        pages.Add(offset + ((page + i) * PageSize) - start);
                    }
                }

                page += read;
            }
        }

        return pages;
    }

    // proc_pid_fdinfo(5), Linux 5.14; before that only the path tells.
    private static string InodeOf(string path)
    {
        const string key = "ino:";
        using var file = File.OpenHandle(path);
        string? line = File.ReadLines($"/proc/self/fdinfo/{file.DangerousGetHandle()}").FirstOrDefault(line => line.StartsWith(key, StringComparison.Ordinal));
        return line?[key.Length..].Trim() ?? "";
    }

    private static long Hexadecimal(string text) => long.Parse(text, NumberStyles.HexNumber, CultureInfo.InvariantCulture);
}
