using System.Net.Sockets;
using Dh.Linux;
using Dh.Paging;
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

    /// <summary>The kernel, in the form that its VMM boots.</summary>
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
internal abstract record MemoryBackend
{
    private MemoryBackend()
    {
    }

    /// <summary>A page server resolves the faults: <see cref="IVmm.ServeMemory"/>.</summary>
    /// <param name="Device">The opened /dev/userfaultfd, for a VMM that inherits it; the driver closes it.</param>
    public sealed record Uffd(Microsoft.Win32.SafeHandles.SafeFileHandle Device) : MemoryBackend;

    /// <summary>The VMM's process maps the memory file privately, from a read-only descriptor.</summary>
    /// <param name="MemoryPath">The memory file.</param>
    /// <param name="Prefault">What runs are known to write: copied before the machine runs where the VMM can do so, which costs less than a fault for each page.</param>
    public sealed record File(string MemoryPath, IReadOnlyList<FileExtent> Prefault) : MemoryBackend;
}

/// <summary>How a VMM ended.</summary>
/// <param name="ExitCode">Its exit code; -1 when a signal ended it.</param>
/// <param name="Signal">The signal; 0 when it exited.</param>
internal readonly record struct VmmExit(int ExitCode, int Signal)
{
    /// <inheritdoc/>
    public override string ToString() => Signal != 0 ? $"killed by signal {Signal}" : $"exit code {ExitCode}";
}

/// <summary>
/// One microVM's process. It starts paused; whatever its driver, it is owned by its launcher, so nothing of it is left when this process dies.
/// All waits are bounded; every failure is a <see cref="DhException"/> with <see cref="DhErrorReason.Vmm"/> and the VMM's last words.
/// </summary>
internal interface IVmm : IAsyncDisposable
{
    /// <summary>The process's number, for messages.</summary>
    int ProcessId { get; }

    /// <summary>The layers of the cage around the process, once <see cref="WaitRestoredAsync"/> has completed; none where there is no cage.</summary>
    IReadOnlyList<CageLayer> Cage { get; }

    /// <summary>Completes when the process has ended, however; never fails.</summary>
    Task<VmmExit> Exited { get; }

    /// <summary>The time when the process was started, in <see cref="System.Diagnostics.Stopwatch"/> ticks.</summary>
    long StartedAt { get; }

    /// <summary>
    /// Starts the page server that the VMM sends its regions and its userfaultfd to. For a machine that is restored with
    /// <see cref="MemoryBackend.Uffd"/>, once, before <see cref="WaitRestoredAsync"/>, which it runs beside: a VMM may need memory to restore its devices.
    /// </summary>
    /// <param name="source">Contents of guest memory; the server owns it from now on.</param>
    /// <param name="options">How.</param>
    /// <returns>The page server; the caller disposes it after the VMM.</returns>
    PageServer ServeMemory(IMemorySource source, PageServerOptions options);

    /// <summary>Restores the machine state; completes when what a machine needs besides memory is in place.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    Task WaitRestoredAsync(CancellationToken cancellationToken);

    /// <summary>Lets the machine run: boots it, or goes on with what was restored. Once; a machine that was paused is not resumed.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    Task ResumeAsync(CancellationToken cancellationToken);

    /// <summary>The host's end of the guest channel, once, when the machine runs; a guest that boots is waited for where there is something to wait for.</summary>
    /// <param name="timeLimit">At most this long.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The stream, which stays the VMM's.</returns>
    /// <exception cref="DhException"><see cref="DhErrorReason.Guest"/>: the guest took no connection.</exception>
    Task<Socket> ConnectGuestAsync(TimeSpan timeLimit, CancellationToken cancellationToken);

    /// <summary>Stops the machine's virtual CPUs, to save it.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    Task PauseAsync(CancellationToken cancellationToken);

    /// <summary>Saves a paused machine that was booted: its memory is in the file that was named then, and its devices' state in a new one.</summary>
    /// <param name="statePath">The state file to make.</param>
    /// <param name="cancellationToken">Gives up.</param>
    Task SaveAsync(string statePath, CancellationToken cancellationToken);

    /// <summary>Asks the guest to give memory back, or to take it again; it takes its time. The machine must have a balloon.</summary>
    /// <param name="guestMib">What the guest is to have, in MiB.</param>
    /// <param name="cancellationToken">Gives up.</param>
    Task SetBalloonAsync(int guestMib, CancellationToken cancellationToken);

    /// <summary>Kills the process at once, without waiting for its end. May be called at any time, from any thread, more than once.</summary>
    void Kill();

    /// <summary>
    /// Has the launcher keep a descriptor open until the process is reaped: a userfaultfd that closes sooner, because this process ends first, takes
    /// pages from a guest that still runs, and whoever closes it last while the process ends takes all its memory apart.
    /// </summary>
    /// <param name="descriptor">The descriptor, which stays open here, too.</param>
    /// <exception cref="LinuxException">The launcher did not take it.</exception>
    void Hold(SafeFileHandle descriptor);

    /// <summary>The last lines of the process's own output and of the guest's console, for an error message; empty when there are none.</summary>
    string LastWords();

    /// <summary>
    /// Kills the process and lets the launcher reap it and remove the run directory. With <see cref="LeaveTeardown"/> it does not wait for that.
    /// </summary>
    new ValueTask DisposeAsync();

    /// <summary>Leaves reaping and removal to the launcher when this is disposed: for a program that is about to exit.</summary>
    void LeaveTeardown();
}
