using System.Text.Json;
using System.Text.Json.Serialization;

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

    /// <summary>Reads a packet; null when it is no request.</summary>
    public static PoolRequest? TryParse(ReadOnlyMemory<byte> packet) => PoolJson.TryParse(packet, static json => new PoolRequest
    {
        Type = json.Text("type"u8).Required("type"u8),
        Snapshot = json.Text("snapshot"u8),
        RequireIsolation = json.Text("require_isolation"u8),
        Size = json.Int32("size"u8),
    });

    /// <summary>The packet.</summary>
    public ReadOnlyMemory<byte> ToPacket() => JsonMembers.Write(json =>
    {
        json.WriteString("type"u8, Type);
        PoolJson.WriteText(json, "snapshot"u8, Snapshot);
        PoolJson.WriteText(json, "require_isolation"u8, RequireIsolation);
        if (Size is { } size)
        {
            json.WriteNumber("size"u8, size);
        }
    });
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

    /// <summary>Reads a packet; null when it is no answer.</summary>
    public static PoolAnswer? TryParse(ReadOnlyMemory<byte> packet) => PoolJson.TryParse(packet, static json => new PoolAnswer
    {
        Type = json.Text("type"u8).Required("type"u8),
        Message = json.Text("message"u8),
        LastRequest = json.Int64("last_request"u8) ?? 0,
        MemoryPolicy = json.Text("memory_policy"u8),
        Isolation = json.Text("isolation"u8),
        Notice = json.Text("notice"u8),
        LastWords = json.Text("last_words"u8),
        Pool = json.Object("pool"u8, static pool => pool.Deserialize(PoolJson.Default.PoolStatus)!),
    });

    /// <summary>The packet.</summary>
    public ReadOnlyMemory<byte> ToPacket() => JsonMembers.Write(json =>
    {
        json.WriteString("type"u8, Type);
        PoolJson.WriteText(json, "message"u8, Message);
        json.WriteNumber("last_request"u8, LastRequest);
        PoolJson.WriteText(json, "memory_policy"u8, MemoryPolicy);
        PoolJson.WriteText(json, "isolation"u8, Isolation);
        PoolJson.WriteText(json, "notice"u8, Notice);
        PoolJson.WriteText(json, "last_words"u8, LastWords);
        if (Pool is not null)
        {
            json.WritePropertyName("pool"u8);
            JsonSerializer.Serialize(json, Pool, PoolJson.Default.PoolStatus);
        }
    });
}

[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull)]
[JsonSerializable(typeof(PoolStatus))]
internal sealed partial class PoolJson : JsonSerializerContext
{
    /// <summary>The largest packet, in bytes.</summary>
    public const int MaxPacket = 32 << 10;

    private const int MaxDepth = 4;

    /// <summary>Reads one packet.</summary>
    /// <returns>Null when it is not what it should be.</returns>
    public static T? TryParse<T>(ReadOnlyMemory<byte> packet, Func<JsonElement, T> read)
        where T : class
    {
        try
        {
            return JsonMembers.Read(packet, MaxDepth, read);
        }
        catch (JsonException)
        {
            return null;
        }
    }

    /// <summary>Writes a member that is there.</summary>
    public static void WriteText(Utf8JsonWriter json, ReadOnlySpan<byte> name, string? value)
    {
        if (value is not null)
        {
            json.WriteString(name, value);
        }
    }
}
