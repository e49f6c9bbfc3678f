using Dh.Vmm.Firecracker;
using Dh.Vmm.Qemu;

namespace Dh.Vmm;

/// <summary>One way to run machines on this host, and why it cannot be taken.</summary>
public sealed record VmmCandidate
{
    private const string NoFirecracker = "there is no firecracker in PATH";
    private const string GetFirecracker = "take `firecracker` from https://github.com/firecracker-microvm/firecracker/releases, and put it in PATH or name it with DH_FIRECRACKER or --firecracker";

    internal VmmCandidate(string vmm, Accelerator accelerator)
    {
        Vmm = vmm;
        Accelerator = accelerator;
    }

    /// <summary>The VMM: <c>firecracker</c> or <c>qemu</c>.</summary>
    public string Vmm { get; }

    /// <summary>How guest code is executed.</summary>
    public Accelerator Accelerator { get; }

    /// <summary>The VMM's program, with its version; null when there is none.</summary>
    public string? Program { get; internal init; }

    /// <summary>Why it cannot be taken, as far as is known without booting a machine; null when it can.</summary>
    public string? Refusal { get; internal init; }

    /// <summary>What to do about that; null when nothing can be done, or need be.</summary>
    public string? Advice { get; internal init; }

    /// <summary>Whether a kernel has been booted this way since this host booted; always true under emulation, which needs no proof.</summary>
    public bool IsProved { get; internal init; }

    /// <summary>The VMM; null when there is none.</summary>
    internal IVmmDriver? Driver { get; init; }

    /// <summary>What is wrong with the program; null when nothing is, or when there is none.</summary>
    internal DhException? Failure { get; init; }

    /// <summary>All ways, the best first. Programs are asked for their versions; no machine is booted.</summary>
    /// <param name="programs">Which programs to take.</param>
    /// <param name="home">Where verdicts on this host are kept.</param>
    /// <param name="cancellationToken">Gives up.</param>
    public static async Task<IReadOnlyList<VmmCandidate>> FindAllAsync(VmmPrograms programs, DhHome home, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(programs);
        ArgumentNullException.ThrowIfNull(home);
        string cache = DhHome.EnsurePrivate(home.CacheDirectory);
        var (firecracker, firecrackerFailure) = await TryAsync(() => FindFirecrackerAsync(programs, cache, cancellationToken)).ConfigureAwait(false);
        var (qemu, qemuFailure) = await TryAsync(async () => await FindQemuAsync(cache, cancellationToken).ConfigureAwait(false)).ConfigureAwait(false);
        string? device = KvmProbe.DeviceRefusal();
        return
        [
            firecracker is null
                ? new VmmCandidate(FirecrackerDriver.DriverName, Accelerator.Kvm)
                {
                    Failure = firecrackerFailure,
                    Refusal = firecrackerFailure?.Message ?? NoFirecracker,
                    Advice = firecrackerFailure is null ? GetFirecracker : null,
                }
                : UnderKvm(firecracker, device, cache),
            qemu is null ? WithoutQemu(Accelerator.Kvm, qemuFailure!) : UnderKvm(qemu, device, cache),
            qemu is null
                ? WithoutQemu(Accelerator.Tcg, qemuFailure!)
                : new VmmCandidate(qemu.Name, Accelerator.Tcg) { Driver = qemu, Program = Describe(qemu), IsProved = true },
        ];
    }

    /// <summary>The VMM that a snapshot was made with.</summary>
    /// <param name="vmm">Its name.</param>
    /// <param name="programs">Which programs to take.</param>
    /// <param name="cacheDirectory">Where versions are kept.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">It is not here.</exception>
    internal static async Task<IVmmDriver> FindAsync(string vmm, VmmPrograms programs, string cacheDirectory, CancellationToken cancellationToken) => vmm switch
    {
        QemuDriver.DriverName => await FindQemuAsync(cacheDirectory, cancellationToken).ConfigureAwait(false),
        FirecrackerDriver.DriverName => await FindFirecrackerAsync(programs, cacheDirectory, cancellationToken).ConfigureAwait(false)
            ?? throw new DhException(DhErrorReason.Host, $"The snapshot was made with Firecracker, and {NoFirecracker}: {GetFirecracker}."),
        _ => throw new DhException(DhErrorReason.Snapshot, $"The snapshot was made with the VMM {Untrusted.OneLine(vmm)}, which this dh does not know. Run `dh vm prepare --force` to make a new snapshot."),
    };

    private static VmmCandidate UnderKvm(IVmmDriver driver, string? device, string cacheDirectory)
    {
        var verdict = KvmProbe.Cached(driver.Name, cacheDirectory);
        return new VmmCandidate(driver.Name, Accelerator.Kvm)
        {
            Driver = driver,
            Program = Describe(driver),
            IsProved = device is null && verdict is { Works: true },
            Refusal = device ?? (verdict is { Works: false } ? verdict.Reason : null),
            Advice = device is not null ? "enable virtualization for this host (nested virtualization, where it is a virtual machine itself), or join the group of /dev/kvm"
                : verdict is { Works: false } ? "this host's KVM does not run an ordinary kernel: take a host that does"
                : null,
        };
    }

    private static VmmCandidate WithoutQemu(Accelerator accelerator, DhException failure) =>
        new(QemuDriver.DriverName, accelerator) { Failure = failure, Refusal = failure.Message, Advice = $"apt-get install qemu-system-x86 ({QemuBinary.Oldest} or later)" };

    private static string Describe(IVmmDriver driver) => $"{driver.ProgramPath}, {driver.Version}{(driver.IsJailed ? ", jailed" : "")}";

    private static async Task<IVmmDriver?> FindFirecrackerAsync(VmmPrograms programs, string cacheDirectory, CancellationToken cancellationToken) =>
        FirecrackerBinary.FindPath(programs.Firecracker) is { } path
            ? new FirecrackerDriver(await FirecrackerBinary.OfAsync(path, cacheDirectory, cancellationToken).ConfigureAwait(false), Jail.Find(programs.Jailer))
            : null;

    private static async Task<IVmmDriver> FindQemuAsync(string cacheDirectory, CancellationToken cancellationToken) =>
        new QemuDriver(await QemuBinary.FindCachedAsync(cacheDirectory, cancellationToken).ConfigureAwait(false));

    private static async Task<(IVmmDriver? Driver, DhException? Failure)> TryAsync(Func<Task<IVmmDriver?>> find)
    {
        try
        {
            return (await find().ConfigureAwait(false), null);
        }
        catch (DhException e)
        {
            return (null, e);
        }
    }
}
