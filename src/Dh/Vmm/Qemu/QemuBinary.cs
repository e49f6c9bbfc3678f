using System.Text.RegularExpressions;

namespace Dh.Vmm.Qemu;

/// <summary>The QEMU that is used.</summary>
/// <param name="Path">The program.</param>
/// <param name="Version">Its version.</param>
internal sealed partial record QemuBinary(string Path, Version Version)
{
    /// <summary>The oldest version that is known to restore (docs/design.md, "The two drivers").</summary>
    public static Version Oldest { get; } = new(7, 2);

    private const string ProgramName = "qemu-system-x86_64";
    private const string Variable = "DH_QEMU";

    /// <summary>The program: what <c>DH_QEMU</c> names, else the first in <c>PATH</c>.</summary>
    /// <exception cref="DhException">There is none.</exception>
    public static string FindPath() =>
        HostProgram.Find(Environment.GetEnvironmentVariable(Variable), Variable, ProgramName)
        ?? throw new DhException(DhErrorReason.Host, $"QEMU is not installed: {ProgramName} is not in PATH. Run `make setup`, or `apt-get install qemu-system-x86`.");

    /// <summary>Finds the program and asks for its version.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">There is none, it does not run, or it is too old.</exception>
    public static Task<QemuBinary> FindAsync(CancellationToken cancellationToken = default) => AskAsync(FindPath(), cancellationToken);

    /// <summary>
    /// Finds the program without starting it, once its version is known: that is kept by the program's path, length and time of change, so
    /// that an upgrade is noticed.
    /// </summary>
    /// <param name="cacheDirectory">Where versions are kept.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">There is none, or it is too old.</exception>
    internal static Task<QemuBinary> FindCachedAsync(string cacheDirectory, CancellationToken cancellationToken) =>
        FindCachedAsync(FindPath(), cacheDirectory, cancellationToken);

    /// <inheritdoc cref="FindCachedAsync(string, CancellationToken)"/>
    /// <param name="path">The program.</param>
    /// <param name="cacheDirectory">Where versions are kept.</param>
    /// <param name="cancellationToken">Gives up.</param>
    internal static async Task<QemuBinary> FindCachedAsync(string path, string cacheDirectory, CancellationToken cancellationToken)
    {
        string cache = System.IO.Path.Combine(cacheDirectory, $"qemu-version-{HostProgram.Identity(path)}");
        if (Cached(cache) is { } known)
        {
            return new QemuBinary(path, known);
        }

        var qemu = await AskAsync(path, cancellationToken).ConfigureAwait(false);
        await File.WriteAllTextAsync(cache, qemu.Version.ToString(), cancellationToken).ConfigureAwait(false);
        return qemu;
    }

    private static Version? Cached(string cache) =>
        File.Exists(cache) && Version.TryParse(File.ReadAllText(cache), out var version) && version >= Oldest ? version : null;

    private static async Task<QemuBinary> AskAsync(string path, CancellationToken cancellationToken)
    {
        string output = await HostProgram.AskAsync("QEMU", path, "--version", $"Set {Variable} to one that can.", cancellationToken).ConfigureAwait(false);
        var match = VersionPattern().Match(output);
        if (!match.Success)
        {
            throw new DhException(DhErrorReason.Host, $"`{path} --version` says no version: \"{Untrusted.OneLine(output.Trim())}\".");
        }

        var version = Version.Parse(match.Groups[1].Value);
        return version >= Oldest ? new QemuBinary(path, version) : throw new DhException(DhErrorReason.Host, $"QEMU {version} ({path}) is too old: {Oldest} or newer is needed. Install it, or set DH_QEMU to it.");
    }

    [GeneratedRegex(@"version (\d+\.\d+(\.\d+)?)")]
    private static partial Regex VersionPattern();
}
