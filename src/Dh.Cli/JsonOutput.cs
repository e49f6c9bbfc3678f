using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Serialization;
using System.Text.Json.Serialization.Metadata;
using Dh.Guest;
using Dh.Paging;
using Dh.Pool;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary>What <c>dh exec --json</c> prints. Every member is always there, except the two that say that output was cut.</summary>
internal sealed record ExecOutput
{
    public required string Outcome { get; init; }

    public required int ExitCode { get; init; }

    public string Stdout { get; init; } = "";

    [JsonIgnore(Condition = JsonIgnoreCondition.WhenWritingDefault)]
    public bool StdoutTruncated { get; init; }

    public string Stderr { get; init; } = "";

    [JsonIgnore(Condition = JsonIgnoreCondition.WhenWritingDefault)]
    public bool StderrTruncated { get; init; }

    public string? ResultRepr { get; init; }

    public ErrorOutput? Error { get; init; }

    public IReadOnlyList<TableOutput> Tables { get; init; } = [];

    public string? Version { get; init; }

    public bool VmMode { get; init; } = true;

    public string? Isolation { get; init; }

    public double ElapsedSeconds { get; init; }

    public TimingOutput? Timing { get; init; }

    public static ExecOutput Of(Exception error, TimeSpan elapsed) => new()
    {
        Outcome = "failed",
        ExitCode = (int)Failure.CodeOf(error),
        Error = new ErrorOutput(Failure.ReasonOf(error), Failure.MessageOf(error), null),
        ElapsedSeconds = JsonOutput.Seconds(elapsed),
    };

    public void WriteTo(Stream stream) => JsonOutput.Write(stream, this, JsonOutput.Default.ExecOutput);
}

/// <summary>A table that the code has assigned, or, without a name, that of its last expression.</summary>
internal sealed record TableOutput(string? Name, long? RowCount, bool IsRefreshing, IReadOnlyList<ColumnOutput>? Columns, string? Preview, string? Error)
{
    public static TableOutput Of(TablePreview table, bool withMeta) => new(
        table.Name, table.RowCount, table.IsRefreshing, withMeta ? [.. table.Columns.Select(column => new ColumnOutput(column.Name, column.Type))] : null, table.Preview, table.Error);
}

/// <summary>A column of a table.</summary>
internal sealed record ColumnOutput(string Name, string Type);

/// <summary>An exception of the code, or why <c>dh</c> failed.</summary>
internal sealed record ErrorOutput(string Type, string Message, string? Traceback);

/// <summary>Where the time went.</summary>
internal sealed record TimingOutput(double RestoreSeconds, double ExecuteSeconds, double GuestSeconds);

/// <summary>What <c>dh vm status --json</c> prints.</summary>
internal sealed record StatusOutput(IReadOnlyList<SnapshotOutput> Snapshots, IReadOnlyList<string> Damaged);

/// <summary>One snapshot.</summary>
internal sealed record SnapshotOutput(
    string Id, string Template, string Version, string Vmm, string VmmVersion, string Accelerator, int MemoryMib, int Cpus, long DataMib, string? Compressed,
    double? WorkingSetMib, long DiskMib, double BootSeconds, DateTimeOffset PreparedAt, IReadOnlyList<RestoreOutput> Restores, string Directory)
{
    private const int Restored = 10;

    public static SnapshotOutput Of(DhHome home, Snapshot snapshot) => new(
        snapshot.Manifest.Id, snapshot.Manifest.Template, snapshot.Manifest.Version, snapshot.Manifest.Vmm, snapshot.Manifest.VmmVersion,
        JsonOutput.Name(snapshot.Manifest.Accelerator), snapshot.Manifest.MemoryMib, snapshot.Manifest.Cpus, snapshot.Manifest.DataBytes >> 20, snapshot.IsCompressed ? "lz4" : null,
        new FileInfo(snapshot.WorkingSetPath) is { Exists: true, Length: var length } ? Math.Round(length / 1048576.0, 1) : null,
        snapshot.SizeOnDisk() >> 20, Math.Round(snapshot.Manifest.BootSeconds, 3), snapshot.Manifest.CreatedAt,
        [.. RestoreLog.Read(home, snapshot.Manifest.Id, Restored).Select(restore => new RestoreOutput(restore.At, restore.Policy, JsonOutput.Seconds(restore.Time)))], snapshot.Directory);
}

/// <summary>A restore of a snapshot that has been.</summary>
internal sealed record RestoreOutput(DateTimeOffset At, string Policy, double Seconds);

/// <summary>What <c>dh page-server --json</c> prints for each VMM; the outcome is <c>released</c>, <c>vmm_ended</c>, <c>stopped</c> or <c>failed</c>.</summary>
internal sealed record PageServerOutput(
    string Outcome, string? Policy, int? Regions, long? TotalBytes, long? PopulatedBytes, long? ZeroBytes, double? HandshakeSeconds, double? PopulationSeconds,
    long CopiedBytes, long ZeroedBytes, long RemovedBytes, long Faults, string? Warning, string? Error)
{
    public static PageServerOutput Of(PopulationResult? population, PageServerEnd? end, PageServerStatistics statistics, PageServerException? failure) => new(
        failure is not null ? "failed" : JsonOutput.Name(end!.Value),
        population is null ? null : JsonOutput.Name(population.Policy),
        population?.RegionCount, population?.TotalBytes, population?.CopiedBytes, population?.ZeroBytes,
        population is null ? null : JsonOutput.Seconds(population.HandshakeTime),
        population is null ? null : JsonOutput.Seconds(population.PopulationTime),
        statistics.CopiedBytes, statistics.ZeroedBytes, statistics.RemovedBytes, statistics.Faults, population?.Warning, failure?.Message);
}

/// <summary>What <c>dh vm pool status --json</c> prints.</summary>
internal sealed record PoolsOutput(IReadOnlyList<PoolStatus> Pools);

/// <summary>What <c>dh doctor --json</c> prints.</summary>
internal sealed record DoctorOutput(bool Ok, IReadOnlyList<CheckOutput> Checks);

/// <summary>One thing that was looked at.</summary>
/// <param name="Name">What.</param>
/// <param name="Ok">Whether it is as it should be.</param>
/// <param name="Required">Whether runs are impossible without it.</param>
/// <param name="Detail">What was found.</param>
/// <param name="Advice">What to do about it.</param>
internal sealed record CheckOutput(string Name, bool Ok, bool Required, string Detail, string? Advice);

/// <summary>The serializers, made at build time.</summary>
[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower)]
[JsonSerializable(typeof(ExecOutput))]
[JsonSerializable(typeof(StatusOutput))]
[JsonSerializable(typeof(DoctorOutput))]
[JsonSerializable(typeof(PoolsOutput))]
[JsonSerializable(typeof(PageServerOutput))]
internal sealed partial class JsonOutput : JsonSerializerContext
{
    // The output is for terminals and programs, not for a page: only what JSON itself demands is escaped.
    private static readonly JsonWriterOptions Readable = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    /// <summary>Writes one object and a line break.</summary>
    public static void Write<T>(Stream stream, T value, JsonTypeInfo<T> type)
    {
        using (var writer = new Utf8JsonWriter(stream, Readable))
        {
            JsonSerializer.Serialize(writer, value, type);
        }

        stream.Write("\n"u8);
    }

    public static double Seconds(TimeSpan time) => Math.Round(time.TotalSeconds, 6);

    public static string Name<T>(T value)
        where T : struct, Enum => JsonNamingPolicy.SnakeCaseLower.ConvertName(value.ToString());
}
