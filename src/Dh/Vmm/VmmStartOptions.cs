namespace Dh.Vmm;

/// <summary>How a VMM's process is started.</summary>
internal sealed class VmmStartOptions
{
    /// <summary>The run directory, which the launcher makes and removes; its parent exists.</summary>
    public required string RunDirectory { get; init; }

    /// <summary>Where the launcher and the preload library are.</summary>
    public required Installation Installation { get; init; }

    /// <summary>Whether the VMM is put into a cage, where its driver has one. Default: yes; without it a benchmark finds out what the cage costs.</summary>
    public bool Caged { get; init; } = true;

    /// <summary>The CPU weight of the VMM's cgroup, where it gets one: 1 to 10,000. Default: 100, the kernel's own.</summary>
    public int CpuWeight { get; init; } = Cgroups.DefaultCpuWeight;

    /// <summary>How long each step (start, a command, the restore of the state) may take. Default: 30 s.</summary>
    public TimeSpan StepTimeLimit { get; init; } = TimeSpan.FromSeconds(30);
}
