using System.Text.Json;
using System.Text.Json.Serialization;
using System.Text.Json.Serialization.Metadata;

namespace Dh.Pool;

// One JSON object per packet of a SOCK_SEQPACKET socket. A client sends one request, and its end of file gives back what it has been given.

/// <summary>What a client wants.</summary>
internal sealed record PoolRequest
{
    /// <summary>A sandbox; answered by <c>queued</c> while none is ready, then by <c>sandbox</c> or <c>refused</c>.</summary>
    public const string Take = "take";

    /// <summary>What the pool does; answered by <c>status</c>.</summary>
    public const string Status = "status";

    /// <summary>Another size; answered by <c>done</c> or <c>refused</c>.</summary>
    public const string Scale = "scale";

    /// <summary>The end of the daemon; answered by <c>done</c>, and by end of file when nothing is left.</summary>
    public const string Stop = "stop";

    public required string Type { get; init; }

    /// <summary>With take: the snapshot that the sandbox must be of.</summary>
    public string? Snapshot { get; init; }

    /// <summary>With take: the least isolation that will do, by name.</summary>
    public string? RequireIsolation { get; init; }

    /// <summary>With scale: how many sandboxes are to be ready.</summary>
    public int? Size { get; init; }
}

/// <summary>What the daemon says.</summary>
internal sealed record PoolAnswer
{
    /// <summary>None is ready, and the client is in the queue; said again as long as that is so.</summary>
    public const string Queued = "queued";

    /// <summary>A sandbox; its guest channel comes with the packet.</summary>
    public const string Sandbox = "sandbox";

    /// <summary>There will be none, and why.</summary>
    public const string Refused = "refused";

    /// <summary>The sandbox that was handed out has ended by itself.</summary>
    public const string Ended = "ended";

    public const string Status = "status";

    public const string Done = "done";

    public required string Type { get; init; }

    /// <summary>Why not, or how it ended.</summary>
    public string? Message { get; init; }

    /// <summary>With sandbox: what has been asked of the guest so far.</summary>
    public long LastRequest { get; init; }

    public string? MemoryPolicy { get; init; }

    public string? Isolation { get; init; }

    public string? Notice { get; init; }

    /// <summary>With ended: the VMM's last words.</summary>
    public string? LastWords { get; init; }

    public PoolStatus? Pool { get; init; }
}

[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull, MaxDepth = 4)]
[JsonSerializable(typeof(PoolRequest))]
[JsonSerializable(typeof(PoolAnswer))]
internal sealed partial class PoolJson : JsonSerializerContext
{
    /// <summary>The largest packet, in bytes.</summary>
    public const int MaxPacket = 32 << 10;

    /// <summary>Reads one packet.</summary>
    /// <returns>Null when it is not what it should be.</returns>
    public static T? TryParse<T>(ReadOnlySpan<byte> packet, JsonTypeInfo<T> type)
        where T : class
    {
        try
        {
            return JsonSerializer.Deserialize(packet, type);
        }
        catch (JsonException)
        {
            return null;
        }
    }
}
