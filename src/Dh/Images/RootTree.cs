using System.Runtime.Versioning;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace Dh.Images;

/// <summary>The root disk's files while they are put together: a Debian system in a directory.</summary>
/// <param name="path">The directory.</param>
/// <param name="workspace">Where commands on it run.</param>
[SupportedOSPlatform("linux")]
internal sealed class RootTree(string path, BuildNamespace workspace)
{
    /// <summary>Where the guest's files are, in the guest (guest/init.c, guest/runner.py).</summary>
    public const string GuestDirectory = "/usr/lib/dh";

    /// <summary>Gone when the image is written, like all of /run.</summary>
    public const string ScratchDirectory = "/run/dh-build";

    private const UnixFileMode FileMode = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.OtherRead;
    private const UnixFileMode DirectoryMode = FileMode | UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;
    private const string MergedUsrHooks = "/usr/share/mmdebstrap/hooks/merged-usr";

    // What differs from build to build or from host to host, and what nobody reads in a sandbox. /dev, /run, /tmp: mounted over.
    private static readonly string[] Emptied = ["dev", "run", "tmp", "var/cache", "var/log", "var/lib/apt", "var/tmp", "etc/apt/apt.conf.d", "etc/apt/sources.list.d"];

    private static readonly string[] Removed =
    [
        "etc/apt/sources.list", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "etc/resolv.conf", "var/lib/dpkg/status-old", "var/lib/dpkg/diversions-old",
        "var/lib/dpkg/statoverride-old", "var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend", "usr/share/bash-completion", "usr/share/bug",
        "usr/share/doc", "usr/share/doc-base", "usr/share/info", "usr/share/lintian", "usr/share/locale", "usr/share/man",
    ];

    /// <summary>The directory.</summary>
    public string Path { get; } = path;

    /// <summary>Installs Debian's essential packages and the template's.</summary>
    /// <param name="template">Says which.</param>
    /// <param name="archive">Says where from.</param>
    /// <param name="temporary">mmdebstrap's temporary directory.</param>
    /// <param name="onLine">Gets what mmdebstrap says.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    public async Task BootstrapAsync(Template template, AptArchive archive, string temporary, Action<string> onLine, CancellationToken cancellationToken)
    {
        var command = new BuildCommand("mmdebstrap", [.. BootstrapArguments(template, archive, Path)]) { OnLine = onLine, Timeout = TimeSpan.FromMinutes(60) };
        await workspace.Enter(command.With("SOURCE_DATE_EPOCH", $"{RootDisk.TimeSeconds}").With("TMPDIR", temporary)).RunAsync(cancellationToken);
    }

    /// <summary>Writes a file, owned by root, mode 0644, and the directories above it. A link that stands there is replaced, not followed.</summary>
    /// <param name="file">Its path in the guest.</param>
    /// <param name="content">Its bytes.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: a directory above it is a symbolic link.</exception>
    public void Write(string file, ReadOnlySpan<byte> content)
    {
        string target = MakeDirectory(System.IO.Path.GetDirectoryName(file)!) + "/" + System.IO.Path.GetFileName(file);
        File.Delete(target);
        File.WriteAllBytes(target, content);
        File.SetUnixFileMode(target, FileMode);
    }

    /// <summary>Makes a directory, owned by root, and those above it. Those that exist stay as they are.</summary>
    /// <param name="directory">Its path in the guest.</param>
    /// <param name="mode">Of directories that it makes.</param>
    /// <returns>Its path on the host.</returns>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: one is a symbolic link, which on the host would lead out of the tree.</exception>
    public string MakeDirectory(string directory, UnixFileMode mode = DirectoryMode)
    {
        string current = Path;
        foreach (string part in directory.Split('/', StringSplitOptions.RemoveEmptyEntries))
        {
            current += "/" + part;
            var info = new DirectoryInfo(current);
            if (info.LinkTarget is not null)
            {
                throw new DhException(DhErrorReason.Image, $"{current[Path.Length..]} of the root disk is a symbolic link; nothing is written through it.");
            }

            if (!info.Exists)
            {
                Directory.CreateDirectory(current);
                File.SetUnixFileMode(current, mode); // whatever the umask is
            }
        }

        return current;
    }

