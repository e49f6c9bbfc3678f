using System.Text.Json;

namespace Dh.Guest;

// The headers of docs/guest-protocol.md. What comes from the guest is one record whose members may all be missing.

internal sealed record GuestHeader
{
    private const int MaxDepth = 8;

    public string? Type { get; init; }

    public int? Protocol { get; init; }

    public long? Id { get; init; }

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

    /// <summary>Reads a header.</summary>
    /// <returns>Null for the JSON value null.</returns>
    /// <exception cref="JsonException">It is no object of this shape.</exception>
    public static GuestHeader? Parse(ReadOnlyMemory<byte> json) => JsonMembers.Read(json, MaxDepth, static header => new GuestHeader
    {
        Type = header.Text("type"u8),
        Protocol = header.Int32("protocol"u8),
        Id = header.Int64("id"u8),
        EngineVersion = header.Text("engine_version"u8),
        Bytes = header.Int32("bytes"u8),
        Outcome = header.Text("outcome"u8),
        ExitCode = header.Int32("exit_code"u8),
        Signal = header.Int32("signal"u8),
        OutOfMemory = header.Boolean("out_of_memory"u8),
        ResultRepr = header.Text("result_repr"u8),
        Error = header.Object("error"u8, static error =>
            new ExecutionError(error.Text("type"u8).Required("type"u8), error.Text("message"u8).Required("message"u8), error.Text("traceback"u8).Required("traceback"u8))),
        NotRun = header.Boolean("not_run"u8),
        Tables = header.Array("tables"u8, static table => new TablePreview
        {
            Name = table.Text("name"u8),
            RowCount = table.Int64("row_count"u8),
            IsRefreshing = table.Boolean("is_refreshing"u8),
            Columns = table.Array("columns"u8, static column => new TableColumn(column.Text("name"u8).Required("name"u8), column.Text("type"u8).Required("type"u8))) ?? [],
            Preview = table.Text("preview"u8),
            Error = table.Text("error"u8),
        }),
        RunMs = header.Double("run_ms"u8) ?? 0,
        WallClockNs = header.Int64("wall_clock_ns"u8),
        Message = header.Text("message"u8),
    });
}

/// <summary>The header of a frame to the guest.</summary>
internal abstract record RequestHeader(string Type)
{
    public ReadOnlyMemory<byte> ToJson() => JsonMembers.Write(json =>
    {
        json.WriteString("type"u8, Type);
        WriteMembers(json);
    });

    protected abstract void WriteMembers(Utf8JsonWriter json);
}

internal sealed record HelloHeader(int Protocol, long WallClockNs, string Hostname, string MachineId, string BootId) : RequestHeader("hello")
{
    protected override void WriteMembers(Utf8JsonWriter json)
    {
        json.WriteNumber("protocol"u8, Protocol);
        json.WriteNumber("wall_clock_ns"u8, WallClockNs);
        json.WriteString("hostname"u8, Hostname);
        json.WriteString("machine_id"u8, MachineId);
        json.WriteString("boot_id"u8, BootId);
    }
}

internal sealed record ClockHeader(long WallClockNs) : RequestHeader("clock")
{
    protected override void WriteMembers(Utf8JsonWriter json) => json.WriteNumber("wall_clock_ns"u8, WallClockNs);
}

internal sealed record ExecHeader(
    long Id, string Mode, string Filename, IReadOnlyList<string> Argv, IReadOnlyDictionary<string, string> Env, long WallClockNs, bool ShowResult, bool ShowTables, bool Last)
    : RequestHeader("exec")
{
    protected override void WriteMembers(Utf8JsonWriter json)
    {
        json.WriteNumber("id"u8, Id);
        json.WriteString("mode"u8, Mode);
        json.WriteString("filename"u8, Filename);
        json.WriteStartArray("argv"u8);
        foreach (string argument in Argv)
        {
            json.WriteStringValue(argument);
        }

        json.WriteEndArray();
        json.WriteStartObject("env"u8);
        foreach (var (name, value) in Env)
        {
            json.WriteString(name, value);
        }

        json.WriteEndObject();
        json.WriteNumber("wall_clock_ns"u8, WallClockNs);
        json.WriteBoolean("show_result"u8, ShowResult);
        json.WriteBoolean("show_tables"u8, ShowTables);
        json.WriteBoolean("last"u8, Last);
    }
}

internal sealed record StdinHeader(long Id, bool Eof) : RequestHeader("stdin")
{
    protected override void WriteMembers(Utf8JsonWriter json)
    {
        json.WriteNumber("id"u8, Id);
        json.WriteBoolean("eof"u8, Eof);
    }
}

internal sealed record CancelHeader(long Id, int GraceMs) : RequestHeader("cancel")
{
    protected override void WriteMembers(Utf8JsonWriter json)
    {
        json.WriteNumber("id"u8, Id);
        json.WriteNumber("grace_ms"u8, GraceMs);
    }
}
