using System.Globalization;
using Dh.Paging;

namespace Dh.Benchmarks;

/// <summary>What serving costs this process beside time.</summary>
/// <param name="Faults">Faults that were served while allocations were counted.</param>
/// <param name="AllocatedBytes">What the whole process allocated meanwhile.</param>
/// <param name="IdleWakeups">How often the page server's threads were put on a CPU in 2 s in which nobody touched a page.</param>
/// <param name="IdleNanoseconds">For how long.</param>
internal sealed record ServingCost(long Faults, long AllocatedBytes, long IdleWakeups, long IdleNanoseconds)
{
    /// <summary>
    /// Serves the first half of a trace page by page, so that all code has run, then counts over the second half, during which this thread
    /// only waits. An allocation for each fault would be 24 bytes for each at the least.
    /// </summary>
    public static async Task<ServingCost> MeasureAsync(Func<(ReplayClient Client, IMemorySource Source)> open, GuestTrace trace)
    {
        var (client, source) = open();
        using (client)
        {
            await using var server = PageServer.Start(client.Connection, source, new PageServerOptions { Policy = PopulationPolicy.Lazy, BlockSize = (int)GuestRegion.NormalPageSize });
            _ = client.Map();
            _ = await server.WaitPopulatedAsync();
            _ = client.Replay(trace.DataPages / 2);
            GC.Collect();
            GC.WaitForPendingFinalizers();
            long faults = server.Statistics.Faults;
            client.SendReplay(trace.DataPages - (trace.DataPages / 2));
            long allocated = GC.GetTotalAllocatedBytes(precise: true);
            client.WaitForAnswer();
            allocated = GC.GetTotalAllocatedBytes(precise: true) - allocated;
            faults = server.Statistics.Faults - faults;
            _ = client.ReceiveReplay();

            var before = ScheduledThreads();
            await Task.Delay(TimeSpan.FromSeconds(2));
            var after = ScheduledThreads();
            return new ServingCost(faults, allocated, after.Times - before.Times, after.Nanoseconds - before.Nanoseconds);
        }
    }

    /// <summary>What the kernel has counted of the page server's threads: nanoseconds on a CPU, and how many times (schedstat of proc(5)).</summary>
    private static (long Nanoseconds, long Times) ScheduledThreads()
    {
        long nanoseconds = 0, times = 0;
        foreach (string task in Directory.EnumerateDirectories("/proc/self/task").Where(task => File.ReadAllText($"{task}/comm").StartsWith("dh page", StringComparison.Ordinal)))
        {
            string[] counts = File.ReadAllText($"{task}/schedstat").Split(' ');
            nanoseconds += long.Parse(counts[0], CultureInfo.InvariantCulture);
            times += long.Parse(counts[2], CultureInfo.InvariantCulture);
        }

        return times > 0 ? (nanoseconds, times) : throw new InvalidOperationException("The page server has no thread.");
    }
}
