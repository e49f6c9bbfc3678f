using System.Diagnostics;

namespace Dh.TestSupport;

/// <summary>This process's descriptors, as /proc/self/fd lists them.</summary>
public static class OpenDescriptors
{
    /// <summary>How many are open, the one that lists them included.</summary>
    public static int Count() => Directory.EnumerateFileSystemEntries("/proc/self/fd").Count();

    /// <summary>What they are: the targets of the links, sorted.</summary>
    public static IReadOnlyList<string> Describe() =>
        [.. Directory.EnumerateFileSystemEntries("/proc/self/fd").Select(link => new FileInfo(link).LinkTarget ?? "(closed)").Order(StringComparer.Ordinal)];

    /// <summary>Waits until no more than a number of them is open: finalizers may still have some to close.</summary>
    /// <param name="most">The number that is right.</param>
    /// <param name="timeLimit">How long to wait.</param>
    /// <returns>The number in the end.</returns>
    public static async Task<int> SettleAsync(int most, TimeSpan timeLimit)
    {
        long start = Stopwatch.GetTimestamp();
        int count;
        while ((count = Count()) > most && Stopwatch.GetElapsedTime(start) < timeLimit)
        {
            GC.Collect();
            GC.WaitForPendingFinalizers();
            await Task.Delay(20);
        }

        return count;
    }
}
