using System.Diagnostics;
using System.Text.RegularExpressions;

namespace Dh.Vmm.Qemu;

/// <summary>The QEMU that is used.</summary>
/// <param name="Path">The program.</param>
/// <param name="Version">Its version.</param>
public sealed partial record QemuBinary(string Path, Version Version)
{
    /// <summary>The oldest version that is known to restore (docs/design.md, "The two drivers").</summary>
    public static Version Oldest { get; } = new(7, 2);

    private const string ProgramName = "qemu-system-x86_64";
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(10);

    /// <summary>The program: what <c>DH_QEMU</c> names, else the first in <c>PATH</c>.</summary>
    /// <exception cref="DhException">There is none.</exception>
    public static string FindPath()
    {
        if (Environment.GetEnvironmentVariable("DH_QEMU") is { Length: > 0 } chosen)
        {
            return File.Exists(chosen) ? chosen : throw new DhException(DhErrorReason.Host, $"DH_QEMU names {chosen}, which does not exist.");
        }

        return (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries)
            .Select(directory => System.IO.Path.Combine(directory, ProgramName))
            .FirstOrDefault(File.Exists)
            ?? throw new DhException(DhErrorReason.Host, $"QEMU is not installed: {ProgramName} is not in PATH. Run `make setup`, or `apt-get install qemu-system-x86`.");
    }

    /// <summary>Finds the program and asks for its version.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">There is none, or it is too old.</exception>
    public static async Task<QemuBinary> FindAsync(CancellationToken cancellationToken = default)
    {
        string path = FindPath();
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        using var process = Process.Start(new ProcessStartInfo(path, ["--version"]) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(limit.Token).ConfigureAwait(false);
        await process.WaitForExitAsync(limit.Token).ConfigureAwait(false);
        var match = VersionPattern().Match(output);
        if (!match.Success)
        {
            throw new DhException(DhErrorReason.Host, $"`{path} --version` says no version: \"{output.Trim()}\".");
        }

        var version = Version.Parse(match.Groups[1].Value);
        return version >= Oldest ? new QemuBinary(path, version) : throw new DhException(DhErrorReason.Host, $"QEMU {version} ({path}) is too old: {Oldest} or newer is needed.");
    }

    [GeneratedRegex(@"version (\d+\.\d+(\.\d+)?)")]
    private static partial Regex VersionPattern();
}
