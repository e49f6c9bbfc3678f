using Dh.Images;
using Dh.Vmm;

namespace Dh.Preparation;

/// <summary>Which accelerator a snapshot is prepared with.</summary>
public enum AcceleratorChoice
{
    /// <summary>KVM where a probe has shown that it works, else TCG.</summary>
    Auto,

    /// <summary>KVM, or an error.</summary>
    Kvm,

    /// <summary>TCG.</summary>
    Tcg,
}

/// <summary>Which VMM a snapshot is prepared with.</summary>
public enum VmmChoice
{
    /// <summary>Firecracker where it is there and KVM works, else QEMU.</summary>
    Auto,

    /// <summary>Firecracker, or an error.</summary>
    Firecracker,

    /// <summary>QEMU.</summary>
    Qemu,
}

/// <summary>What to prepare, and how; what is not set has the default that is documented here.</summary>
public sealed class PreparationOptions
{
    private int? _memoryMib;
    private int _cpus = 2;

    /// <summary>The template.</summary>
    public required Template Template { get; init; }

    /// <summary>Guest memory in MiB, 128 to 1,048,576. Default: the template's.</summary>
    public int? MemoryMib
    {
        get => _memoryMib;
        init
        {
            if (value is < 128 or > 1 << 20)
            {
                throw new DhException(DhErrorReason.Usage, $"Guest memory of {value} MiB is out of range: 128 to {1 << 20}.");
            }

            _memoryMib = value;
        }
    }

    /// <summary>Virtual CPUs, 1 to 64. Default: 2, which runs Python under TCG 20-30% faster than one.</summary>
    public int Cpus
    {
        get => _cpus;
        init => _cpus = value is >= 1 and <= 64 ? value : throw new DhException(DhErrorReason.Usage, $"{value} virtual CPUs are out of range: 1 to 64.");
    }

    /// <summary>Where Python packages come from instead of the index.</summary>
    public string? Wheelhouse { get; init; }

    /// <summary>Python packages to install besides the template's.</summary>
    public IReadOnlyList<string> PipPackages { get; init; } = [];

    /// <summary>A Debian mirror to use instead of this host's.</summary>
    public string? Mirror { get; init; }

    /// <summary>The VMM. Default: the best that works here.</summary>
    public VmmChoice Vmm { get; init; }

    /// <summary>Which programs machines are run with. Default: what the environment says.</summary>
    public VmmPrograms Programs { get; init; } = VmmPrograms.Default;

    /// <summary>How guest code is executed. Default: KVM where it works.</summary>
    public AcceleratorChoice Accelerator { get; init; }

    /// <summary>
    /// Whether the memory is kept in LZ4 blocks: a smaller snapshot, which comes back through a userfaultfd only. Default: no.
    /// </summary>
    public bool Compress { get; init; }

    /// <summary>Whether the machine gets a balloon device: for tests of a guest that gives memory back.</summary>
    internal bool Balloon { get; init; }

    /// <summary>Whether a new snapshot is made although one of the same image and machine is there.</summary>
    public bool Force { get; init; }

    /// <summary>Where it is kept. Default: <see cref="DhHome.Default"/>.</summary>
    public DhHome Home { get; init; } = DhHome.Default;

    /// <summary>Where the native pieces and the guest's files are. Default: beside the program.</summary>
    public Installation Installation { get; init; } = Installation.Current;
}

/// <summary>A step of a preparation, for a progress display.</summary>
/// <param name="Step">What is done.</param>
/// <param name="Detail">With what.</param>
/// <param name="Fraction">How much of the step is done, 0 to 1; null when it cannot be said.</param>
public readonly record struct PreparationProgress(string Step, string? Detail, double? Fraction);
