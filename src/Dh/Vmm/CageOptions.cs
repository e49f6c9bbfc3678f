namespace Dh.Vmm;

/// <summary>What a caged VMM may use (native/cage.h).</summary>
internal sealed record CageOptions
{
    /// <summary>Files and directories of this host that it may read; those that do not exist are left out.</summary>
    public required IReadOnlyList<string> ReadPaths { get; init; }

    /// <summary>Devices that it may open.</summary>
    public IReadOnlyList<string> Devices { get; init; } = [];

    /// <summary>Processes and threads that it may have (RLIMIT_NPROC).</summary>
    public required int MaxProcesses { get; init; }

    /// <summary>Its address space in bytes, where no cgroup limits its memory (RLIMIT_AS); null without a limit.</summary>
    public long? MaxAddressSpaceBytes { get; init; }

    /// <summary>The cgroups that are made for it.</summary>
    public IReadOnlyList<Cgroup> Cgroups { get; init; } = [];
}

/// <summary>A cgroup for one VMM, which its launcher makes and removes.</summary>
/// <param name="Directory">Its directory.</param>
/// <param name="Settings">Its files and their values.</param>
internal sealed record Cgroup(string Directory, IReadOnlyList<(string File, string Value)> Settings);
