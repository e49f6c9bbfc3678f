namespace Dh.Vmm;

/// <summary>A VMM on this host: its program, and how machines are booted and restored with it. Who uses one does not know which it is.</summary>
internal interface IVmmDriver
{
    /// <summary>The VMM's name, as manifests have it.</summary>
    string Name { get; }

    /// <summary>Its program.</summary>
    string ProgramPath { get; }

    /// <summary>Its version.</summary>
    Version Version { get; }

    /// <summary>The version of the snapshots that it writes and reads, when they have one of their own.</summary>
    Version? SnapshotVersion { get; }

    /// <summary>Whether it runs in a complete jail.</summary>
    bool IsJailed { get; }

    /// <summary>Whether the launcher puts it into a cage, as far as this host grants one.</summary>
    bool IsCaged { get; }

    /// <summary>Why its memory cannot come from a page server; null when it can.</summary>
    string? UffdRefusal { get; }

    /// <summary>Whether it boots the ELF kernel instead of the distribution's bzImage.</summary>
    bool BootsElfKernel { get; }

    /// <summary>A machine with what all of this VMM's machines have.</summary>
    /// <param name="machine">The machine that is wanted.</param>
    MachineDescription Complete(MachineDescription machine);

    /// <summary>A hash of what booting and restoring must have in common, for the manifest; where files are does not count.</summary>
    /// <param name="machine">The machine.</param>
    string MachineHash(MachineDescription machine);

    /// <summary>The command that boots a kernel under KVM, with its console on standard output.</summary>
    /// <param name="kernelPath">The kernel.</param>
    /// <param name="initrdPath">The initrd.</param>
    /// <param name="directory">Where files that the command needs may be put.</param>
    IReadOnlyList<string> ProbeCommand(string kernelPath, string initrdPath, string directory);

    /// <summary>Starts a machine that will boot when it is resumed.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="memoryPath">The file that has its memory once it is saved; there is none yet.</param>
    /// <param name="options">Where and how.</param>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    Task<IVmm> BootAsync(MachineDescription machine, string memoryPath, VmmStartOptions options, CancellationToken cancellationToken);

    /// <summary>Starts the restore of a snapshot; <see cref="IVmm.WaitRestoredAsync"/> completes it.</summary>
    /// <param name="machine">The machine that was saved.</param>
    /// <param name="memory">Where its memory comes from; the descriptors in it are closed.</param>
    /// <param name="statePath">The device state.</param>
    /// <param name="options">Where and how.</param>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    Task<IVmm> RestoreAsync(MachineDescription machine, MemoryBackend memory, string statePath, VmmStartOptions options, CancellationToken cancellationToken);
}
