using System.Runtime.InteropServices;
using System.Runtime.Versioning;
using Dh.Linux;

namespace Dh.Images;

/// <summary>
/// Builds images, each once: a template's image has the hash of all that goes into it in its name, and one that exists is used as it is.
/// A build works in a directory beside, which becomes the image by a rename; whatever ends it, the images that exist stay as they are.
/// </summary>
/// <param name="options">Where, and from what.</param>
/// <param name="clock">What image.json's time comes from; null: the system's.</param>
public sealed class ImageBuilder(ImageBuildOptions options, TimeProvider? clock = null)
{
    private const string BuildPrefix = ".build-";
    private const string LockName = ".lock";
    private const int DirectoryHashDigits = 16;
    private const int QuotaExceeded = 122; // EDQUOT, asm-generic/errno.h
    private static readonly TimeSpan LockLimit = TimeSpan.FromHours(1);

    [SupportedOSPlatformGuard("linux")]
    private static bool IsHost => OperatingSystem.IsLinux() && RuntimeInformation.OSArchitecture == Architecture.X64;

    /// <summary>The image of a template, if it is built.</summary>
    /// <param name="template">The template.</param>
    /// <returns>Null when it is not, or is damaged.</returns>
    /// <exception cref="DhException">The template or the installation is wrong; see <see cref="BuildAsync"/>.</exception>
    public Image? Find(Template template)
    {
        ArgumentNullException.ThrowIfNull(template);
        return TryOpen(DirectoryOf(template, HashOf(template, Requirements(template), GuestFiles.Find(options.GuestDirectory))));
    }

    /// <summary>The image of a template; it is built when there is none. One build runs at a time, in all processes; others wait.</summary>
    /// <param name="template">The template.</param>
    /// <param name="progress">Gets what is done, from any thread; null: nobody does.</param>
    /// <param name="cancellationToken">Ends the build and removes what it made.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: a program, a right, a Debian source or space is missing on this host;
    /// <see cref="DhErrorReason.NotFound"/>: there is no such wheelhouse;
    /// <see cref="DhErrorReason.Image"/>: the template asks for what cannot be had, or a step failed.</exception>
    /// <exception cref="OperationCanceledException">Cancelled.</exception>
    public async Task<Image> BuildAsync(Template template, IProgress<ImageProgress>? progress = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(template);
        if (!IsHost)
        {
            throw new DhException(DhErrorReason.Host, "Images are built on x86-64 Linux only.");
        }

        return await ExplainAsync(
            $"The image of '{template.Name}' could not be built", FindOrBuildAsync(template, progress, cancellationToken));
    }

    /// <summary>The ELF kernel of an image (<c>vmlinux</c>), which Firecracker boots. It is unpacked from the image's bzImage when first asked
    /// for (about a second), and then stays beside it.</summary>
    /// <param name="image">A finished image in this builder's directory.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The file's path.</returns>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: the kernel is damaged, or no bzImage, or compressed in a way that is not
    /// known here; <see cref="DhErrorReason.Host"/>: a program or space is missing on this host.</exception>
    /// <exception cref="OperationCanceledException">Cancelled.</exception>
    public async Task<string> UnpackKernelAsync(Image image, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(image);
        if (!IsHost)
        {
            throw new DhException(DhErrorReason.Host, "Images are built on x86-64 Linux only.");
        }

        return await ExplainAsync($"The kernel {image.KernelPath} could not be unpacked", FindOrUnpackAsync(image, cancellationToken));
    }

    private async Task<T> ExplainAsync<T>(string failure, Task<T> work)
    {
        try
        {
            return await work;
        }
        catch (Exception error) when (IsFull(error))
        {
            throw new DhException(
                DhErrorReason.Host,
                $"{failure}: the file system of {options.ImagesDirectory} was full " +
                $"({new DriveInfo(options.ImagesDirectory).AvailableFreeSpace} bytes are free now that what was made is removed). Free some space there, or set DH_HOME to a directory on another file system.",
                error);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new DhException(DhErrorReason.Host, $"{failure} in {options.ImagesDirectory}: a file could not be read or written.", error);
        }
    }

    private static Image? TryOpen(string directory)
    {
        try
        {
            return Image.Open(directory);
        }
        catch (DhException)
        {
            return null; // none, or a damaged one, in whose place a new one is put
        }
    }

    // Files before the rename, directory after it: after a power cut the image is whole or not there.
    private static void Publish(string finished, string directory, string discarded)
    {
        foreach (string file in Directory.EnumerateFiles(finished))
        {
            Files.Sync(file);
        }

        Files.Sync(finished);
        if (Directory.Exists(directory))
        {
            Directory.Move(directory, discarded);
        }

        Directory.Move(finished, directory);
        Files.Sync(Path.GetDirectoryName(directory)!);
    }

