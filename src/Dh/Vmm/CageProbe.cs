using Dh.Vmm.Qemu;

namespace Dh.Vmm;

/// <summary>Finds out which layers of the cage this host grants this user, by building one around a program that does nothing.</summary>
public static class CageProbe
{
    private const string ActionsPath = "/proc/sys/kernel/seccomp/actions_avail";

    /// <summary>Builds the cage and takes it away again.</summary>
    /// <param name="home">Where the run directory is made.</param>
    /// <param name="installation">Where the launcher is; null for beside the program.</param>
    /// <exception cref="DhException">The launcher could not be started.</exception>
    public static async Task<IReadOnlyList<CageLayer>> RunAsync(DhHome home, Installation? installation = null)
    {
        ArgumentNullException.ThrowIfNull(home);
        var options = new VmmStartOptions
        {
            RunDirectory = Path.Combine(DhHome.EnsurePrivate(home.RunDirectory), Guid.NewGuid().ToString("N")),
            Installation = installation ?? Installation.Current,
        };
        await using var process = VmmProcess.Start(
            options, new Dictionary<string, string>(), [options.Installation.LauncherPath, "tsc-khz"], [], QemuCage.ForProbe(options));
        await process.Exited.ConfigureAwait(false); // by then it has joined its cgroups
        return [.. process.Cage, LateLock()];
    }

    // The VMM itself installs it, with the same system call as the launcher's list; what it does besides is to kill.
    private static CageLayer LateLock() => File.Exists(ActionsPath) && File.ReadAllText(ActionsPath).Split((char[])[' ', '\n']).Contains("kill_process")
        ? new CageLayer(CageLayer.LateLock, true, null)
        : new CageLayer(CageLayer.LateLock, false, $"{ActionsPath}: no kill_process");
}
