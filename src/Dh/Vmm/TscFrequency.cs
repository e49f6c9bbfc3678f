using System.Diagnostics;
using System.Globalization;

namespace Dh.Vmm;

/// <summary>
/// The host's TSC frequency. Under TCG the guest's TSC is the host's, and a kernel that is not told its frequency calibrates it against an
/// emulated timer, which hangs one boot in five; told a wrong one, its clock drifts. So it is measured, once per boot of the host.
/// </summary>
internal static class TscFrequency
{
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(10);

    /// <summary>The frequency in kHz.</summary>
    /// <param name="installation">Where the launcher is, which measures it.</param>
    /// <param name="cacheDirectory">Where it is kept.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">It could not be measured.</exception>
    public static async Task<long> GetKhzAsync(Installation installation, string cacheDirectory, CancellationToken cancellationToken)
    {
        string cache = Path.Combine(cacheDirectory, $"tsc-khz-{BootId.Current}");
        if (Cached(cache) is { } cached)
        {
            return cached;
        }

        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        using var process = Process.Start(new ProcessStartInfo(installation.LauncherPath, ["tsc-khz"]) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(limit.Token).ConfigureAwait(false);
        await process.WaitForExitAsync(limit.Token).ConfigureAwait(false);
        if (process.ExitCode != 0 || !TryParse(output, out long measured))
        {
            throw new DhException(DhErrorReason.Host, $"`{installation.LauncherPath} tsc-khz` ended with {process.ExitCode} and said \"{output.Trim()}\".");
        }

        await File.WriteAllTextAsync(cache, output, cancellationToken).ConfigureAwait(false);
        return measured;
    }

    private static long? Cached(string cache) => File.Exists(cache) && TryParse(File.ReadAllText(cache), out long khz) ? khz : null;

    private static bool TryParse(string text, out long khz) => long.TryParse(text.AsSpan().Trim(), NumberStyles.None, CultureInfo.InvariantCulture, out khz) && khz > 0;
}

/// <summary>What names one boot of this host: a verdict about the host holds as long.</summary>
internal static class BootId
{
    // An initializer that fails would hide why.
    private static readonly Lazy<string> Read = new(() => File.ReadAllText("/proc/sys/kernel/random/boot_id").Trim());

    /// <summary>The kernel's boot id (random(4)).</summary>
    /// <exception cref="IOException">/proc cannot be read.</exception>
    public static string Current => Read.Value;
}