    private static bool IsFull(Exception error) =>
        error is IOException { HResult: (int)Errno.ENOSPC or QuotaExceeded } ||
        (error is BuildCommandException command && command.LastLines.Any(line =>
            line.Contains("No space left on device", StringComparison.Ordinal) || line.Contains("Disk quota exceeded", StringComparison.Ordinal) ||
            line.Contains("enough free space", StringComparison.Ordinal))) ||
        (error.InnerException is { } inner && IsFull(inner));

    [SupportedOSPlatform("linux")]
    private async Task<Image> FindOrBuildAsync(Template template, IProgress<ImageProgress>? progress, CancellationToken cancellationToken)
    {
        var requirements = Requirements(template);
        var guest = GuestFiles.Find(options.GuestDirectory);
        string hash = HashOf(template, requirements, guest);
        string directory = DirectoryOf(template, hash);
        if (TryOpen(directory) is { } existing)
        {
            return existing;
        }

        Directory.CreateDirectory(options.ImagesDirectory);
        using var held = await LockAsync(progress, cancellationToken);
        if (TryOpen(directory) is { } builtMeanwhile)
        {
            return builtMeanwhile;
        }

        var workspace = await BuildNamespace.OpenAsync(cancellationToken);
        await RemoveLeftoversAsync(workspace);
        string work = Path.Combine(options.ImagesDirectory, BuildPrefix + Guid.NewGuid().ToString("N"));
        Directory.CreateDirectory(work);
        try
        {
            var build = new ImageBuild(template, requirements, hash, options, guest, work, workspace, progress);
            var image = await build.RunAsync((clock ?? TimeProvider.System).GetUtcNow(), cancellationToken);
            Publish(build.OutputDirectory, directory, Path.Combine(work, "damaged"));
            progress?.Report(new ImageProgress("Image", directory, 1));
            return image with { Directory = directory };
        }
        finally
        {
            await workspace.RemoveAsync(work);
        }
    }

    [SupportedOSPlatform("linux")]
    private async Task<string> FindOrUnpackAsync(Image image, CancellationToken cancellationToken)
    {
        string vmlinux = Path.Combine(image.Directory, Image.VmlinuxName);
        var kernel = await BzImage.ReadAsync(image.KernelPath, cancellationToken);
        using var held = await LockAsync(null, cancellationToken);
        if (!File.Exists(vmlinux) || new FileInfo(vmlinux).Length != kernel.ElfBytes)
        {
            string part = vmlinux + ".part";
            await kernel.UnpackAsync(part, cancellationToken);
            File.SetUnixFileMode(part, ImageBuild.ReadOnlyMode);
            Files.Sync(part);
            File.Move(part, vmlinux, overwrite: true);
        }

        return vmlinux;
    }

    private List<string> Requirements(Template template) => [.. template.ResolveRequirements(), .. options.ExtraRequirements];

    private string HashOf(Template template, IReadOnlyList<string> requirements, GuestFiles guest)
    {
        if (options.Wheelhouse is { } wheelhouse && !Directory.Exists(wheelhouse))
        {
            throw new DhException(DhErrorReason.NotFound, $"There is no wheelhouse {wheelhouse}.");
        }

        return ImageHash.Compute(template, requirements, guest, options.Wheelhouse);
    }

    private string DirectoryOf(Template template, string hash) => Path.Combine(options.ImagesDirectory, $"{template.Name}-{hash[..DirectoryHashDigits]}");

    private async Task<FileLock> LockAsync(IProgress<ImageProgress>? progress, CancellationToken cancellationToken)
    {
        string path = Path.Combine(options.ImagesDirectory, LockName);
        try
        {
            return await FileLock.AcquireAsync(
                path, shared: false, LockLimit, () => progress?.Report(new ImageProgress("Image", "waiting for another build", null)), cancellationToken);
        }
        catch (TimeoutException error)
        {
            throw new DhException(DhErrorReason.Host, $"Another build of an image holds {path} for more than {LockLimit.TotalHours:0} hour.", error);
        }
    }

    // Who holds the lock is the only builder: every other build's directory is a dead one's.
    private async Task RemoveLeftoversAsync(BuildNamespace workspace)
    {
        foreach (string directory in Directory.EnumerateDirectories(options.ImagesDirectory, BuildPrefix + "*"))
        {
            try
            {
                await workspace.RemoveAsync(directory);
            }
            catch (BuildCommandException)
            {
                // A command of a build that was killed may still be writing there; the next build tries again.
            }
        }
    }
}
