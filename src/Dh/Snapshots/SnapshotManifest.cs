using System.Buffers;
using System.IO.Hashing;
using System.Text;
using System.Text.Json;
using Dh.Vmm;

namespace Dh.Snapshots;

/// <summary>A file of a snapshot, as the manifest records it.</summary>
/// <param name="Length">Its length in bytes.</param>
/// <param name="XxHash3">XxHash3 (64 bit) of its bytes, 16 hexadecimal digits.</param>
public sealed record SnapshotFile(long Length, string XxHash3);

/// <summary>What a snapshot is, and what it needs (docs/snapshot-format.md).</summary>
public sealed record SnapshotManifest
{
    /// <summary>The schema that this build writes and reads.</summary>
    public const int CurrentSchemaVersion = 1;

    private const string NoChecksum = "0000000000000000";
    private const string Tcg = "Tcg";
    private const string Kvm = "Kvm";
    private const int MaxDepth = 3;
    private const int RequiredMembers = 18;
    private const int FileMembers = 2;

    /// <summary>The schema that it was written in.</summary>
    public required int SchemaVersion { get; init; }

    /// <summary>Its unique name, which is its directory's.</summary>
    public required string Id { get; init; }

    /// <summary>The template that its image was built from.</summary>
    public required string Template { get; init; }

    /// <summary>The hash of the image.</summary>
    public required string ImageHash { get; init; }

    /// <summary>The engine's version.</summary>
    public required string Version { get; init; }

    /// <summary>The driver: <c>qemu</c> or <c>firecracker</c>.</summary>
    public required string Vmm { get; init; }

    /// <summary>The VMM's version.</summary>
    public required string VmmVersion { get; init; }

    /// <summary>The version of the VMM's snapshots; null where they have none of their own.</summary>
    public string? SnapshotVersion { get; init; }

    /// <summary>The hash of what the VMM's machine must have in common at prepare and restore.</summary>
    public required string MachineHash { get; init; }

    /// <summary>How guest code was executed.</summary>
    public required Accelerator Accelerator { get; init; }

    /// <summary>Guest memory in MiB.</summary>
    public required int MemoryMib { get; init; }

    /// <summary>Virtual CPUs.</summary>
    public required int Cpus { get; init; }

    /// <summary>The TSC frequency of the host in kHz that the guest's kernel was told.</summary>
    public required long TscKhz { get; init; }

    /// <summary>Whether the machine has a balloon device.</summary>
    public bool Balloon { get; init; }

    /// <summary>Bytes of guest memory that are not zero.</summary>
    public required long DataBytes { get; init; }

    /// <summary>Seconds from the VMM's start until the runner was ready.</summary>
    public required double BootSeconds { get; init; }

    /// <summary>When it was taken, in UTC.</summary>
    public required DateTimeOffset CreatedAt { get; init; }

    /// <summary>The version of the guest protocol that its runner speaks.</summary>
    public required int RunnerProtocol { get; init; }

    /// <summary>The build of dh that made it.</summary>
    public required string DhVersion { get; init; }

    /// <summary>Its files by name: <c>memory</c> or <c>memory.lz4</c>, <c>state</c>, <c>root.img</c>, <c>kernel</c>, <c>initrd</c>.</summary>
    public required IReadOnlyDictionary<string, SnapshotFile> Files { get; init; }

    /// <summary>
    /// XxHash3 (64 bit) of the manifest's own bytes with zeros in place of these 16 hexadecimal digits: not a bit of it changes unseen. It proves
    /// nothing against somebody who can write the directory. Null: a manifest without one is taken as it is.
    /// </summary>
    public string? Checksum { get; init; }

    /// <summary>The manifest's bytes, with its checksum.</summary>
    internal byte[] ToJson()
    {
        var output = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(output, new JsonWriterOptions { Indented = true }))
        {
            json.WriteStartObject();
            WriteMembers(json);
            json.WriteString("checksum"u8, NoChecksum);
            json.WriteEndObject();
        }

