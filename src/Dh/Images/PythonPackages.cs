using System.Runtime.Versioning;
using System.Security.Cryptography;
using System.Text.RegularExpressions;

namespace Dh.Images;

/// <summary>
/// Installs Python packages into a tree, in two steps. The tree's interpreter, started from the host so that the user's network, certificates and
/// pip configuration apply, fetches the wheels; then, in the tree, pip installs just these. Wheels only: nothing that a package brings runs
/// while an image is built. pip is the suite's own, from a package that is unpacked beside the tree and never gets into it.
/// </summary>
/// <param name="tree">The tree.</param>
/// <param name="temporary">A directory for pip.</param>
[SupportedOSPlatform("linux")]
internal sealed partial class PythonPackages(RootTree tree, string temporary)
{
    /// <summary>The Debian package that holds pip as a wheel.</summary>
    public const string PipPackage = "python3-pip-whl";

    private const string LibraryDirectory = "usr/lib/x86_64-linux-gnu";
    private const string Loader = LibraryDirectory + "/ld-linux-x86-64.so.2";
    private static readonly TimeSpan DownloadLimit = TimeSpan.FromMinutes(60);

    /// <summary>Fetches and installs.</summary>
    /// <param name="requirements">In pip's notation.</param>
    /// <param name="wheelhouse">A directory that is the only source; null for the index that the user's pip is configured for.</param>
    /// <param name="onLine">Gets what pip says.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <returns>The wheels, in order.</returns>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: a requirement has no wheel there; the message names it.</exception>
    public async Task<IReadOnlyList<ImageWheel>> InstallAsync(
        IReadOnlyList<string> requirements, string? wheelhouse, Action<string> onLine, CancellationToken cancellationToken)
    {
        string pip = Directory.EnumerateFiles(Path.Combine(temporary, "usr/share/python-wheels"), "pip-*.whl").Single();
        string scratch = tree.MakeDirectory(RootTree.ScratchDirectory);
        string wheels = tree.MakeDirectory(RootTree.ScratchDirectory + "/wheels");
        File.Copy(pip, Path.Combine(scratch, "pip.whl"), overwrite: true);

        string list = Path.Combine(temporary, "requirements.txt");
        await File.WriteAllLinesAsync(list, requirements, cancellationToken);
        try
        {
            await (FetchCommand(tree.Path, pip, list, wheels, wheelhouse).With("TMPDIR", temporary) with { OnLine = onLine }).RunAsync(cancellationToken);
        }
        catch (BuildCommandException error)
        {
            string from = wheelhouse is null ? "the package index that pip is configured for (pip config list)" : $"the wheelhouse {wheelhouse}";
            string near = wheelhouse is null ? NearestVersions(error.LastLines) : LookedFor(error.LastLines, wheelhouse);
            throw new DhException(
                DhErrorReason.Image,
                $"{Culprit(error.LastLines, requirements)} cannot be had as a wheel from {from}.{near} pip's last lines:\n{BuildCommandException.Indent(error.LastLines)}",
                error);
        }

        string[] files = [.. Directory.EnumerateFiles(wheels, "*.whl").Order(StringComparer.Ordinal)];
        string[] pins = [.. files.Select(file => PinOf(Path.GetFileName(file)))];
        await InstallCommand(pins).RunAsync(cancellationToken);
        return [.. files.Select(file => new ImageWheel(Path.GetFileName(file), HashOf(file)))];
    }

    /// <summary>The requirement that pip could not satisfy, for the start of a sentence.</summary>
    internal static string Culprit(IReadOnlyList<string> lastLines, IReadOnlyList<string> requirements)
    {
        var match = lastLines.Select(line => NoMatchPattern.Match(line)).LastOrDefault(match => match.Success);
        return match is null ? $"One of the Python requirements ({string.Join(", ", requirements)})" : $"The Python requirement '{match.Groups[1].Value.Trim()}'";
    }

    /// <summary>The versions that the index has and that come closest to the one that it has not: a sentence, or nothing when pip names none.</summary>
    internal static string NearestVersions(IReadOnlyList<string> lastLines)
    {
        var match = lastLines.Select(line => VersionsPattern.Match(line)).LastOrDefault(match => match.Success);
        if (match is null)
        {
            return "";
        }

        var wanted = NumbersOf(match.Groups["wanted"].Value);
        string[] versions = [.. match.Groups["versions"].Value.Split(',', StringSplitOptions.TrimEntries).Where(version => NumbersOf(version).Count > 0).OrderBy(NumbersOf, NumbersOrder)];
        int above = versions.Count(version => NumbersOrder.Compare(NumbersOf(version), wanted) < 0);
        string[] near = versions[Math.Max(0, above - 3)..Math.Min(versions.Length, above + 3)];
        return near.Length == 0 ? "" : $" The nearest versions there: {string.Join(", ", near)}.";
    }