    /// <summary>Puts the guest's files in: runner, engines, the warm-up and the restore code, and which engine it is.</summary>
    /// <param name="template">Whose code and engine.</param>
    /// <param name="guestFiles">The runner's and the engines' files.</param>
    public void AddGuestFiles(Template template, IEnumerable<string> guestFiles)
    {
        foreach (string file in guestFiles)
        {
            Write($"{GuestDirectory}/{System.IO.Path.GetFileName(file)}", File.ReadAllBytes(file));
        }

        Write($"{GuestDirectory}/warmup.py", Encoding.UTF8.GetBytes(template.WarmupCode));
        if (template.RestoreCode.Length > 0)
        {
            Write($"{GuestDirectory}/restore.py", Encoding.UTF8.GetBytes(template.RestoreCode));
        }

        Write($"{GuestDirectory}/engine.json", JsonSerializer.SerializeToUtf8Bytes(new EngineSettings(template.Engine, template.JvmArguments), EngineJson.Default.EngineSettings));
    }

    /// <summary>The version of the tree's interpreter: <c>3.11.2</c>.</summary>
    public async Task<string> PythonVersionAsync(CancellationToken cancellationToken)
    {
        string version = await Python("-I", "-c", "import platform; print(platform.python_version())").RunAsync(cancellationToken);
        return version.Trim();
    }

    /// <summary>Compiles what Python would otherwise compile at its first import, and again in every clone.</summary>
    /// <param name="pythonVersion">The interpreter's.</param>
    /// <param name="template">Whose warm-up and restore code is compiled too.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: the warm-up code, the restore code, or a file of the guest, is not valid Python.</exception>
    public async Task CompilePythonAsync(string pythonVersion, string template, CancellationToken cancellationToken)
    {
        string library = "/usr/lib/python" + MinorVersion(pythonVersion);
        string packages = "/usr/local/lib/python" + MinorVersion(pythonVersion);

        // Compiled files hold their source's time, which the image sets to one value for all.
        await OnFilesAsync(["usr/lib", "usr/local/lib"], ["-name", "*.py", "-type", "f", "-exec", "touch", $"--date=@{RootDisk.TimeSeconds}", "{}", "+"], cancellationToken);
        await OnFilesAsync(["usr/share"], ["-type", "d", "-name", "__pycache__", "-prune", "-exec", "rm", "--recursive", "{}", "+"], cancellationToken);
        try
        {
            await Compile(GuestDirectory).RunAsync(cancellationToken);
        }
        catch (BuildCommandException error)
        {
            throw new DhException(
                DhErrorReason.Image,
                $"The warm-up code of the template '{template}' (warmup.py), its restore code (restore.py), or a file of the guest, is not valid Python {MinorVersion(pythonVersion)}:\n" +
                BuildCommandException.Indent(error.LastLines),
                error);
        }

        await Compile(library).RunAsync(cancellationToken);
        foreach (string directory in (string[])["/usr/lib/python3", packages])
        {
            try
            {
                await Compile(directory).RunAsync(cancellationToken);
            }
            catch (BuildCommandException)
            {
                // Packages ship templates and test data that are no Python of this version. Whoever imports one of those learns it then.
            }
        }
    }

    /// <summary>The tree's packages, in order.</summary>
    public async Task<IReadOnlyList<ImagePackage>> ListPackagesAsync(CancellationToken cancellationToken)
    {
        const string format = "${Package}\t${Version}\t${Architecture}\n";
        return ParsePackages(await BuildCommand.Of("dpkg-query", $"--admindir={Path}/var/lib/dpkg", "--show", $"--showformat={format}").RunAsync(cancellationToken));
    }

