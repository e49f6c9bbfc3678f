using System.Text.Json.Serialization;

namespace Dh.Guest;

// The headers of docs/guest-protocol.md. What comes from the guest is one record whose members may all be missing.

internal sealed record GuestHeader
{
    public string? Type { get; init; }

    public int? Protocol { get; init; }

    public long? Id { get; init; }

    public string? Engine { get; init; }

    public string? EngineVersion { get; init; }

    public int? Bytes { get; init; }

    public string? Outcome { get; init; }

    public int? ExitCode { get; init; }

    public int? Signal { get; init; }

    public bool OutOfMemory { get; init; }

    public string? ResultRepr { get; init; }

    public ExecutionError? Error { get; init; }

    public bool NotRun { get; init; }

    public IReadOnlyList<TablePreview>? Tables { get; init; }

    public double RunMs { get; init; }

    public long? WallClockNs { get; init; }

    public string? Message { get; init; }
}

internal sealed record HelloHeader(string Type, int Protocol, long WallClockNs, string Hostname, string MachineId, string BootId);

internal sealed record ClockHeader(string Type, long WallClockNs);

internal sealed record ExecHeader(
    string Type, long Id, string Mode, string Filename, IReadOnlyList<string> Argv, IReadOnlyDictionary<string, string> Env, long WallClockNs, bool ShowResult, bool ShowTables);

internal sealed record StdinHeader(string Type, long Id, bool Eof);

internal sealed record CancelHeader(string Type, long Id, int GraceMs);

[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, MaxDepth = 8)]
[JsonSerializable(typeof(GuestHeader))]
[JsonSerializable(typeof(HelloHeader))]
[JsonSerializable(typeof(ClockHeader))]
[JsonSerializable(typeof(ExecHeader))]
[JsonSerializable(typeof(StdinHeader))]
[JsonSerializable(typeof(CancelHeader))]
internal sealed partial class GuestJson : JsonSerializerContext;
