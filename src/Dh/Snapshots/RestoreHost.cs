using System.Globalization;
using Dh.Vmm;

namespace Dh.Snapshots;

/// <summary>What of this host and this build a snapshot depends on: restored on another, its guest would fail late, or go wrong silently.</summary>
/// <param name="VmmPath">The VMM's program.</param>
/// <param name="VmmVersion">Its version.</param>
/// <param name="SnapshotVersion">The version of the snapshots that the VMM reads, where they have one of their own.</param>
/// <param name="MachineHash">The hash of what this build makes the snapshot's machine of.</param>
/// <param name="TscKhz">The TSC frequency in kHz; null where it does not matter.</param>
internal sealed record RestoreHost(string VmmPath, Version VmmVersion, Version? SnapshotVersion, string MachineHash, long? TscKhz)
{
    /// <summary>
    /// How far the TSC frequency may be from the manifest's, in parts per million. Measurements in one boot agree to 1 ppm; between boots the
    /// kernel calibrates the clock that they are taken with anew, to within 500 ppm (arch/x86/kernel/tsc.c, quick_pit_calibrate), so two boots
    /// of one host differ by up to twice that. Another host's nominal frequency differs by more, and makes the guest's clock drift as much.
    /// </summary>
    public const int TscTolerancePpm = 1000;

    /// <summary>Finds out what a snapshot depends on; from caches, once it was found out.</summary>
    /// <param name="snapshot">The snapshot.</param>
    /// <param name="driver">The VMM that it was made with.</param>
    /// <param name="home">Where the caches are.</param>
    /// <param name="installation">Where the launcher is.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">The frequency could not be measured.</exception>
    public static async Task<RestoreHost> OfAsync(Snapshot snapshot, IVmmDriver driver, DhHome home, Installation installation, CancellationToken cancellationToken) => new(
        driver.ProgramPath,
        driver.Version,
        driver.SnapshotVersion,
        driver.MachineHash(snapshot.Machine),
        snapshot.Manifest.Accelerator == Accelerator.Tcg
            ? await TscFrequency.GetKhzAsync(installation, DhHome.EnsurePrivate(home.CacheDirectory), cancellationToken).ConfigureAwait(false)
            : null);

    /// <summary>Why a snapshot cannot be restored here; null when it can.</summary>
    /// <param name="manifest">The snapshot's manifest.</param>
    public string? Refuses(SnapshotManifest manifest)
    {
        if (SnapshotVersion is not null && manifest.SnapshotVersion is not null)
        {
            if (!Version.TryParse(manifest.SnapshotVersion, out var snapshotVersion) || snapshotVersion != SnapshotVersion)
            {
                return $"it was made with {manifest.Vmm} {manifest.VmmVersion}, whose snapshots have version {manifest.SnapshotVersion} (snapshot_version); {VmmPath} {VmmVersion} reads version {SnapshotVersion}";
            }
        }

        // A state without a version of its own, like that of QEMU's machine type `microvm`, is a matter between equal versions of the VMM only.
        else if (!Version.TryParse(manifest.VmmVersion, out var version) || (version.Major, version.Minor) != (VmmVersion.Major, VmmVersion.Minor))
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