    /// <summary>Removes what no guest needs or no two builds have in common, and gives the system its name.</summary>
    public async Task CleanAsync(CancellationToken cancellationToken)
    {
        await OnFilesAsync(Emptied, ["-mindepth", "1", "-delete"], cancellationToken);
        await workspace.Enter(BuildCommand.Of("rm", ["--recursive", "--force", "--", .. Removed.Select(name => $"{Path}/{name}")])).RunAsync(cancellationToken);
        Write("/etc/hostname", "dh\n"u8);
        Write("/etc/hosts", "127.0.0.1 localhost dh\n::1 localhost\n"u8);
        Write("/etc/machine-id", ""u8); // machine-id(5): an image has an empty one; each clone gets its own
        MakeDirectory("/workspace");
        foreach (string mountPoint in (string[])["/dev", "/proc", "/run", "/sys"])
        {
            MakeDirectory(mountPoint);
        }

        MakeDirectory("/tmp", DirectoryMode | UnixFileMode.GroupWrite | UnixFileMode.OtherWrite | UnixFileMode.StickyBit);
    }

    /// <summary>Runs the tree's interpreter.</summary>
    public BuildCommand Python(params ReadOnlySpan<string> arguments) =>
        workspace.EnterTree(Path, "/usr/bin/python3", arguments).With("PYTHONHASHSEED", "0"); // the order of a frozenset is in compiled code

    /// <summary><c>3.11.2</c> is <c>3.11</c>.</summary>
    internal static string MinorVersion(string version) => string.Join('.', version.Split('.').Take(2));

    /// <summary>mmdebstrap(1)'s arguments.</summary>
    internal static IReadOnlyList<string> BootstrapArguments(Template template, AptArchive archive, string target)
    {
        // bookworm's init-system-helpers wants `usrmerge | usr-is-merged`. The first converts a system and drags perl in (48 MB); the second only
        // states that it is done, which the hook does beforehand. Later releases are made merged.
        bool mergeUsr = template.Suite == "bookworm";
        return
        [
            "--mode=root", "--variant=essential", "--format=directory", $"--architectures={AptSource.Architecture}",
            $"--include={string.Join(',', [.. mergeUsr ? (string[])["usr-is-merged"] : [], .. template.Packages])}",
            .. mergeUsr ? (string[])[$"--hook-dir={MergedUsrHooks}"] : [],
            "--dpkgopt=force-unsafe-io", $"--aptopt={archive.TransportPath}", template.Suite, target, archive.SourcesPath,
        ];
    }

    /// <summary>Reads dpkg-query's lines.</summary>
    internal static IReadOnlyList<ImagePackage> ParsePackages(string lines) =>
    [
        .. lines.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split('\t'))
            .Select(fields => new ImagePackage(fields[0], fields[1], fields[2])).OrderBy(package => package.Name, StringComparer.Ordinal),
    ];

    // One process: a file compiled in another order, or by another worker, can differ in what its constants share.
    private BuildCommand Compile(string directory) =>
        Python("-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "timestamp", directory);

    private async Task OnFilesAsync(IEnumerable<string> directories, string[] expression, CancellationToken cancellationToken)
    {
        string[] existing = [.. directories.Select(name => $"{Path}/{name}").Where(Directory.Exists)];
        if (existing.Length > 0)
        {
            await workspace.Enter(new BuildCommand("find", [.. existing, "-xdev", .. expression])).RunAsync(cancellationToken);
        }
    }
}

/// <summary>What the runner and the engine are told by a file of the image (guest/runner.py).</summary>
/// <param name="Engine">The engine.</param>
/// <param name="JvmArgs">Arguments for its JVM.</param>
internal sealed record EngineSettings(string Engine, IReadOnlyList<string> JvmArgs);

[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower)]
[JsonSerializable(typeof(EngineSettings))]
internal sealed partial class EngineJson : JsonSerializerContext;
