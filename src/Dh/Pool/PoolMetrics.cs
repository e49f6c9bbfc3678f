using System.Globalization;
using System.Net;
using System.Text;

namespace Dh.Pool;

/// <summary>Serves a pool's numbers over HTTP in Prometheus' text format, on a loopback address.</summary>
internal sealed class PoolMetrics : IDisposable
{
    private readonly HttpListener _listener = new();

    private PoolMetrics()
    {
    }

    /// <summary>Listens.</summary>
    /// <param name="address">A loopback address with a port.</param>
    /// <param name="read">Says how it is now.</param>
    /// <returns>What serves; disposing it ends that.</returns>
    /// <exception cref="DhException">The address is taken.</exception>
    public static PoolMetrics Serve(IPEndPoint address, Func<PoolStatus> read)
    {
        var metrics = new PoolMetrics();
        try
        {
            metrics._listener.Prefixes.Add($"http://{address}/");
            metrics._listener.Start();
        }
        catch (HttpListenerException e)
        {
            metrics.Dispose();
            throw new DhException(DhErrorReason.Host, $"Listening on {address} for metrics failed: {e.Message}.", e);
        }

        _ = metrics.ServeAsync(read);
        return metrics;
    }

    /// <summary>The text.</summary>
    /// <param name="status">How it is.</param>
    internal static string Format(PoolStatus status)
    {
        string labels = $"template=\"{status.Template}\",version=\"{status.Version}\"";
        var text = new StringBuilder();
        void Add(string name, string type, string help, double value, string? quantile = null)
        {
            if (help.Length > 0)
            {
                text.Append(CultureInfo.InvariantCulture, $"# HELP dh_pool_{name} {help}\n# TYPE dh_pool_{name} {type}\n");
            }

            text.Append(CultureInfo.InvariantCulture, $"dh_pool_{name}{{{labels}{(quantile is null ? "" : $",quantile=\"{quantile}\"")}}} {value}\n");
        }

        Add("size", "gauge", "Sandboxes that are to be ready.", status.Size);
        Add("ready", "gauge", "Sandboxes that are ready.", status.Ready);
        Add("starting", "gauge", "Sandboxes that are being restored.", status.Starting);
        Add("running", "gauge", "Sandboxes that have been handed out and live.", status.Running);
        Add("waiting", "gauge", "Clients that wait for a sandbox.", status.Waiting);
        Add("restored_total", "counter", "Sandboxes that have been restored.", status.Restored);
        Add("handed_out_total", "counter", "Sandboxes that have been handed out.", status.HandedOut);
        Add("failed_total", "counter", "Restores that have failed, and machines that have ended by themselves.", status.Failed);
        Add("memory_bytes", "gauge", "What the VMMs and the daemon have resident.", status.MemoryBytes);
        Add("uptime_seconds", "gauge", "How long the daemon has run.", status.UptimeSeconds);
        if (status is { WaitP50Ms: { } median, WaitP99Ms: { } late })
        {
            Add("wait_seconds", "summary", "How long clients have waited for the last 1000 sandboxes.", median / 1000, "0.5");
            Add("wait_seconds", "summary", "", late / 1000, "0.99");
        }

        return text.ToString();
    }

    /// <summary>Ends it.</summary>
    public void Dispose() => _listener.Close();

    private async Task ServeAsync(Func<PoolStatus> read)
    {
        while (_listener.IsListening)
        {
            try
            {
                var context = await _listener.GetContextAsync().ConfigureAwait(false);
                using var response = context.Response;
                bool isKnown = context.Request is { HttpMethod: "GET", Url.AbsolutePath: "/metrics" };
                response.StatusCode = (int)(isKnown ? HttpStatusCode.OK : HttpStatusCode.NotFound);
                response.ContentType = "text/plain; version=0.0.4; charset=utf-8";
                if (isKnown)
                {
                    await response.OutputStream.WriteAsync(Encoding.UTF8.GetBytes(Format(read()))).ConfigureAwait(false);
                }
            }
            catch (Exception e) when (e is HttpListenerException or ObjectDisposedException or InvalidOperationException or IOException)
            {
                // The client has gone, or this is disposed, which the loop's condition says.
            }
        }
    }
}
