using Dh.Pool;

namespace Dh.Tests.Pool;

public sealed class PoolMetricsTests
{
    [Fact]
    public void A_status_is_told_as_Prometheus_reads_it()
    {
        string text = PoolMetrics.Format(new PoolStatus
        {
            ProcessId = 1,
            Template = "python",
            Version = "3.11",
            Snapshot = "s",
            Size = 4,
            Ready = 3,
            Starting = 1,
            Running = 2,
            Waiting = 5,
            Restored = 10,
            HandedOut = 6,
            Failed = 1,
            WaitP50Ms = 0.5,
            WaitP99Ms = 20,
            MemoryBytes = 1024,
            UptimeSeconds = 1.5,
        });

        Assert.Contains("# TYPE dh_pool_ready gauge\ndh_pool_ready{template=\"python\",version=\"3.11\"} 3\n", text, StringComparison.Ordinal);
        Assert.Contains("# TYPE dh_pool_handed_out_total counter\ndh_pool_handed_out_total{template=\"python\",version=\"3.11\"} 6\n", text, StringComparison.Ordinal);
        Assert.Contains("dh_pool_wait_seconds{template=\"python\",version=\"3.11\",quantile=\"0.99\"} 0.02\n", text, StringComparison.Ordinal);
        Assert.Equal(11, text.Split('\n').Count(line => line.StartsWith("# HELP ", StringComparison.Ordinal)));
    }
}
