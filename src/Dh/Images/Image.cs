using System.Security.Cryptography;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace Dh.Images;

/// <summary>A package that is in an image.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Version">Its version.</param>
/// <param name="Architecture"><c>amd64</c> or <c>all</c>.</param>
public sealed record ImagePackage(string Name, string Version, string Architecture);

/// <summary>A Python wheel that is installed in an image.</summary>
/// <param name="File">Its file's name, which tells package, version and platform.</param>
/// <param name="Sha256">Its SHA-256, in hexadecimal.</param>
public sealed record ImageWheel(string File, string Sha256);

/// <summary>A file of an image.</summary>
/// <param name="Bytes">Its length in bytes.</param>
/// <param name="Sha256">Its SHA-256, in hexadecimal.</param>
public sealed record ImageFile(long Bytes, string Sha256);

/// <summary>A finished image: kernel, initrd and read-only root disk. It never changes; what differs has another directory.</summary>
public sealed record Image
{
    /// <summary>The version of image.json that this build writes and reads.</summary>
    public const int CurrentSchema = 1;

    /// <summary>The file that describes an image.</summary>
    internal const string ManifestName = "image.json";

    internal const string KernelName = "kernel";
    internal const string VmlinuxName = "vmlinux";
    internal const string InitrdName = "initrd";
    internal const string RootDiskName = "root.img";

    /// <summary>The version of image.json.</summary>
    public required int Schema { get; init; }

    /// <summary>The template's name.</summary>
    public required string Template { get; init; }

    /// <summary>SHA-256 over all that was given to the build, in hexadecimal; the directory's name has its first 16 digits.</summary>
    public required string Hash { get; init; }

    /// <summary>What runs the code: <c>python</c>.</summary>
    public required string Engine { get; init; }

    /// <summary>The template's version, or the interpreter's without its last number: <c>3.11</c>.</summary>
    public required string Version { get; init; }

    /// <summary>The interpreter's version: <c>3.11.2</c>.</summary>
    public required string PythonVersion { get; init; }

    /// <summary>The kernel's version: <c>6.1.0-56-cloud-amd64</c>.</summary>
    public required string KernelVersion { get; init; }

    /// <summary>The Debian release.</summary>
    public required string Suite { get; init; }

    /// <summary>When it was built.</summary>
    public required DateTimeOffset CreatedAt { get; init; }

    /// <summary>The kernel, a bzImage.</summary>
    public required ImageFile Kernel { get; init; }

    /// <summary>The initrd, a cpio archive with init and modules.</summary>
    public required ImageFile Initrd { get; init; }

    /// <summary>The root disk, an ext4 file system.</summary>
    public required ImageFile RootDisk { get; init; }

    /// <summary>The Debian packages of the root disk, by name, and the kernel's.</summary>
    public required IReadOnlyList<ImagePackage> Packages { get; init; }

    /// <summary>The Python wheels of the root disk.</summary>
    public required IReadOnlyList<ImageWheel> Wheels { get; init; }

    /// <summary>Where the image is.</summary>
    [JsonIgnore]
    public string Directory { get; internal init; } = "";

    /// <summary>The kernel's path.</summary>
    [JsonIgnore]
    public string KernelPath => Path.Combine(Directory, KernelName);

    /// <summary>The initrd's path.</summary>
    [JsonIgnore]
    public string InitrdPath => Path.Combine(Directory, InitrdName);

    /// <summary>The root disk's path.</summary>
    [JsonIgnore]
    public string RootDiskPath => Path.Combine(Directory, RootDiskName);

    private IEnumerable<(string Path, ImageFile File)> Files => [(KernelPath, Kernel), (InitrdPath, Initrd), (RootDiskPath, RootDisk)];

    /// <summary>Opens a finished image and checks that its files are there at their full lengths.</summary>
    /// <param name="directory">Its directory.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.NotFound"/>: there is none; <see cref="DhErrorReason.Image"/>: it is damaged, or of
    /// another version of dh.</exception>
    public static Image Open(string directory)
    {
        ArgumentException.ThrowIfNullOrEmpty(directory);
        string manifest = Path.Combine(directory, ManifestName);
        Image image;
        try
        {
            image = JsonSerializer.Deserialize(File.ReadAllBytes(manifest), ImageJson.Default.Image) is { } read
                ? read with { Directory = Path.GetFullPath(directory) }
                : throw new JsonException("null");
        }
        catch (Exception error) when (error is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new DhException(DhErrorReason.NotFound, $"There is no image in {directory}.", error);
        }
        catch (Exception error) when (error is JsonException or IOException or UnauthorizedAccessException)
        {
            throw new DhException(DhErrorReason.Image, $"{manifest} cannot be read: remove {directory} and prepare again.", error);
        }

        if (image.Schema != CurrentSchema)
        {
            throw new DhException(DhErrorReason.Image, $"{manifest} has version {image.Schema}, and this build of dh reads {CurrentSchema}: remove {directory} and prepare again.");
        }

        foreach (var (path, file) in image.Files)
        {
            var info = new FileInfo(path);
            if (!info.Exists || info.Length != file.Bytes)
            {
                string found = info.Exists ? $"has {info.Length} bytes instead of {file.Bytes}" : "is missing";
                throw new DhException(DhErrorReason.Image, $"{path} {found}: remove {directory} and prepare again.");
            }
        }

        return image;
    }

    /// <summary>Reads all files and compares their hashes: about 0.4 s for 200 MB.</summary>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: a file differs from what was built.</exception>
    public async Task VerifyAsync(CancellationToken cancellationToken = default)
    {
        foreach (var (path, file) in Files)
        {
            if (await DescribeAsync(path, cancellationToken) != file)
            {
                throw new DhException(DhErrorReason.Image, $"{path} is not what was built: remove {Directory} and prepare again.");
            }
        }
    }

    /// <summary>Length and hash of a file.</summary>
    internal static async Task<ImageFile> DescribeAsync(string path, CancellationToken cancellationToken)
    {
        await using var stream = File.OpenRead(path);
        byte[] hash = await SHA256.HashDataAsync(stream, cancellationToken);
        return new ImageFile(stream.Length, Convert.ToHexStringLower(hash));
    }

    /// <summary>image.json.</summary>
    internal byte[] ToJson() => [.. JsonSerializer.SerializeToUtf8Bytes(this, ImageJson.Readable.Image), (byte)'\n'];
}

[JsonSourceGenerationOptions(WriteIndented = true, PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, RespectNullableAnnotations = true)]
[JsonSerializable(typeof(Image))]
internal sealed partial class ImageJson : JsonSerializerContext
{
    /// <summary>Writes <c>+</c> as <c>+</c>: the file is for people and programs, not for a web page.</summary>
    public static ImageJson Readable =>
        field ??= new(new JsonSerializerOptions(Default.GeneratedSerializerOptions!) { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping });
}