    /// <summary>The wheel that a wheelhouse would have to hold, and what it holds of that package: a sentence, or nothing when pip does not say what it missed.</summary>
    internal static string LookedFor(IReadOnlyList<string> lastLines, string wheelhouse)
    {
        var match = lastLines.Select(line => NoMatchPattern.Match(line)).LastOrDefault(match => match.Success);
        if (match is null)
        {
            return "";
        }

        // In a wheel's name a package's has underscores (PEP 427).
        string[] requirement = match.Groups[1].Value.Trim().Split("==");
        string package = SeparatorsPattern.Replace(requirement[0], "_").ToLowerInvariant();
        string[] there = [.. Directory.EnumerateFiles(wheelhouse, "*.whl").Select(path => Path.GetFileName(path)).Where(name => name.StartsWith(package + "-", StringComparison.OrdinalIgnoreCase)).Order(StringComparer.Ordinal)];
        return $" {package}-{(requirement.Length > 1 ? requirement[1] : "*")}-*.whl was looked for; there is {(there.Length == 0 ? "no wheel of that package" : string.Join(", ", there))}.";
    }

    private static List<int> NumbersOf(string version) =>
        [.. version.Split('.').TakeWhile(part => int.TryParse(part, System.Globalization.NumberStyles.None, null, out _)).Select(part => int.Parse(part, System.Globalization.CultureInfo.InvariantCulture))];

    private static Comparer<List<int>> NumbersOrder { get; } = Comparer<List<int>>.Create((left, right) =>
        left.Zip(right, (one, other) => one.CompareTo(other)).FirstOrDefault(order => order != 0, left.Count.CompareTo(right.Count)));

    /// <summary>Exactly the package of a wheel: its name and version stand first in the file's name (PEP 427).</summary>
    internal static string PinOf(string wheel)
    {
        string[] parts = wheel.Split('-');
        return $"{parts[0]}=={parts[1]}";
    }

    /// <summary>Fetches wheels with the tree's interpreter, which knows what runs in the tree, outside of it.</summary>
    internal static BuildCommand FetchCommand(string tree, string pip, string requirements, string target, string? wheelhouse) => BuildCommand.Of(
        Path.Combine(tree, Loader),
        [
            "--library-path", Path.Combine(tree, LibraryDirectory), Path.Combine(tree, "usr/bin/python3"), "-m", "pip",
            // A wheelhouse is all there is: neither the user's index nor another wheelhouse.
            .. wheelhouse is null ? Array.Empty<string>() : ["--isolated"],
            "--disable-pip-version-check", "--no-input", "--no-cache-dir", "download", "--progress-bar", "off", "--only-binary", ":all:",
            .. wheelhouse is null ? Array.Empty<string>() : ["--no-index", "--find-links", wheelhouse],
            "--dest", target, "--requirement", requirements,
        ])
        .With("PYTHONHOME", Path.Combine(tree, "usr")).With("PYTHONPATH", pip).With("PYTHONDONTWRITEBYTECODE", "1") with
    { WithUserEnvironment = true, Timeout = DownloadLimit };

    private static string HashOf(string file)
    {
        using var stream = File.OpenRead(file);
        return Convert.ToHexStringLower(SHA256.HashData(stream));
    }

    private BuildCommand InstallCommand(string[] pins) => tree.Python(
        [
            "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-cache-dir", "install", "--quiet", "--break-system-packages", "--no-index",
            "--no-deps", "--no-compile", "--no-warn-script-location", "--root-user-action=ignore",
            "--find-links", RootTree.ScratchDirectory + "/wheels", .. pins,
        ])
        .With("PYTHONPATH", RootTree.ScratchDirectory + "/pip.whl").With("PYTHONDONTWRITEBYTECODE", "1");

    [GeneratedRegex(@"(?:No matching distribution found for|Could not find a version that satisfies the requirement) ([^(\n]+)")]
    private static partial Regex NoMatchPattern { get; }

    [GeneratedRegex(@"satisfies the requirement [^=\n]+==(?<wanted>\S+) \(from versions: (?<versions>[^)]*)\)")]
    private static partial Regex VersionsPattern { get; }

    [GeneratedRegex("[-_.]+")]
    private static partial Regex SeparatorsPattern { get; }
}
