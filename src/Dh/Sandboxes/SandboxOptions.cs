using Dh.Vmm;

namespace Dh.Sandboxes;

/// <summary>How guest memory comes back.</summary>
public enum MemoryPolicy
{
    /// <summary>The page server copies all data pages before the machine resumes, then releases the memory.</summary>
    Eager,

    /// <summary>
    /// The page server copies the recorded working set before the machine resumes, and serves what else is touched as long as the guest
    /// lives.
    /// </summary>
    Prefetch,

    /// <summary>The page server copies nothing before the machine resumes, and serves what is touched.</summary>
    Lazy,

    /// <summary>The VMM's process maps the memory file privately; no page server, no userfaultfd. Not for compressed snapshots.</summary>
    File,
}

/// <summary>How a sandbox is restored; what is not set has the default that is documented here.</summary>
public sealed class SandboxOptions
{
    private TimeSpan _restoreTimeLimit = TimeSpan.FromSeconds(30);

    /// <summary>
    /// How guest memory comes back. Default: prefetch where the snapshot has a working set, else eager; file, with a notice, where this host
    /// grants no userfaultfd.
    /// </summary>
    public MemoryPolicy? MemoryPolicy { get; init; }

    /// <summary>
    /// Whether the page server copies what prefetch or lazy leave out in the background, and then ends. Default: no; a filled guest takes as
    /// much memory as its snapshot has data.
    /// </summary>
    public bool Fill { get; init; }

    /// <summary>Whether the pages that the guest touches are recorded.</summary>
    internal bool Record { get; init; }

    /// <summary>Whether the VMM is put into a cage. Without it a benchmark finds out what the cage costs.</summary>
    internal bool Caged { get; init; } = true;

    /// <summary>The CPU weight of the machine as long as it is restored, where it has a cgroup (<see cref="Sandbox.SetCpuWeight"/>).</summary>
    internal int CpuWeight { get; private set; } = Cgroups.DefaultCpuWeight;

    /// <summary>The least isolation that will do; the restore fails below it, before any code runs. Default: any.</summary>
    public IsolationClass? RequireIsolation { get; init; }

    /// <summary>Which programs machines are run with. Default: what the environment says.</summary>
    public VmmPrograms Programs { get; init; } = VmmPrograms.Default;

    /// <summary>Where run directories are made. Default: <see cref="DhHome.Default"/>.</summary>
    public DhHome Home { get; init; } = DhHome.Default;

    /// <summary>Where the native pieces are. Default: beside the program.</summary>
    public Installation Installation { get; init; } = Installation.Current;

    /// <summary>How long each step of the restore may take, up to an hour. Default: 30 s.</summary>
    public TimeSpan RestoreTimeLimit
    {
        get => _restoreTimeLimit;
        init
        {
            ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(value, TimeSpan.Zero);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(value, TimeSpan.FromHours(1));
            _restoreTimeLimit = value;
        }
    }

    /// <summary>The same with another CPU weight.</summary>
    /// <param name="cpuWeight">1 to 10,000; 100 is usual.</param>
    internal SandboxOptions WithCpuWeight(int cpuWeight)
    {
        var copy = (SandboxOptions)MemberwiseClone();
        copy.CpuWeight = cpuWeight;
        return copy;
    }
}
