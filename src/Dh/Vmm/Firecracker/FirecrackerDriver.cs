namespace Dh.Vmm.Firecracker;

/// <summary>Firecracker on this host, jailed or not.</summary>
/// <param name="firecracker">The program.</param>
/// <param name="jailerPath">The jailer that runs it; null without one.</param>
internal sealed class FirecrackerDriver(FirecrackerBinary firecracker, string? jailerPath) : IVmmDriver
{
    // Before, its end of the handshake's socket was closed as soon as the userfaultfd was sent.
    private static readonly Version HandshakeKeptSince = new(1, 12, 0);

    /// <summary>Firecracker's name in manifests.</summary>
    public const string DriverName = "firecracker";

    /// <inheritdoc/>
    public string Name => DriverName;

    /// <inheritdoc/>
    public string ProgramPath => firecracker.Path;

    /// <inheritdoc/>
    public Version Version => firecracker.Version;

    /// <inheritdoc/>
    public Version? SnapshotVersion => firecracker.SnapshotVersion;

    /// <inheritdoc/>
    public bool IsJailed => jailerPath is not null;

    /// <inheritdoc/>
    public bool IsCaged => false;

    /// <inheritdoc/>
    public string? UffdRefusal => !SnapshotLoadRequest.KnowsUffd(firecracker.Version)
            ? $"Firecracker {firecracker.Version} ({firecracker.Path}) cannot have its memory from a page server, which takes 1.1 or newer"
        : firecracker.Version < HandshakeKeptSince
            ? $"Firecracker {firecracker.Version} ({firecracker.Path}) hangs up on its page server, which then cannot tell it from a dead one; {HandshakeKeptSince.ToString(2)} or newer does not"
        : null;

    /// <inheritdoc/>
    public bool BootsElfKernel => true;

    /// <inheritdoc/>
    public MachineDescription Complete(MachineDescription machine) => machine with { Balloon = true };

    /// <inheritdoc/>
    public string MachineHash(MachineDescription machine) => FirecrackerMachine.Hash(machine, firecracker.Version);

    /// <inheritdoc/>
    public IReadOnlyList<string> ProbeCommand(string kernelPath, string initrdPath, string directory)
    {
        string file = Path.Combine(directory, "machine.json");
        File.WriteAllText(file, FirecrackerMachine.ProbeFile(kernelPath, initrdPath));
        return [firecracker.Path, .. FirecrackerCommandLine.BuildWithoutApi(file)];
    }

    /// <inheritdoc/>
    public async Task<IVmm> BootAsync(MachineDescription machine, string memoryPath, VmmStartOptions options, CancellationToken cancellationToken) =>
        await FirecrackerVmm.BootAsync(firecracker, NewJail(), machine, memoryPath, options, cancellationToken).ConfigureAwait(false);

    /// <inheritdoc/>
    public async Task<IVmm> RestoreAsync(MachineDescription machine, MemoryBackend memory, string statePath, VmmStartOptions options, CancellationToken cancellationToken) =>
        await FirecrackerVmm.RestoreAsync(firecracker, NewJail(), machine, memory, statePath, options).ConfigureAwait(false);

    private Jail? NewJail() => jailerPath is null ? null : Jail.Create(jailerPath);
}
