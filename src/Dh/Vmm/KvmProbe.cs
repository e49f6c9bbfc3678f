using System.Text.Json;
using System.Text.Json.Serialization;

namespace Dh.Vmm;

/// <summary>Whether KVM works here.</summary>
/// <param name="Works">A guest's kernel really booted under it.</param>
/// <param name="Reason">Why not; empty when it works.</param>
internal sealed record KvmVerdict(bool Works, string Reason);

/// <summary>
/// Finds out whether KVM works by booting the image's own kernel under it: on some hosts <c>/dev/kvm</c> opens, makes machines, runs
/// firmware, and still cannot run an ordinary kernel. The verdict is that of the VMM which is to run machines, and holds for one boot of the host.
/// </summary>
internal static class KvmProbe
{
    private const string DevicePath = "/dev/kvm";
    private const string Marker = "dh-probe: booted";

    // Most hosts need a second. Where the processor itself is emulated it takes longer than 10 (test/nested/run).
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(30);

    /// <summary>Why the device cannot be used, without booting anything; null when it can be opened.</summary>
    public static string? DeviceRefusal()
    {
        try
        {
            using var device = File.OpenHandle(DevicePath, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite);
            return null;
        }
        catch (FileNotFoundException)
        {
            return $"{DevicePath} does not exist";
        }
        catch (Exception e) when (e is UnauthorizedAccessException or IOException)
        {
            return $"this user may not open {DevicePath}: join its group (`kvm`)";
        }
    }

    /// <summary>The verdict, from the cache or by a boot that takes at most 30 s.</summary>
    /// <param name="driver">The VMM.</param>
    /// <param name="kernelPath">The image's kernel, in the form that the VMM boots.</param>
    /// <param name="initrdPath">The image's initrd, whose init ends with the marker when the kernel command line says <c>dh.probe</c>.</param>
    /// <param name="cacheDirectory">Where verdicts are kept.</param>
    /// <param name="installation">Where the launcher is.</param>
    /// <param name="cancellationToken">Gives up.</param>
    public static async Task<KvmVerdict> ProbeAsync(
        IVmmDriver driver, string kernelPath, string initrdPath, string cacheDirectory, Installation installation, CancellationToken cancellationToken)
    {
        if (DeviceRefusal() is { } refusal)
        {
            return new KvmVerdict(false, refusal); // may change while the host runs: not cached
        }

        if (Cached(driver.Name, cacheDirectory) is { } cached)
        {
            return cached;
        }

        var verdict = await BootAsync(driver, kernelPath, initrdPath, cacheDirectory, installation, cancellationToken).ConfigureAwait(false);
        await File.WriteAllTextAsync(CachePath(driver.Name, cacheDirectory), JsonSerializer.Serialize(verdict, KvmJson.Default.KvmVerdict), cancellationToken).ConfigureAwait(false);
        return verdict;
    }

    /// <summary>The verdict of an earlier probe since the host booted; null when there was none.</summary>
    /// <param name="vmm">The VMM's name.</param>
    /// <param name="cacheDirectory">Where verdicts are kept.</param>
    public static KvmVerdict? Cached(string vmm, string cacheDirectory)
    {
        string path = CachePath(vmm, cacheDirectory);
        try
        {
            return File.Exists(path) ? JsonSerializer.Deserialize(File.ReadAllText(path), KvmJson.Default.KvmVerdict) : null;
        }
        catch (JsonException)
        {
            return null; // half-written: probe again
        }
    }

    private static string CachePath(string vmm, string directory) => Path.Combine(directory, $"kvm-{vmm}-{BootId.Current}.json");

    private static async Task<KvmVerdict> BootAsync(
        IVmmDriver driver, string kernelPath, string initrdPath, string cacheDirectory, Installation installation, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        string name = Path.Combine(cacheDirectory, $"probe-{Guid.NewGuid():N}");
        string files = DhHome.EnsurePrivate($"{name}.files");
        try
        {
            var options = new VmmStartOptions { RunDirectory = name, Installation = installation };
            await using var process = VmmProcess.Start(options, new Dictionary<string, string>(), driver.ProbeCommand(kernelPath, initrdPath, files), []);
            var exit = await process.Exited.WaitAsync(limit.Token).ConfigureAwait(false);
            string said = await File.ReadAllTextAsync(Path.Combine(name, VmmProcess.LogName), cancellationToken).ConfigureAwait(false);
            return said.Contains(Marker, StringComparison.Ordinal)
                ? new KvmVerdict(true, "")
                : new KvmVerdict(false, $"a guest's kernel did not boot under it with {driver.Name} ({exit}: {TailBuffer.LastLines(said, 1)})");
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            return new KvmVerdict(false, $"a guest's kernel did not boot under it with {driver.Name} within {TimeLimit.TotalSeconds:0} s");
        }
        finally
        {
            Directory.Delete(files, recursive: true);
        }
    }
}

[JsonSerializable(typeof(KvmVerdict))]
internal sealed partial class KvmJson : JsonSerializerContext;