        byte[] bytes = output.WrittenSpan.ToArray();
        Encoding.ASCII.GetBytes(HashOf(bytes), bytes.AsSpan(PositionOf(bytes, NoChecksum)));
        return bytes;
    }

    /// <summary>Reads a manifest.</summary>
    /// <param name="bytes">Its bytes.</param>
    /// <returns>The manifest; null when it is the JSON value null.</returns>
    /// <exception cref="JsonException">It is none, or is not what was written.</exception>
    internal static SnapshotManifest? Parse(byte[] bytes)
    {
        var manifest = JsonMembers.Read(bytes, MaxDepth, Of);
        if (manifest?.Checksum is { } checksum)
        {
            int position = checksum.Length == NoChecksum.Length ? PositionOf(bytes, checksum) : -1;
            byte[] without = [.. bytes];
            if (position < 0 || Encoding.ASCII.GetBytes(NoChecksum, without.AsSpan(position)) == 0 || HashOf(without) != checksum)
            {
                throw new JsonException("its checksum does not fit: it was changed");
            }
        }

        return manifest;
    }

    private void WriteMembers(Utf8JsonWriter json)
    {
        json.WriteNumber("schema_version"u8, SchemaVersion);
        json.WriteString("id"u8, Id);
        json.WriteString("template"u8, Template);
        json.WriteString("image_hash"u8, ImageHash);
        json.WriteString("version"u8, Version);
        json.WriteString("vmm"u8, Vmm);
        json.WriteString("vmm_version"u8, VmmVersion);
        json.WriteString("snapshot_version"u8, SnapshotVersion);
        json.WriteString("machine_hash"u8, MachineHash);
        json.WriteString("accelerator"u8, Accelerator == Accelerator.Kvm ? Kvm : Tcg);
        json.WriteNumber("memory_mib"u8, MemoryMib);
        json.WriteNumber("cpus"u8, Cpus);
        json.WriteNumber("tsc_khz"u8, TscKhz);
        json.WriteBoolean("balloon"u8, Balloon);
        json.WriteNumber("data_bytes"u8, DataBytes);
        json.WriteNumber("boot_seconds"u8, BootSeconds);
        json.WriteString("created_at"u8, CreatedAt);
        json.WriteNumber("runner_protocol"u8, RunnerProtocol);
        json.WriteString("dh_version"u8, DhVersion);
        json.WriteStartObject("files"u8);
        foreach (var (name, file) in Files)
        {
            json.WriteStartObject(name);
            json.WriteNumber("length"u8, file.Length);
            json.WriteString("xx_hash3"u8, file.XxHash3);
            json.WriteEndObject();
        }

        json.WriteEndObject();
    }

    private static SnapshotManifest Of(JsonElement json)
    {
        var manifest = new SnapshotManifest
        {
            SchemaVersion = json.Int32("schema_version"u8).Required("schema_version"u8),
            Id = RequiredText(json, "id"u8),
            Template = RequiredText(json, "template"u8),
            ImageHash = RequiredText(json, "image_hash"u8),
            Version = RequiredText(json, "version"u8),
            Vmm = RequiredText(json, "vmm"u8),
            VmmVersion = RequiredText(json, "vmm_version"u8),
            SnapshotVersion = json.Text("snapshot_version"u8),
            MachineHash = RequiredText(json, "machine_hash"u8),
            Accelerator = json.Text("accelerator"u8) switch { Tcg => Accelerator.Tcg, Kvm => Accelerator.Kvm, _ => throw new JsonException("`accelerator` is none") },
            MemoryMib = json.Int32("memory_mib"u8).Required("memory_mib"u8),
            Cpus = json.Int32("cpus"u8).Required("cpus"u8),
            TscKhz = json.Int64("tsc_khz"u8).Required("tsc_khz"u8),
            Balloon = json.Boolean("balloon"u8),
            DataBytes = json.Int64("data_bytes"u8).Required("data_bytes"u8),
            BootSeconds = json.Double("boot_seconds"u8).Required("boot_seconds"u8),
            CreatedAt = json.Date("created_at"u8).Required("created_at"u8),
            RunnerProtocol = json.Int32("runner_protocol"u8).Required("runner_protocol"u8),
            DhVersion = RequiredText(json, "dh_version"u8),
            Files = json.Object("files"u8, FilesOf).Required("files"u8),
            Checksum = json.Text("checksum"u8),
        };

        // All that must be there is.
        return json.GetPropertyCount() == RequiredMembers + Count(json, "snapshot_version"u8) + Count(json, "balloon"u8) + Count(json, "checksum"u8)
            ? manifest
            : throw new JsonException("it has members that this dh does not know, or one twice");
    }

    private static Dictionary<string, SnapshotFile> FilesOf(JsonElement json)
    {
        var files = new Dictionary<string, SnapshotFile>(StringComparer.Ordinal);
        foreach (var file in json.EnumerateObject())
        {
            if (file.Value.ValueKind != JsonValueKind.Object || file.Value.GetPropertyCount() != FileMembers)
            {
                throw new JsonException("`files` has a member that is no file's length and hash");
            }

            files[file.Name] = new SnapshotFile(file.Value.Int64("length"u8).Required("length"u8), RequiredText(file.Value, "xx_hash3"u8));
        }

        return files;
    }

    private static int Count(JsonElement json, ReadOnlySpan<byte> name) => json.TryGetProperty(name, out _) ? 1 : 0;

    private static string RequiredText(JsonElement json, ReadOnlySpan<byte> name) => json.Text(name).Required(name);

    private static int PositionOf(byte[] bytes, string checksum) => bytes.AsSpan().LastIndexOf(Encoding.ASCII.GetBytes(checksum));

    private static string HashOf(byte[] bytes) => Convert.ToHexStringLower(XxHash3.Hash(bytes));
}
