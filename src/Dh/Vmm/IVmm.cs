using System.Net.Sockets;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Vmm;

/// <summary>How a VMM executes guest code.</summary>
public enum Accelerator
{
    /// <summary>Pure emulation (QEMU's TCG).</summary>
    Tcg,

    /// <summary>Hardware virtualization.</summary>
    Kvm,
}

/// <summary>The machine that an image boots on and that a snapshot restores to: whatever is here must be the same for both.</summary>
public sealed record MachineDescription
{
    /// <summary>How guest code is executed.</summary>
    public required Accelerator Accelerator { get; init; }

    /// <summary>Guest memory in MiB, 64 to 1,048,576.</summary>
    public required int MemoryMib { get; init; }

    /// <summary>Virtual CPUs, 1 to 64.</summary>
    public required int Cpus { get; init; }

    /// <summary>The kernel (bzImage).</summary>
    public required string KernelPath { get; init; }

    /// <summary>The initial RAM disk.</summary>
    public required string InitrdPath { get; init; }

    /// <summary>The root disk, attached read-only.</summary>
    public required string RootDiskPath { get; init; }

    /// <summary>The host's TSC frequency in kHz, which the guest's kernel is told under TCG (docs/design.md, "The two drivers").</summary>
    public required long TscKhz { get; init; }

    /// <summary>Whether the host can take memory back while the guest runs, through a balloon device. Default: no.</summary>
    public bool Balloon { get; init; }

    /// <summary>Guest memory in bytes.</summary>
    public long MemoryBytes => (long)MemoryMib << 20;
}

/// <summary>Where a VMM's guest memory comes from.</summary>
public abstract record MemoryBackend
{
    private MemoryBackend()
    {
    }

    /// <summary>A page server resolves the faults; the VMM sends it regions and userfaultfd through this end of a connected socket.</summary>
    /// <param name="Handshake">The VMM's end; the driver closes it when the VMM has inherited it.</param>
    /// <param name="Device">The opened /dev/userfaultfd that the VMM inherits; the driver closes it.</param>
    /// <param name="Backing">
    /// What the VMM maps as its guest memory, which the page server fills before (<see cref="Paging.PageServerOptions.Backing"/>); the page server
    /// closes it. Null: the VMM has memory of its own.
    /// </param>
    public sealed record Uffd(SafeSocketHandle Handshake, SafeFileHandle Device, SafeFileHandle? Backing) : MemoryBackend;

    /// <summary>The VMM's process maps the memory file privately, from a read-only descriptor.</summary>
    /// <param name="MemoryPath">The memory file.</param>
    /// <param name="Prefault">What runs are known to write: copied before the machine runs, which costs less than a fault for each page.</param>
    public sealed record File(string MemoryPath, IReadOnlyList<FileExtent> Prefault) : MemoryBackend;

    /// <summary>Guest memory <em>is</em> the file: written through, to become a snapshot.</summary>
    /// <param name="MemoryPath">The file, which the VMM makes.</param>
    public sealed record SharedFile(string MemoryPath) : MemoryBackend;
}

/// <summary>How a VMM ended.</summary>
/// <param name="ExitCode">Its exit code; -1 when a signal ended it.</param>
/// <param name="Signal">The signal; 0 when it exited.</param>
public readonly record struct VmmExit(int ExitCode, int Signal)
{
    /// <inheritdoc/>
    public override string ToString() => Signal != 0 ? $"killed by signal {Signal}" : $"exit code {ExitCode}";
}

/// <summary>
/// One microVM's process. It starts paused; whatever its driver, it is owned by its launcher, so nothing of it is left when this process dies.
/// All waits are bounded; every failure is a <see cref="DhException"/> with <see cref="DhErrorReason.Vmm"/> and the VMM's last words.
/// </summary>
public interface IVmm : IAsyncDisposable
{
    /// <summary>The process's number, for messages.</summary>
    int ProcessId { get; }

    /// <summary>The host's end of the guest channel.</summary>
    Socket GuestChannel { get; }

    /// <summary>Completes when the process has ended, however; never fails.</summary>
    Task<VmmExit> Exited { get; }

    /// <summary>The time when the process was started, in <see cref="System.Diagnostics.Stopwatch"/> ticks.</summary>
    long StartedAt { get; }

    /// <summary>Completes when the machine state is in place and the machine is paused; what a restore needs besides memory.</summary>
    Task WaitRestoredAsync(CancellationToken cancellationToken);

    /// <summary>Lets the machine run.</summary>
    Task ResumeAsync(CancellationToken cancellationToken);

    /// <summary>Stops the machine's virtual CPUs.</summary>
    Task PauseAsync(CancellationToken cancellationToken);

    /// <summary>Writes the state of a paused machine's devices to a new file; guest memory is in the shared file already.</summary>
    /// <param name="statePath">The file to make.</param>
    /// <param name="cancellationToken">Gives up.</param>
    Task SaveStateAsync(string statePath, CancellationToken cancellationToken);

    /// <summary>Kills the process at once, without waiting for its end. May be called at any time, from any thread, more than once.</summary>
    void Kill();

    /// <summary>The last lines of the process's own output and of the guest's console, for an error message; empty when there are none.</summary>
    string LastWords();

    /// <summary>
    /// Kills the process and lets the launcher reap it and remove the run directory. With <see cref="LeaveTeardown"/> it does not wait for that.
    /// </summary>
    new ValueTask DisposeAsync();

    /// <summary>Leaves reaping and removal to the launcher when this is disposed: for a program that is about to exit.</summary>
    void LeaveTeardown();
}
