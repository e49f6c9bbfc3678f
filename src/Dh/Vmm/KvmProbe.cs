using System.Text.Json;
using System.Text.Json.Serialization;
using Dh.Vmm.Qemu;

namespace Dh.Vmm;

/// <summary>Whether KVM works here.</summary>
/// <param name="Works">A guest's kernel really booted under it.</param>
/// <param name="Reason">Why not; empty when it works.</param>
public sealed record KvmVerdict(bool Works, string Reason);

/// <summary>
/// Finds out whether KVM works by booting the image's own kernel under it: on some hosts <c>/dev/kvm</c> opens, makes machines, runs
/// firmware, and still cannot run an ordinary kernel. The verdict holds for one boot of the host.
/// </summary>
public static class KvmProbe
{
    private const string DevicePath = "/dev/kvm";
    private const string Marker = "dh-probe: booted";

    // Most hosts need a second. Where the processor itself is emulated it takes longer than 10 (test/nested/run).
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(30);

    /// <summary>The verdict, from the cache or by a boot that takes at most 30 s.</summary>
    /// <param name="kernelPath">The image's kernel.</param>
    /// <param name="initrdPath">The image's initrd, whose init ends with the marker when the kernel command line says <c>dh.probe</c>.</param>
    /// <param name="cacheDirectory">Where verdicts are kept.</param>
    /// <param name="installation">Where the launcher is.</param>
    /// <param name="cancellationToken">Gives up.</param>
    public static async Task<KvmVerdict> ProbeAsync(
        string kernelPath, string initrdPath, string cacheDirectory, Installation installation, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(cacheDirectory);
        ArgumentNullException.ThrowIfNull(installation);
        if (Cached(cacheDirectory) is { } cached)
        {
            return cached;
        }

        KvmVerdict verdict;
        try
        {
            using var device = File.OpenHandle(DevicePath, FileMode.Open, FileAccess.ReadWrite);
            verdict = await BootAsync(kernelPath, initrdPath, cacheDirectory, installation, cancellationToken).ConfigureAwait(false);
        }
        catch (FileNotFoundException)
        {
            return new KvmVerdict(false, $"{DevicePath} does not exist"); // may appear when a module is loaded: not cached
        }
        catch (UnauthorizedAccessException)
        {
            return new KvmVerdict(false, $"this user may not open {DevicePath}: join its group (`kvm`)");
        }

        await File.WriteAllTextAsync(CachePath(cacheDirectory), JsonSerializer.Serialize(verdict, KvmJson.Default.KvmVerdict), cancellationToken).ConfigureAwait(false);
        return verdict;
    }

    /// <summary>The verdict of an earlier probe since the host booted; null when there was none.</summary>
    /// <param name="cacheDirectory">Where verdicts are kept.</param>
    public static KvmVerdict? Cached(string cacheDirectory)
    {
        string path = CachePath(cacheDirectory);
        try
        {
            return File.Exists(path) ? JsonSerializer.Deserialize(File.ReadAllText(path), KvmJson.Default.KvmVerdict) : null;
        }
        catch (JsonException)
        {
            return null; // half-written: probe again
        }
    }

    private static string CachePath(string directory) => Path.Combine(directory, $"kvm-{BootId.Current}.json");

    private static async Task<KvmVerdict> BootAsync(
        string kernelPath, string initrdPath, string cacheDirectory, Installation installation, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        var options = new VmmStartOptions { RunDirectory = Path.Combine(cacheDirectory, $"probe-{Guid.NewGuid():N}"), Installation = installation };
        string log = Path.Combine(options.RunDirectory, "vmm.log");
        // As the image boots: what a kernel says at length, and its search for absent serial ports, is slow where every access to a port is.
        string[] command =
        [
            QemuBinary.FindPath(), "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot",
            "-machine", "microvm,x-option-roms=off", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio",
            "-kernel", kernelPath, "-initrd", initrdPath, "-append", "console=ttyS0 quiet panic=-1 reboot=t mitigations=off 8250.nr_uarts=1 dh.probe",
        ];
        await using var process = VmmProcess.Start(options, new Dictionary<string, string>(), command, []);
        try
        {
            var exit = await process.Exited.WaitAsync(limit.Token).ConfigureAwait(false);
            string said = await File.ReadAllTextAsync(log, cancellationToken).ConfigureAwait(false);
            return said.Contains(Marker, StringComparison.Ordinal)
                ? new KvmVerdict(true, "")
                : new KvmVerdict(false, $"a guest's kernel did not boot under it ({exit}: {TailBuffer.LastLines(said, 1)})");
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            return new KvmVerdict(false, $"a guest's kernel did not boot under it within {TimeLimit.TotalSeconds:0} s");
        }
    }
}

[JsonSerializable(typeof(KvmVerdict))]
internal sealed partial class KvmJson : JsonSerializerContext;
