using System.Runtime.Versioning;

namespace Dh.Images;

/// <summary>One build: the steps from nothing to a finished directory. All that it makes is below <paramref name="directory"/>.</summary>
/// <param name="template">What to build.</param>
/// <param name="requirements">All Python requirements.</param>
/// <param name="hash">The identity of what goes in.</param>
/// <param name="options">Where from.</param>
/// <param name="guest">What is put into the guest.</param>
/// <param name="directory">An empty directory.</param>
/// <param name="workspace">Where commands run.</param>
/// <param name="progress">Gets the steps.</param>
[SupportedOSPlatform("linux")]
internal sealed class ImageBuild(
    Template template,
    IReadOnlyList<string> requirements,
    string hash,
    ImageBuildOptions options,
    GuestFiles guest,
    string directory,
    BuildNamespace workspace,
    IProgress<ImageProgress>? progress)
{
    /// <summary>The mode of an image's files.</summary>
    internal const UnixFileMode ReadOnlyMode = UnixFileMode.UserRead | UnixFileMode.GroupRead | UnixFileMode.OtherRead;

    private const string InterpreterPackage = "python3-minimal"; // it holds /usr/bin/python3

    // What mmdebstrap says when it begins something, and how much of the build is done then.
    private static readonly (string Line, double Fraction)[] BootstrapSteps =
    [
        ("I: running apt-get update", 0.05), ("I: downloading", 0.12), ("I: extracting", 0.18), ("I: installing essential", 0.35),
        ("I: installing remaining", 0.5), ("I: cleaning", 0.65),
    ];

    /// <summary>The finished files.</summary>
    public string OutputDirectory { get; } = Path.Combine(directory, "image");

    /// <summary>Runs all steps.</summary>
    /// <param name="createdAt">What image.json says.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <returns>The image in <see cref="OutputDirectory"/>.</returns>
    public async Task<Image> RunAsync(DateTimeOffset createdAt, CancellationToken cancellationToken)
    {
        Directory.CreateDirectory(OutputDirectory);
        Report("Debian archive", null, 0);
        var sources = options.Mirror is null ? await AptSource.OfHostAsync(template.Suite, cancellationToken) : AptSource.OfMirror(options.Mirror, template.Suite);
        var archive = await AptArchive.CreateAsync(Make("apt"), sources, cancellationToken);

        var tree = new RootTree(Path.Combine(directory, "root"), workspace);
        KernelPackage? kernel = null;
        await TogetherAsync(
            async token => await tree.BootstrapAsync(template, archive, Make("tmp"), ReportBootstrap, token),
            async token => kernel = await FetchAsync(archive, token),
            cancellationToken);

        IReadOnlyList<ImageWheel> wheels = requirements.Count == 0 ? [] : await InstallPythonAsync(tree, cancellationToken);
        Report("Python", "compiling the standard library", 0.75);
        string pythonVersion = await tree.PythonVersionAsync(cancellationToken);
        tree.AddGuestFiles(template, guest.PythonFiles);
        await tree.CompilePythonAsync(pythonVersion, template.Name, cancellationToken);

        Report("Root disk", null, 0.9);
        await tree.CleanAsync(cancellationToken);
        var packages = await tree.ListPackagesAsync(cancellationToken);
        await RootDisk.WriteAsync(tree.Path, Output(Image.RootDiskName), workspace, cancellationToken);

        Report("Kernel", kernel!.Version, 0.95);
        File.Copy(kernel.BzImagePath, Output(Image.KernelName));
        await WriteInitrdAsync(kernel.Modules, cancellationToken);

        var image = new Image
        {
            Schema = Image.CurrentSchema,
            Template = template.Name,
            Hash = hash,
            Engine = template.Engine,
            Version = template.Version ?? RootTree.MinorVersion(pythonVersion),
            PythonVersion = pythonVersion,
            KernelVersion = kernel.Version,
            Suite = template.Suite,
            CreatedAt = createdAt,
            Kernel = await Image.DescribeAsync(Output(Image.KernelName), cancellationToken),
            Initrd = await Image.DescribeAsync(Output(Image.InitrdName), cancellationToken),
            RootDisk = await Image.DescribeAsync(Output(Image.RootDiskName), cancellationToken),
            Packages = [.. packages, kernel.Package],
            Wheels = wheels,
        };
        await File.WriteAllBytesAsync(Output(Image.ManifestName), image.ToJson(), cancellationToken);
        foreach (string file in Directory.EnumerateFiles(OutputDirectory))
        {
            File.SetUnixFileMode(file, ReadOnlyMode);
        }

        return image;
    }

    /// <summary>Runs two things at once; when one fails, the other is cancelled, and the failure that came first is thrown.</summary>
    internal static async Task TogetherAsync(Func<CancellationToken, Task> first, Func<CancellationToken, Task> second, CancellationToken cancellationToken)
    {
        using var both = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        Exception? failure = null;
        await Task.WhenAll(GuardAsync(first), GuardAsync(second));
        if (failure is not null)
        {
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(failure);
        }

        async Task GuardAsync(Func<CancellationToken, Task> work)
        {
            try
            {
                await work(both.Token);
            }
            catch (Exception error)
            {
                Interlocked.CompareExchange(ref failure, error, null);
                await both.CancelAsync();
            }
        }
    }

    private async Task<KernelPackage> FetchAsync(AptArchive archive, CancellationToken cancellationToken)
    {
        await archive.UpdateAsync(cancellationToken);
        await CheckPackagesAsync(archive, cancellationToken);
        Report("Kernel", "downloading", null);
        var kernel = await KernelPackage.FetchAsync(archive, Make("kernel"), cancellationToken);
        if (requirements.Count > 0)
        {
            await archive.UnpackAsync(PythonPackages.PipPackage, Make("pip"), cancellationToken);
        }

        return kernel;
    }

    // Half a minute before mmdebstrap would come to it.
    private async Task CheckPackagesAsync(AptArchive archive, CancellationToken cancellationToken)
    {
        IReadOnlySet<string> installed;
        try
        {
            installed = await archive.SimulateInstallAsync(template.Packages, cancellationToken);
        }
        catch (BuildCommandException error)
        {
            throw new DhException(
                DhErrorReason.Image,
                $"The packages of the template '{template.Name}' cannot be installed from Debian {template.Suite}:\n{BuildCommandException.Indent(error.LastLines)}",
                error);
        }

        if (!installed.Contains(InterpreterPackage))
        {
            throw new DhException(DhErrorReason.Image, $"The packages of the template '{template.Name}' bring no /usr/bin/python3: add \"python3\" to them.");
        }
    }

    private async Task<IReadOnlyList<ImageWheel>> InstallPythonAsync(RootTree tree, CancellationToken cancellationToken)
    {
        const string step = "Python packages";
        Report(step, string.Join(", ", requirements), 0.66);
        return await new PythonPackages(tree, Make("pip")).InstallAsync(requirements, options.Wheelhouse, line => Report(step, line, null), cancellationToken);
    }

    private async Task WriteInitrdAsync(KernelModules available, CancellationToken cancellationToken)
    {
        var modules = await available.ReadInLoadOrderAsync(KernelPackage.GuestModules, cancellationToken);
        var withVsock = await available.ReadInLoadOrderAsync([.. KernelPackage.GuestModules, .. KernelPackage.VsockModules], cancellationToken);
        byte[] init = await File.ReadAllBytesAsync(guest.InitPath, cancellationToken);
        await using var stream = File.Create(Output(Image.InitrdName));
        Initrd.Write(stream, init, modules, [.. withVsock.Skip(modules.Count)]);
    }

    private void ReportBootstrap(string line)
    {
        var (text, fraction) = BootstrapSteps.FirstOrDefault(step => line.StartsWith(step.Line, StringComparison.Ordinal));
        Report("Debian packages", line.StartsWith("I: ", StringComparison.Ordinal) ? line[3..] : line, text is null ? null : fraction);
    }

    private void Report(string step, string? detail, double? fraction) => progress?.Report(new ImageProgress(step, detail, fraction));

    private string Make(string name) => Directory.CreateDirectory(Path.Combine(directory, name)).FullName;

    private string Output(string name) => Path.Combine(OutputDirectory, name);
}
