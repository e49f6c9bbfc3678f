namespace Dh.Vmm.Firecracker;

/// <summary>What a refused load means here. Firecracker's words name its own step, not what is wrong with the snapshot or the host.</summary>
internal static class LoadFault
{
    private const string Again = "Run `dh vm prepare --force` to make a new snapshot.";

    // The first that occurs; a fault has its causes one behind the other.
    private static readonly (string Words, DhErrorReason Reason, string Meaning)[] Known =
    [
        ("bitcode error", DhErrorReason.Snapshot, $"Its device state was written by a Firecracker of another snapshot version, or is damaged. {Again}"),
        ("CRC64 validation failed", DhErrorReason.Snapshot, $"Its device state is damaged. {Again}"),
        ("too short to contain CRC", DhErrorReason.Snapshot, $"Its device state was cut off. {Again}"),
        ("exceeds largest possible file offset", DhErrorReason.Snapshot, $"Its memory file is shorter than guest memory. {Again}"),
        ("Failed to connect to UDS Unix stream", DhErrorReason.Vmm, "The page server's socket in the run directory was not there, or nobody listened on it."),
        ("Error binding to the host-side Unix socket", DhErrorReason.Vmm, "A socket of another machine is in the run directory, which is this machine's alone: something else writes there."),
        ("Error creating KVM object: Permission denied", DhErrorReason.Host, "This user may not open /dev/kvm: join its group (`kvm`)."),
        ("Error creating KVM object", DhErrorReason.Host, "KVM does not work here; `dh doctor` says more."),
        ("userfaultfd", DhErrorReason.Host, "Firecracker may not open /dev/userfaultfd: give this user access to it, or use --memory-policy file."),
        ("No such file or directory", DhErrorReason.Snapshot, $"A file of the snapshot is missing. {Again}"),
        ("not allowed after configuring boot-specific resources", DhErrorReason.Vmm, "The machine had been configured for a boot already."),
        ("not supported after starting the microVM", DhErrorReason.Vmm, "The machine ran already."),
    ];

    /// <summary>Explains a fault.</summary>
    /// <param name="fault">Firecracker's words.</param>
    /// <returns>Whose fault it is, and what to do.</returns>
    public static (DhErrorReason Reason, string Meaning) Explain(string fault)
    {
        var known = Known.FirstOrDefault(known => fault.Contains(known.Words, StringComparison.OrdinalIgnoreCase));
        return known.Words is null ? (DhErrorReason.Vmm, $"If it does so again: {char.ToLowerInvariant(Again[0])}{Again[1..]}") : (known.Reason, known.Meaning);
    }
}
