using Dh.Vmm;

namespace Dh.Preparation;

/// <summary>Which of a host's VMMs a snapshot is made with: the best that works, within what was asked for.</summary>
internal static class VmmSelection
{
    /// <summary>The candidates that were asked for, the best first.</summary>
    /// <param name="all">What there is.</param>
    /// <param name="options">What was asked for.</param>
    /// <exception cref="DhException">None of them has a program that can be run, or nothing was asked for that could be.</exception>
    public static IReadOnlyList<VmmCandidate> Wanted(IReadOnlyList<VmmCandidate> all, PreparationOptions options)
    {
        VmmCandidate[] wanted =
        [
            .. all.Where(candidate =>
                (options.Vmm == VmmChoice.Auto || candidate.Vmm == Name(options.Vmm))
                && (options.Accelerator == AcceleratorChoice.Auto || candidate.Accelerator == (options.Accelerator == AcceleratorChoice.Kvm ? Accelerator.Kvm : Accelerator.Tcg))),
        ];
        if (wanted.Length == 0)
        {
            throw new DhException(DhErrorReason.Usage, "Firecracker runs guests under KVM only: --vmm firecracker does not go with --accel tcg.");
        }

        // What somebody has named is not passed over silently.
        if (IsFirecrackerNamed(options.Programs) && wanted[0] is { Failure: { } named })
        {
            throw named;
        }

        return wanted.Any(candidate => candidate.Driver is not null) ? wanted
            : wanted[^1].Failure is { } failure ? throw failure
            : throw Refused(wanted[^1], wanted[^1].Refusal!, options);
    }

    /// <summary>Takes the first that works.</summary>
    /// <param name="wanted">What was asked for, the best first.</param>
    /// <param name="options">What was asked for.</param>
    /// <param name="probe">Boots a kernel under KVM.</param>
    /// <param name="report">Gets each step.</param>
    /// <exception cref="DhException">None works; the message says why the last one does not.</exception>
    public static async Task<(IVmmDriver Driver, Accelerator Accelerator)> TakeAsync(
        IReadOnlyList<VmmCandidate> wanted, PreparationOptions options, Func<IVmmDriver, Task<KvmVerdict>> probe, Action<string, string?> report)
    {
        foreach (var candidate in wanted)
        {
            string way = $"{candidate.Vmm} {(candidate.Accelerator == Accelerator.Kvm ? "with KVM" : "without KVM")}";
            string? refusal = candidate.Refusal;
            if (refusal is null && candidate.Accelerator == Accelerator.Kvm && await probe(candidate.Driver!).ConfigureAwait(false) is { Works: false } verdict)
            {
                refusal = verdict.Reason;
            }

            if (refusal is null)
            {
                report("VMM", $"{way}: {candidate.Program}");
                return (candidate.Driver!, candidate.Accelerator);
            }

            report("VMM", $"not {way}: {refusal}");
            if (candidate == wanted[^1])
            {
                throw candidate.Failure ?? Refused(candidate, refusal, options);
            }
        }

        throw new InvalidOperationException("There was no candidate.");
    }

    private static DhException Refused(VmmCandidate candidate, string refusal, PreparationOptions options) => new(
        DhErrorReason.Host,
        options.Vmm == VmmChoice.Firecracker
            ? $"Firecracker was asked for and cannot be used here: {refusal}{(candidate.Advice is { } advice ? $" ({advice})" : "")}. Use --vmm auto; `dh doctor` says more."
            : $"KVM was asked for and does not work here: {refusal}. Use --accel tcg; `dh doctor` says more.");

    private static bool IsFirecrackerNamed(VmmPrograms programs) =>
        ((string?[])[programs.Firecracker, programs.Jailer, Environment.GetEnvironmentVariable(FirecrackerVariable), Environment.GetEnvironmentVariable(VmmPrograms.JailerVariable)])
            .Any(name => name is { Length: > 0 });

    private const string FirecrackerVariable = Dh.Vmm.Firecracker.FirecrackerBinary.Variable;

    private static string Name(VmmChoice choice) => choice == VmmChoice.Firecracker ? "firecracker" : "qemu";
}
