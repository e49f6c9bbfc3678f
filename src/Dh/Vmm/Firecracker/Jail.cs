using System.Globalization;
using System.Security.Cryptography;
using Dh.Linux;

namespace Dh.Vmm.Firecracker;

/// <summary>What a jailed Firecracker may use of this host (cgroup v2).</summary>
/// <param name="MemoryBytes">Memory, the guest's included.</param>
/// <param name="Cpus">Processors' worth of time.</param>
/// <param name="FileBytes">The longest file that it may write; null without a limit.</param>
internal readonly record struct JailLimits(long MemoryBytes, int Cpus, long? FileBytes);

/// <summary>Firecracker's jailer, and who a jailed Firecracker is.</summary>
/// <param name="JailerPath">The jailer.</param>
/// <param name="UserId">The user and the group that Firecracker runs as: nobody else's.</param>
internal sealed record Jail(string JailerPath, uint UserId)
{
    /// <summary>The parent of the machines' cgroups.</summary>
    public const string ParentCgroup = "dh";

    /// <summary>The first of the user numbers that jails are given: a range that systemd leaves to nobody (systemd: docs/UIDS-GIDS.md).</summary>
    public const uint FirstUserId = 2_000_000_000;

    private const int UserIds = 1 << 20;
    private const string CgroupRoot = "/sys/fs/cgroup";
    private static readonly string[] Controllers = ["cpu", "memory", "pids"];

    /// <summary>A jail for one machine, with a user of its own.</summary>
    /// <param name="jailerPath">The jailer.</param>
    public static Jail Create(string jailerPath) => new(jailerPath, FirstUserId + (uint)RandomNumberGenerator.GetInt32(UserIds));

    /// <summary>Finds the jailer that was chosen, and refuses it where it cannot do its work.</summary>
    /// <param name="chosen">Its path; null for what <c>DH_JAILER</c> names.</param>
    /// <returns>Its absolute path; null when none was chosen.</returns>
    /// <exception cref="DhException">It does not exist, this user is not root, or there is no cgroup v2 with its controllers.</exception>
    public static string? Find(string? chosen)
    {
        string? path = chosen is { Length: > 0 }
            ? HostProgram.Find(chosen, "--jailer", "jailer")
            : Environment.GetEnvironmentVariable(VmmPrograms.JailerVariable) is { Length: > 0 } named ? HostProgram.Find(named, VmmPrograms.JailerVariable, "jailer") : null;
        if (path is null)
        {
            return null;
        }

        if (UnixSockets.CurrentUserId != 0)
        {
            throw new DhException(DhErrorReason.Host, $"Firecracker's jailer {path} must be started by root. Run dh as root, or without --jailer and {VmmPrograms.JailerVariable}.");
        }

        string controllers = Path.Combine(CgroupRoot, "cgroup.controllers");
        string[] there = File.Exists(controllers) ? File.ReadAllText(controllers).Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries) : [];
        string[] missing = [.. Controllers.Except(there)];
        return missing.Length == 0
            ? path
            : throw new DhException(
                DhErrorReason.Host,
                $"A jail needs cgroup v2 at {CgroupRoot} with the controllers {string.Join(", ", Controllers)}; {string.Join(", ", missing)} {(missing.Length == 1 ? "is" : "are")} missing. Boot with systemd.unified_cgroup_hierarchy=1, or run without --jailer and {VmmPrograms.JailerVariable}.");
    }

    /// <summary>The directory that is a jailed Firecracker's root, and its working directory.</summary>
    /// <param name="runDirectory">The run directory, which the jail is in.</param>
    /// <param name="firecrackerPath">The program that is jailed.</param>
    /// <param name="id">The machine's name.</param>
    public static string RootDirectory(string runDirectory, string firecrackerPath, string id) =>
        Path.Combine(runDirectory, Path.GetFileName(firecrackerPath), id, "root");

    /// <summary>The machine's cgroup, which the jailer makes and the launcher removes.</summary>
    /// <param name="id">The machine's name.</param>
    public static string CgroupDirectory(string id) => Path.Combine(CgroupRoot, ParentCgroup, id);
}

/// <summary>The jailer's arguments.</summary>
internal static class JailerCommandLine
{
    private const int MaxProcesses = 64;
    private const int MaxDescriptors = 2048;
    private const int CpuPeriodUs = 100_000;

    /// <summary>The arguments, without the program.</summary>
    /// <param name="jail">Who runs.</param>
    /// <param name="firecrackerPath">What runs.</param>
    /// <param name="id">The machine's name: letters, digits and hyphens, at most 64.</param>
    /// <param name="runDirectory">Where the jail is made.</param>
    /// <param name="limits">What it may use.</param>
    public static IReadOnlyList<string> Build(Jail jail, string firecrackerPath, string id, string runDirectory, JailLimits limits)
    {
        List<string> arguments =
        [
            "--id", id,
            "--exec-file", firecrackerPath,
            "--uid", Number(jail.UserId), "--gid", Number(jail.UserId),
            "--chroot-base-dir", runDirectory,
            "--cgroup-version", "2", "--parent-cgroup", Jail.ParentCgroup,
            "--cgroup", $"memory.max={Number(limits.MemoryBytes)}",
            "--cgroup", "memory.swap.max=0",
            "--cgroup", $"pids.max={Number(MaxProcesses)}",
            "--cgroup", $"cpu.max={Number(limits.Cpus * (long)CpuPeriodUs)} {Number(CpuPeriodUs)}",
            "--resource-limit", $"no-file={Number(MaxDescriptors)}",
        ];
        if (limits.FileBytes is { } bytes)
        {
            arguments.AddRange(["--resource-limit", $"fsize={Number(bytes)}"]);
        }

        // No --new-pid-ns: who connects to the page server is known by the number of the process that was started.
        return [.. arguments, "--", .. FirecrackerCommandLine.Build(id: null)];
    }

    private static string Number(long value) => value.ToString(CultureInfo.InvariantCulture);
}
