namespace Dh.Vmm.Qemu;

/// <summary>QEMU on this host.</summary>
/// <param name="qemu">The program.</param>
internal sealed class QemuDriver(QemuBinary qemu) : IVmmDriver
{
    /// <summary>QEMU's name in manifests.</summary>
    public const string DriverName = "qemu";

    /// <inheritdoc/>
    public string Name => DriverName;

    /// <inheritdoc/>
    public string ProgramPath => qemu.Path;

    /// <inheritdoc/>
    public Version Version => qemu.Version;

    /// <inheritdoc/>
    public Version? SnapshotVersion => null;

    /// <inheritdoc/>
    public bool IsJailed => false;

    /// <inheritdoc/>
    public bool IsCaged => true;

    /// <inheritdoc/>
    public string? UffdRefusal => null;

    /// <inheritdoc/>
    public bool BootsElfKernel => false;

    /// <inheritdoc/>
    public MachineDescription Complete(MachineDescription machine) => machine;

    /// <inheritdoc/>
    public string MachineHash(MachineDescription machine) => QemuCommandLine.MachineHash(machine);

    /// <inheritdoc/>
    public IReadOnlyList<string> ProbeCommand(string kernelPath, string initrdPath, string directory) =>
    [
        // As the image boots: what a kernel says at length, and its search for absent serial ports, is slow where every access to a port is.
        qemu.Path, "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot",
        "-machine", "microvm,x-option-roms=off", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio",
        "-kernel", kernelPath, "-initrd", initrdPath, "-append", "console=ttyS0 quiet panic=-1 reboot=t mitigations=off 8250.nr_uarts=1 dh.probe",
    ];

    /// <inheritdoc/>
    public async Task<IVmm> BootAsync(MachineDescription machine, string memoryPath, VmmStartOptions options, CancellationToken cancellationToken) =>
        await QemuVmm.BootAsync(qemu, machine, memoryPath, options, cancellationToken).ConfigureAwait(false);

    /// <inheritdoc/>
    public Task<IVmm> RestoreAsync(MachineDescription machine, MemoryBackend memory, string statePath, VmmStartOptions options, CancellationToken cancellationToken) =>
        Task.FromResult<IVmm>(QemuVmm.Restore(qemu, machine, memory, statePath, options));
}
