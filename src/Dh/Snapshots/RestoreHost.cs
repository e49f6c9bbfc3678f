using System.Globalization;
using Dh.Vmm;
using Dh.Vmm.Qemu;

namespace Dh.Snapshots;

/// <summary>What of this host and this build a snapshot depends on: restored on another, its guest would fail late, or go wrong silently.</summary>
/// <param name="VmmPath">The VMM's program.</param>
/// <param name="VmmVersion">Its version.</param>
/// <param name="MachineHash">The hash of the command line that this build gives the snapshot's machine.</param>
/// <param name="TscKhz">The TSC frequency in kHz; null where it does not matter.</param>
internal sealed record RestoreHost(string VmmPath, Version VmmVersion, string MachineHash, long? TscKhz)
{
    /// <summary>
    /// How far the TSC frequency may be from the manifest's, in parts per million. Measurements in one boot agree to 1 ppm; between boots the
    /// kernel calibrates the clock that they are taken with anew, to within 500 ppm (arch/x86/kernel/tsc.c, quick_pit_calibrate), so two boots
    /// of one host differ by up to twice that. Another host's nominal frequency differs by more, and makes the guest's clock drift as much.
    /// </summary>
    public const int TscTolerancePpm = 1000;

    /// <summary>Finds out what a snapshot depends on; from caches, once it was found out.</summary>
    /// <param name="snapshot">The snapshot.</param>
    /// <param name="home">Where the caches are.</param>
    /// <param name="installation">Where the launcher is.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">There is no VMM that can be used, or the frequency could not be measured.</exception>
    public static async Task<RestoreHost> OfAsync(Snapshot snapshot, DhHome home, Installation installation, CancellationToken cancellationToken)
    {
        string cache = DhHome.EnsurePrivate(home.CacheDirectory);
        var qemu = await QemuBinary.FindCachedAsync(cache, cancellationToken).ConfigureAwait(false);
        return new RestoreHost(
            qemu.Path,
            qemu.Version,
            QemuCommandLine.MachineHash(snapshot.Machine),
            snapshot.Manifest.Accelerator == Accelerator.Tcg ? await TscFrequency.GetKhzAsync(installation, cache, cancellationToken).ConfigureAwait(false) : null);
    }

    /// <summary>Why a snapshot cannot be restored here; null when it can.</summary>
    /// <param name="manifest">The snapshot's manifest.</param>
    public string? Refuses(SnapshotManifest manifest)
    {
        // The state of the machine type `microvm`, which has no versions, is a matter between equal versions of QEMU only.
        if (!Version.TryParse(manifest.VmmVersion, out var version) || (version.Major, version.Minor) != (VmmVersion.Major, VmmVersion.Minor))
        {
            return $"it was made with {manifest.Vmm} {manifest.VmmVersion} (vmm_version), {VmmPath} is {VmmVersion}";
        }

        if (manifest.MachineHash != MachineHash)
        {
            return $"it was made for the machine {manifest.MachineHash} (machine_hash, by dh {manifest.DhVersion}), this dh makes {MachineHash}";
        }

        // Under TCG the guest's TSC is the host's, and the guest's kernel was told its frequency.
        return TscKhz is { } khz && Math.Abs(khz - manifest.TscKhz) > manifest.TscKhz / 1e6 * TscTolerancePpm
            ? string.Create(CultureInfo.InvariantCulture, $"it was made on a host with a TSC of {manifest.TscKhz} kHz (tsc_khz), this host's has {khz} kHz")
            : null;
    }

    /// <summary>Refuses a snapshot that cannot be restored here.</summary>
    /// <param name="snapshot">The snapshot.</param>
    /// <exception cref="DhException">It cannot; the message names the manifest's value and the host's.</exception>
    public void Require(Snapshot snapshot)
    {
        if (Refuses(snapshot.Manifest) is { } why)
        {
            throw new DhException(
                DhErrorReason.Snapshot, $"Snapshot {snapshot.Directory} does not fit this host: {why}. Run `dh vm prepare --force` to make a new snapshot.");
        }
    }
}
