using System.Text.RegularExpressions;

namespace Dh.Vmm.Firecracker;

/// <summary>The Firecracker that is used.</summary>
/// <param name="Path">The program.</param>
/// <param name="Version">Its version.</param>
/// <param name="SnapshotVersion">The version of the snapshots that it writes and reads; null where it does not say.</param>
internal sealed partial record FirecrackerBinary(string Path, Version Version, Version? SnapshotVersion)
{
    /// <summary>The variable that names the program.</summary>
    public const string Variable = "DH_FIRECRACKER";

    private const string ProgramName = "firecracker";
    private const string Option = "--firecracker";

    /// <summary>The program: the chosen one, else what <c>DH_FIRECRACKER</c> names, else the first in <c>PATH</c>.</summary>
    /// <param name="chosen">A path; null for none.</param>
    /// <returns>Its absolute path; null when there is none.</returns>
    /// <exception cref="DhException">The one that is named does not exist.</exception>
    public static string? FindPath(string? chosen) => chosen is { Length: > 0 }
        ? HostProgram.Find(chosen, Option, ProgramName)
        : HostProgram.Find(Environment.GetEnvironmentVariable(Variable), Variable, ProgramName);

    /// <summary>
    /// Asks a program for its two versions, or takes them from the cache, where they are kept by the program's path, length and time of change,
    /// so that an upgrade is noticed.
    /// </summary>
    /// <param name="path">The program.</param>
    /// <param name="cacheDirectory">Where versions are kept; it exists.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">It cannot be run, or says no version.</exception>
    public static async Task<FirecrackerBinary> OfAsync(string path, string cacheDirectory, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(path);
        ArgumentNullException.ThrowIfNull(cacheDirectory);
        string cache = System.IO.Path.Combine(cacheDirectory, $"firecracker-version-{HostProgram.Identity(path)}");
        if (File.Exists(cache) && TryParse(path, await File.ReadAllLinesAsync(cache, cancellationToken).ConfigureAwait(false)) is { } known)
        {
            return known;
        }

        string[] said = [await FirstLineAsync(path, "--version", cancellationToken).ConfigureAwait(false), await FirstLineAsync(path, "--snapshot-version", cancellationToken).ConfigureAwait(false)];
        var asked = TryParse(path, said)
            ?? throw new DhException(DhErrorReason.Host, $"`{path} --version` says no version: \"{Untrusted.OneLine(said[0])}\". Name another Firecracker with {Option} or {Variable}.");
        await File.WriteAllLinesAsync(cache, said, cancellationToken).ConfigureAwait(false);
        return asked;
    }

    // The first line of each; log lines follow.
    private static FirecrackerBinary? TryParse(string path, string[] lines) =>
        lines.Length == 2 && VersionPattern().Match(lines[0]) is { Success: true } version
            ? new FirecrackerBinary(path, Version.Parse(version.Value), VersionPattern().Match(lines[1]) is { Success: true } snapshot ? Version.Parse(snapshot.Value) : null)
            : null;

    private static async Task<string> FirstLineAsync(string path, string argument, CancellationToken cancellationToken) =>
        (await HostProgram.AskAsync("Firecracker", path, argument, $"Name one that can with {Option} or {Variable}.", cancellationToken).ConfigureAwait(false)).Split('\n', 2)[0].Trim();

    [GeneratedRegex(@"\d+\.\d+\.\d+")]
    private static partial Regex VersionPattern();
}
