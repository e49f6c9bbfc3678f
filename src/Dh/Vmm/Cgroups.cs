using System.Globalization;

namespace Dh.Vmm;

/// <summary>
/// Where a VMM's cgroups go: cgroup v2 with its controllers, else the hierarchies of v1, else nowhere (cgroups(7)). The launcher makes and
/// removes them; what a killed launcher has left is removed by its machine's name.
/// </summary>
/// <param name="root">Where cgroups are mounted.</param>
/// <param name="ownCgroups">The text of <c>/proc/self/cgroup</c>.</param>
internal sealed class Cgroups(string root, string ownCgroups)
{
    private const string Parent = Firecracker.Jail.ParentCgroup;
    private const string Prefix = "dh-";
    private const string UnifiedWeight = "cpu.weight";
    private const string Shares = "cpu.shares";
    private const string Idle = "cpu.idle";
    private static readonly string[] Controllers = ["memory", "pids", "cpu"];

    // An initializer that fails would hide why.
    private static readonly Lazy<Cgroups> OfHost = new(() => new("/sys/fs/cgroup", File.Exists("/proc/self/cgroup") ? File.ReadAllText("/proc/self/cgroup") : ""));

    /// <summary>The kernel's own CPU weight of a cgroup. Weights count against each other, and only where processors are short: 1 to 10,000.</summary>
    public const int DefaultCpuWeight = 100;

    /// <summary>This host's.</summary>
    /// <exception cref="IOException">/proc cannot be read.</exception>
    public static Cgroups Host => OfHost.Value;

    /// <summary>The cgroups of one machine; none where there are no controllers for it. Whether this user may make them, the launcher finds out.</summary>
    /// <param name="id">The machine's name.</param>
    /// <param name="memoryBytes">All memory that its VMM may use; it has no swap.</param>
    /// <param name="maxProcesses">Its processes and threads.</param>
    /// <param name="cpuWeight">Its CPU weight.</param>
    public IReadOnlyList<Cgroup> Of(string id, long memoryBytes, int maxProcesses, int cpuWeight = DefaultCpuWeight)
    {
        string memory = memoryBytes.ToString(CultureInfo.InvariantCulture);
        string processes = maxProcesses.ToString(CultureInfo.InvariantCulture);
        if (UnifiedParent() is { } parent)
        {
            string directory = Path.Combine(parent, id);
            // Without swap accounting there is no such file; a host without swap needs none.
            (string, string)[] swap = File.Exists(Path.Combine(parent, "memory.swap.max")) ? [("memory.swap.max", "0")] : [];
            return [new Cgroup(directory, [("memory.max", memory), .. swap, ("pids.max", processes), (UnifiedWeight, Text(cpuWeight))])];
        }

        var hierarchies = Controllers.Select(controller => (Controller: controller, Directory: Hierarchy(controller))).ToList();
        return hierarchies.All(hierarchy => hierarchy.Directory is not null)
            ? [.. hierarchies.Select(hierarchy => new Cgroup(Path.Combine(hierarchy.Directory!, Prefix + id), hierarchy.Controller switch
            {
                "memory" => [("memory.limit_in_bytes", memory), ("memory.swappiness", "0")],
                "pids" => [("pids.max", processes)],
                _ => [(Shares, SharesOf(cpuWeight))],
            }))]
            : [];
    }

    /// <summary>Gives a machine another CPU weight; nothing happens where it has no cgroup (any more).</summary>
    /// <param name="id">The machine's name.</param>
    /// <param name="cpuWeight">The weight.</param>
    public void SetCpuWeight(string id, int cpuWeight) => Set(id, UnifiedWeight, Text(cpuWeight), Shares, SharesOf(cpuWeight));

    /// <summary>Lets a machine have only the processor time that nothing else on this host wants, or its weight again: whatever else wakes up takes the
    /// processor from it at once (SCHED_IDLE of sched(7), for a cgroup; Linux 5.15). Its weight cannot be changed meanwhile. Nothing happens where it has no
    /// cgroup (any more), or the kernel has no such setting.</summary>
    /// <param name="id">The machine's name.</param>
    /// <param name="isIdle">Whether it gives way.</param>
    public void SetIdle(string id, bool isIdle) => Set(id, Idle, isIdle ? "1" : "0", Idle, isIdle ? "1" : "0");

    /// <summary>Ends what is left of a machine whose launcher was killed, and removes its cgroups; nothing where there are none. A jailed Firecracker has
    /// changed its user, and so has lost its parent-death signal (prctl(2)).</summary>
    /// <param name="id">The machine's name.</param>
    /// <exception cref="IOException">It has not ended yet.</exception>
    public void EndAbandoned(string id)
    {
        foreach (string directory in (string[])[Path.Combine(root, Parent, id), .. Controllers.Select(Hierarchy).OfType<string>().Select(hierarchy => Path.Combine(hierarchy, Prefix + id))])
        {
            if (Directory.Exists(directory))
            {
                string kill = Path.Combine(directory, "cgroup.kill");
                if (File.Exists(kill))
                {
                    File.WriteAllText(kill, "1");
                }

                Directory.Delete(directory);
            }
        }
    }

    private void Set(string id, string unifiedFile, string unifiedValue, string file, string value)
    {
        string unified = Path.Combine(root, Parent, id, unifiedFile);
        string? ofHierarchy = Hierarchy("cpu") is { } hierarchy ? Path.Combine(hierarchy, Prefix + id, file) : null;
        try
        {
            if (File.Exists(unified))
            {
                File.WriteAllText(unified, unifiedValue);
            }
            else if (File.Exists(ofHierarchy))
            {
                File.WriteAllText(ofHierarchy, value);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // It has just ended, or is another user's to change; neither is a promise.
        }
    }

    private static string Text(int cpuWeight) => cpuWeight.ToString(CultureInfo.InvariantCulture);

    // Version 1 counts in other units: 1,024 for what is 100 in version 2.
    private static string SharesOf(int cpuWeight) => Text(cpuWeight * 1024 / DefaultCpuWeight);

    // A cgroup with processes in it cannot give controllers to its children (cgroups(7), "no internal processes"): hence one beside the others.
    private string? UnifiedParent()
    {
        string parent = Path.Combine(root, Parent);
        try
        {
            if (!Offers(root, "cgroup.controllers"))
            {
                return null;
            }

            Give(root);
            Directory.CreateDirectory(parent);
            Give(parent);
            return parent;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null; // not this user's to make; the cage's report says that the layer is missing
        }
    }

    private static void Give(string directory)
    {
        if (!Offers(directory, "cgroup.subtree_control"))
        {
            File.WriteAllText(Path.Combine(directory, "cgroup.subtree_control"), string.Join(' ', Controllers.Select(controller => $"+{controller}")));
        }
    }

    private static bool Offers(string directory, string file)
    {
        string path = Path.Combine(directory, file);
        return File.Exists(path) && !Controllers.Except(File.ReadAllText(path).Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries)).Any();
    }

    // Below this process's own cgroup, so that its limits hold for the VMM, too. In a container its path may be another one than is mounted.
    private string? Hierarchy(string controller)
    {
        string mounted = Path.Combine(root, controller);
        // ID:CONTROLLERS:PATH
        string? own = ownCgroups.Split('\n')
            .Select(line => line.Split(':', 3))
            .Where(fields => fields.Length == 3 && fields[1].Split(',').Contains(controller))
            .Select(fields => Path.Combine(mounted, fields[2].TrimStart('/')))
            .FirstOrDefault(Directory.Exists);
        string directory = own ?? mounted;
        return File.Exists(Path.Combine(directory, "cgroup.procs")) ? directory : null;
    }
}
