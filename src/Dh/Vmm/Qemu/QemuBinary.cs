using System.ComponentModel;
using System.Diagnostics;
using System.Globalization;
using System.IO.Hashing;
using System.Text;
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
            return File.Exists(chosen) ? System.IO.Path.GetFullPath(chosen) : throw new DhException(DhErrorReason.Host, $"DH_QEMU names {chosen}, which does not exist.");
        }

        return (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries)
            .Select(directory => System.IO.Path.GetFullPath(ProgramName, System.IO.Path.GetFullPath(directory)))
            .FirstOrDefault(File.Exists)
            ?? throw new DhException(DhErrorReason.Host, $"QEMU is not installed: {ProgramName} is not in PATH. Run `make setup`, or `apt-get install qemu-system-x86`.");
    }

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
        string cache = System.IO.Path.Combine(cacheDirectory, $"qemu-version-{Identity(path)}");
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

    private static string Identity(string path)
    {
        // By descriptor: the program, and not a link to it, is what changes.
        using var program = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
        string identity = string.Create(CultureInfo.InvariantCulture, $"{path}\n{RandomAccess.GetLength(program)}\n{File.GetLastWriteTimeUtc(program).Ticks}");
        return Convert.ToHexStringLower(XxHash128.Hash(Encoding.UTF8.GetBytes(identity)));
    }

    private static async Task<QemuBinary> AskAsync(string path, CancellationToken cancellationToken)
    {
        string output = await ReadVersionAsync(path, cancellationToken).ConfigureAwait(false);
        var match = VersionPattern().Match(output);
        if (!match.Success)
        {
            throw new DhException(DhErrorReason.Host, $"`{path} --version` says no version: \"{Untrusted.OneLine(output.Trim())}\".");
        }

        var version = Version.Parse(match.Groups[1].Value);
        return version >= Oldest ? new QemuBinary(path, version) : throw new DhException(DhErrorReason.Host, $"QEMU {version} ({path}) is too old: {Oldest} or newer is needed. Install it, or set DH_QEMU to it.");
    }

    private static async Task<string> ReadVersionAsync(string path, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        Process? process = null;
        try
        {
            process = Process.Start(new ProcessStartInfo(path, ["--version"]) { RedirectStandardOutput = true, RedirectStandardError = true })!;
            var error = process.StandardError.ReadToEndAsync(limit.Token);
            string output = await process.StandardOutput.ReadToEndAsync(limit.Token).ConfigureAwait(false) + await error.ConfigureAwait(false);
            await process.WaitForExitAsync(limit.Token).ConfigureAwait(false);
            return output;
        }
        catch (Win32Exception e)
        {
            throw new DhException(DhErrorReason.Host, $"QEMU {path} cannot be run. Set DH_QEMU to one that can.", e);
        }
        catch (OperationCanceledException e) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.Host, $"`{path} --version` did not end within {TimeLimit.TotalSeconds:0} s. Set DH_QEMU to another QEMU.", e);
        }
        finally
        {
            if (process is { HasExited: false })
            {
                process.Kill();
            }

            process?.Dispose();
        }
    }

    [GeneratedRegex(@"version (\d+\.\d+(\.\d+)?)")]
    private static partial Regex VersionPattern();
}
