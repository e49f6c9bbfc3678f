using System.Globalization;

namespace Dh.Pool;

/// <summary>How much memory may still be taken: of this host, and of the cgroup that this process is in.</summary>
internal static class HostMemory
{
    private const long KeptBytes = 256L << 20;
    private const double PressedPercent = 10;

    /// <summary>What may be taken, in bytes: what is available, without what is kept for others (256 MiB).</summary>
    public static long AvailableBytes => Math.Max(0, Math.Min(OfHost(), OfCgroup()) - KeptBytes);

    /// <summary>Whether tasks of this host wait for memory more than a tenth of the last ten seconds (pressure stall information); false where the kernel does not tell.</summary>
    public static bool IsPressed
    {
        get
        {
            try
            {
                // `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, Documentation/accounting/psi.rst
                string line = File.ReadLines("/proc/pressure/memory").FirstOrDefault("");
                return line.Split(' ', '=') is ["some", "avg10", var percent, ..]
                    && double.TryParse(percent, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double value) && value > PressedPercent;
            }
            catch (Exception e) when (e is IOException or UnauthorizedAccessException)
            {
                return false;
            }
        }
    }

    private static long OfHost()
    {
        string line = File.ReadLines("/proc/meminfo").First(line => line.StartsWith("MemAvailable:", StringComparison.Ordinal));
        return long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) << 10;
    }

    private static long OfCgroup()
    {
        // proc_pid_cgroup(5): 0::PATH is the unified hierarchy's, N:memory:PATH that of version 1.
        foreach (string line in File.ReadLines("/proc/self/cgroup"))
        {
            string path = line[(line.IndexOf(':', line.IndexOf(':', StringComparison.Ordinal) + 1) + 1)..];
            bool isUnified = line.StartsWith("0::", StringComparison.Ordinal);
            if (isUnified && Read($"/sys/fs/cgroup{path}/memory.max") is { } limit && Read($"/sys/fs/cgroup{path}/memory.current") is { } used)
            {
                return limit - used;
            }

            if (line.Contains(":memory:", StringComparison.Ordinal)
                && Read($"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes") is { } oldLimit && Read($"/sys/fs/cgroup/memory{path}/memory.usage_in_bytes") is { } oldUsed)
            {
                return oldLimit - oldUsed;
            }
        }

        return long.MaxValue;
    }

    private static long? Read(string path) =>
        File.Exists(path) && long.TryParse(File.ReadAllText(path), NumberStyles.AllowTrailingWhite, CultureInfo.InvariantCulture, out long value) ? value : null;
}
