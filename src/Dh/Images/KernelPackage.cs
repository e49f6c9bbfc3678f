using System.Text.RegularExpressions;

namespace Dh.Images;

/// <summary>Debian's kernel for virtual machines, unpacked but not installed.</summary>
/// <param name="Version">What <c>uname -r</c> says in the guest: <c>6.1.0-56-cloud-amd64</c>.</param>
/// <param name="BzImagePath">The kernel.</param>
/// <param name="Modules">Its modules.</param>
/// <param name="Package">The package that it came from.</param>
internal sealed partial record KernelPackage(string Version, string BzImagePath, KernelModules Modules, ImagePackage Package)
{
    // It always depends on the newest linux-image-VERSION-cloud-amd64.
    private const string MetaPackage = "linux-image-cloud-" + AptSource.Architecture;

    /// <summary>
    /// What a microVM needs beyond what is built in: virtio's transport without PCI, disk, guest channel (virtio-serial), and the file systems of
    /// the root. Naming one that a kernel has built in is no mistake.
    /// </summary>
    public static IReadOnlyList<string> GuestModules { get; } =
        ["virtio_mmio", "virtio_blk", "virtio_console", "virtio_balloon", "ext4", "overlay"];

    /// <summary>What it needs besides when its guest channel is a vsock, as Firecracker's is: that, and the entropy device.</summary>
    public static IReadOnlyList<string> VsockModules { get; } = ["vmw_vsock_virtio_transport", "virtio_rng"];

    /// <summary>Downloads the suite's newest and unpacks it.</summary>
    /// <param name="archive">Where from.</param>
    /// <param name="directory">Where to.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    public static async Task<KernelPackage> FetchAsync(AptArchive archive, string directory, CancellationToken cancellationToken)
    {
        var meta = await archive.ShowAsync(MetaPackage, cancellationToken);
        string package = PackageOf(meta.GetValueOrDefault("Depends") ?? "");
        var control = await archive.ShowAsync(package, cancellationToken);
        await archive.UnpackAsync(package, directory, cancellationToken);
        string version = package["linux-image-".Length..];
        // Debian 13 puts modules below usr/.
        string modules = ((string[])["lib/modules", "usr/lib/modules"]).Select(path => Path.Combine(directory, path, version)).FirstOrDefault(Directory.Exists)
            ?? throw new DhException(DhErrorReason.Image, $"The package {package} holds no modules for {version}.");
        return new KernelPackage(
            version,
            Path.Combine(directory, "boot", "vmlinuz-" + version),
            KernelModules.Open(modules),
            new ImagePackage(package, control["Version"], control["Architecture"]));
    }

    /// <summary>The package that holds the kernel, from what the meta package depends on.</summary>
    internal static string PackageOf(string depends) => ImagePattern.Match(depends) is { Success: true } match
        ? match.Value
        : throw new DhException(DhErrorReason.Image, $"The package {MetaPackage} names no kernel; it depends on '{depends}'.");

    [GeneratedRegex(@"linux-image-[0-9][a-z0-9.+-]*")]
    private static partial Regex ImagePattern { get; }
}
