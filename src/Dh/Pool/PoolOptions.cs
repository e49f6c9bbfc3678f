using System.Net;
using Dh.Sandboxes;

namespace Dh.Pool;

/// <summary>What a pool keeps ready.</summary>
public sealed class PoolOptions
{
    /// <summary>The largest size.</summary>
    public const int MaxSize = 10_000;

    private int _size = 2;
    private readonly IPEndPoint? _metrics;

    /// <summary>The template of its sandboxes.</summary>
    public required string Template { get; init; }

    /// <summary>The version of their engine.</summary>
    public required string Version { get; init; }

    /// <summary>How they are restored, and in which home. Default: as <see cref="Sandbox.RestoreAsync"/> does it.</summary>
    public SandboxOptions Sandbox { get; init; } = new();

    /// <summary>How many are ready, 0 to 10,000. Default: 2.</summary>
    public int Size
    {
        get => _size;
        init
        {
            ArgumentOutOfRangeException.ThrowIfNegative(value);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(value, MaxSize);
            _size = value;
        }
    }

    /// <summary>After how much time without a run the daemon ends; null for never. Default: never.</summary>
    public TimeSpan? IdleTimeout { get; init; }

    /// <summary>Where metrics are served over HTTP, as Prometheus reads them: a loopback address with a port. Default: nowhere.</summary>
    public IPEndPoint? Metrics
    {
        get => _metrics;
        init
        {
            if (value is not null && (!IPAddress.IsLoopback(value.Address) || value.Port == 0))
            {
                throw new ArgumentException("Metrics are served on a loopback address with a port: everybody who can connect can read them.", nameof(value));
            }

            _metrics = value;
        }
    }
}
