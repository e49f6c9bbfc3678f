using System.IO.Hashing;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;
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
        byte[] bytes = JsonSerializer.SerializeToUtf8Bytes(this with { Checksum = NoChecksum }, SnapshotJson.Default.SnapshotManifest);
        Encoding.ASCII.GetBytes(HashOf(bytes), bytes.AsSpan(PositionOf(bytes, NoChecksum)));
        return bytes;
    }

    /// <summary>Reads a manifest.</summary>
    /// <param name="bytes">Its bytes.</param>
    /// <returns>The manifest; null when it is the JSON value null.</returns>
    /// <exception cref="JsonException">It is none, or is not what was written.</exception>
    internal static SnapshotManifest? Parse(byte[] bytes)
    {
        var manifest = JsonSerializer.Deserialize(bytes, SnapshotJson.Default.SnapshotManifest);
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

    private static int PositionOf(byte[] bytes, string checksum) => bytes.AsSpan().LastIndexOf(Encoding.ASCII.GetBytes(checksum));

    private static string HashOf(byte[] bytes) => Convert.ToHexStringLower(XxHash3.Hash(bytes));
}

[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, WriteIndented = true, UseStringEnumConverter = true, RespectNullableAnnotations = true, UnmappedMemberHandling = JsonUnmappedMemberHandling.Disallow)]
[JsonSerializable(typeof(SnapshotManifest))]
internal sealed partial class SnapshotJson : JsonSerializerContext;
