namespace Dh.Vmm;

/// <summary>One layer of the cage around a VMM (native/cage.h), as the launcher and the VMM have found it on this host.</summary>
/// <param name="Name">
/// <c>user</c>, <c>capabilities</c>, <c>no-new-privileges</c>, <c>pids</c>, <c>network</c>, <c>ipc</c>, <c>uts</c>, <c>root</c>, <c>limits</c>,
/// <c>cgroup</c>, <c>landlock</c>, <c>system-calls</c> or <c>late-lock</c>.
/// </param>
/// <param name="IsOn">Whether it is there.</param>
/// <param name="Reason">Why it is not: the step that failed and the kernel's answer; null when it is there.</param>
public sealed record CageLayer(string Name, bool IsOn, string? Reason)
{
    internal const string LateLock = "late-lock";
    internal const string SystemCalls = "system-calls";

    private const string NamespaceAdvice =
        "run as root, or let this user make user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container: a profile that allows clone and mount)";

    /// <summary>
    /// Whether a cage without it is incomplete. Landlock guards once more what <c>root</c> hides, and <c>limits</c> stand in for a cgroup: these
    /// two are extra.
    /// </summary>
    public bool IsRequired => Name is not ("cgroup" or "landlock");

    /// <summary>What it does, in a few words.</summary>
    public string Purpose => Name switch
    {
        "user" => "a user that nothing else on this host has",
        "capabilities" => "none",
        "no-new-privileges" => "no program gives any",
        "pids" => "no other process can be named",
        "network" => "no interface but a loopback that is down",
        "ipc" => "no shared memory or queues of others",
        "uts" => "the host's name is not seen",
        "root" => "libraries, kernel and initrd are all there is of the file system, read-only",
        "limits" => "descriptors, processes, written bytes, address space",
        "cgroup" => "memory without swap, processes, processor weight",
        "landlock" => "the same files once more",
        SystemCalls => "what a VMM needs to start",
        LateLock => "what a running machine needs, before guest code runs",
        _ => "unknown to this build",
    };

    /// <summary>How to get it; null when it is there.</summary>
    public string? Advice => IsOn ? null : Name switch
    {
        "user" when Reason?.StartsWith("permissions", StringComparison.Ordinal) == true =>
            "let others read and execute QEMU and the preload library, and read the snapshot's kernel and initrd (chmod a+rX)",
        "cgroup" => "run as root on a host with the cgroup controllers memory, pids and cpu; without them limits on the process stand in",
        "landlock" => "Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and landlock in the boot parameter lsm=",
        SystemCalls or LateLock => "a kernel with CONFIG_SECCOMP_FILTER, a container profile that allows seccomp, and a released build of the VMM",
        "no-new-privileges" or "capabilities" or "limits" => "nothing should forbid this: look at the container's profile",
        _ => NamespaceAdvice,
    };

    /// <summary>Parses what a launcher says of its layers: <c>+NAME</c>, <c>-NAME:STEP:ERRNO</c> (native/launch.c).</summary>
    /// <param name="words">The words.</param>
    internal static IReadOnlyList<CageLayer> Parse(IEnumerable<string> words) =>
        [.. words.Select(word => word.Split(':') is [var name, .. var why] && name.Length > 1
            ? new CageLayer(name[1..], name[0] == '+', name[0] == '+' ? null : string.Join(": ", why))
            : throw new DhException(DhErrorReason.Vmm, $"The launcher said `{Untrusted.OneLine(word)}` of its cage: it belongs to another version of dh. Install dh again."))];
}
