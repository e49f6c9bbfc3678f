using System.Diagnostics;
using System.Net.Sockets;
using Dh.Linux;
using Dh.Paging;
using Microsoft.Win32.SafeHandles;

namespace Dh.Vmm.Firecracker;

/// <summary>
/// A microVM under Firecracker, which knows nothing but its working directory: the run directory, or the root of its jail in it.
/// <code>
/// Configured --InstanceStart--> Running --Paused--> Paused --snapshot/create--> Saved
/// Started --snapshot/load, Uffd--> Restored --Resumed--> Running
///    +----- snapshot/load, File: resume_vm --------------> Running
/// </code>
/// <em>Resumed</em> is sent once after a load and never otherwise: a second one is answered with success, and kills the guest channel for good.
/// </summary>
internal sealed class FirecrackerVmm : IVmm
{
    /// <summary>The port that the guest's runner listens on (docs/guest-protocol.md; guest/runner.py, VSOCK_PORT).</summary>
    public const uint GuestPort = 25_704;

    private const int LastWordsLines = 20;

    // Log and console of a machine that runs untrusted code; a boot writes a memory file, and runs the template's code.
    private const long MaxRestoredFileBytes = 16L << 20;

    // What Firecracker takes besides the guest's memory, with the page cache of its files.
    private const long JailOverheadBytes = 128L << 20;

    // How fast a disk may be at least, for the time that a snapshot may take.
    private const int SlowestMibPerSecond = 20;

    private static readonly TimeSpan EndTimeLimit = TimeSpan.FromSeconds(1);
    private static readonly Version DiffWithoutTrackingSince = new(1, 13, 0);

    private readonly FirecrackerBinary _firecracker;
    private readonly Jail? _jail;
    private readonly MachineDescription _machine;
    private readonly VmmStartOptions _options;
    private readonly VmmProcess _process;
    private readonly string _directory;
    private readonly SafeFileHandle _directoryHandle;
    private string _memoryPath = "";
    private string _statePath = "";
    private Socket? _uffdListener;
    private PageServer? _pageServer;
    private FirecrackerApi? _api;
    private Socket? _guest;
    private State _state = State.Started;

    private FirecrackerVmm(
        FirecrackerBinary firecracker, Jail? jail, MachineDescription machine, VmmStartOptions options, VmmProcess process, long startedAt, string directory, SafeFileHandle directoryHandle)
    {
        _firecracker = firecracker;
        _jail = jail;
        _machine = machine;
        _options = options;
        _process = process;
        _directory = directory;
        _directoryHandle = directoryHandle;
        StartedAt = startedAt;
    }

    private enum State
    {
        Started,
        Configured,
        Restored,
        Running,
        Paused,
        Saved,
    }

    /// <inheritdoc/>
    public int ProcessId => _process.Pid;

    /// <inheritdoc/>
    public IReadOnlyList<CageLayer> Cage { get; private set; } = []; // the rest of it is its jailer's, or none

    /// <inheritdoc/>
    public Task<VmmExit> Exited => _process.Exited;

    /// <inheritdoc/>
    public long StartedAt { get; }

    /// <summary>Starts a machine that will boot when it is resumed.</summary>
    /// <param name="firecracker">The program.</param>
    /// <param name="jail">Its jail; null without one.</param>
    /// <param name="machine">The machine.</param>
    /// <param name="memoryPath">The file that has its memory once it is saved.</param>
    /// <param name="options">Where and how.</param>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    public static async Task<FirecrackerVmm> BootAsync(
        FirecrackerBinary firecracker, Jail? jail, MachineDescription machine, string memoryPath, VmmStartOptions options, CancellationToken cancellationToken)
    {
        var vmm = await StartAsync(firecracker, jail, machine, options, maxFileBytes: null).ConfigureAwait(false);
        try
        {
            vmm._memoryPath = memoryPath;
            vmm.Place(machine.KernelPath, FirecrackerFiles.Kernel);
            vmm.Place(machine.InitrdPath, FirecrackerFiles.Initrd);
            vmm.Place(machine.RootDiskPath, FirecrackerFiles.RootDisk);
            await vmm.ConnectApiAsync(cancellationToken).ConfigureAwait(false);
            foreach (var (path, json) in FirecrackerMachine.Requests(machine, firecracker.Version))
            {
                await vmm._api!.PutAsync(path, json, options.StepTimeLimit, cancellationToken).ConfigureAwait(false);
            }

            vmm._state = State.Configured;
            return vmm;
        }
        catch
        {
            await vmm.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Starts the restore of a snapshot; <see cref="WaitRestoredAsync"/> completes it.</summary>
    /// <param name="firecracker">The program.</param>
    /// <param name="jail">Its jail; null without one.</param>
    /// <param name="machine">The machine that was saved.</param>
    /// <param name="memory">Where its memory comes from; the descriptors in it are closed.</param>
    /// <param name="statePath">The device state.</param>
    /// <param name="options">Where and how.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    public static async Task<FirecrackerVmm> RestoreAsync(
        FirecrackerBinary firecracker, Jail? jail, MachineDescription machine, MemoryBackend memory, string statePath, VmmStartOptions options)
    {
        var file = memory as MemoryBackend.File;
        (memory as MemoryBackend.Uffd)?.Device.Dispose(); // it opens its own
        var vmm = await StartAsync(firecracker, jail, machine, options, MaxRestoredFileBytes).ConfigureAwait(false);
        try
        {
            vmm._statePath = statePath;
            vmm.Place(statePath, FirecrackerFiles.State);
            vmm.Place(machine.RootDiskPath, FirecrackerFiles.RootDisk);
            if (file is not null)
            {
                vmm._memoryPath = file.MemoryPath;
                vmm.Place(file.MemoryPath, FirecrackerFiles.Memory);
            }
            else
            {
                vmm._uffdListener = PageServer.Bind(vmm.SocketPath(FirecrackerFiles.UffdSocket));
                vmm.GiveToJail(FirecrackerFiles.UffdSocket);
            }

            return vmm;
        }
        catch
        {
            await vmm.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <inheritdoc/>
    public PageServer ServeMemory(IMemorySource source, PageServerOptions options)
    {
        ArgumentNullException.ThrowIfNull(source);
        var listener = _uffdListener ?? throw new InvalidOperationException("This machine's memory comes from no page server, or is served already.");
        _uffdListener = null;
        return _pageServer = PageServer.StartListening(listener, ProcessId, source, options);
    }

    /// <inheritdoc/>
    public async Task WaitRestoredAsync(CancellationToken cancellationToken)
    {
        bool fromFile = _memoryPath.Length > 0;
        await ConnectApiAsync(cancellationToken).ConfigureAwait(false);
        var request = SnapshotLoadRequest.Of(
            _firecracker.Version,
            FirecrackerFiles.State,
            fromFile ? SnapshotMemoryType.File : SnapshotMemoryType.Uffd,
            fromFile ? FirecrackerFiles.Memory : FirecrackerFiles.UffdSocket,
            resume: fromFile);
        try
        {
            await _api!.PutAsync("/snapshot/load", request, FirecrackerJson.Default.SnapshotLoadRequest, _options.StepTimeLimit, cancellationToken).ConfigureAwait(false);
        }
        catch (VmmException e)
        {
            var (reason, meaning) = LoadFault.Explain(e.FaultMessage);
            throw new DhException(reason, $"The snapshot {Path.GetDirectoryName(_statePath)} could not be restored: {e.Message}. {meaning}", e);
        }

        Cage = [FirecrackerFilters.Look(ProcessId)];
        _state = fromFile ? State.Running : State.Restored;
    }

    /// <inheritdoc/>
    public async Task ResumeAsync(CancellationToken cancellationToken)
    {
        switch (_state)
        {
            case State.Configured:
                await _api!.PutAsync("/actions", new InstanceAction("InstanceStart"), FirecrackerJson.Default.InstanceAction, _options.StepTimeLimit, cancellationToken).ConfigureAwait(false);
                break;
            case State.Restored:
                await SetStateAsync("Resumed", cancellationToken).ConfigureAwait(false);
                break;
            case State.Running:
                return; // by the load
            default:
                throw new InvalidOperationException($"A machine that is {_state} is not resumed: its guest channel would be dead.");
        }

        _state = State.Running;
    }

    /// <inheritdoc/>
    public async Task<Socket> ConnectGuestAsync(TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        using var gone = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        using var ended = new CancellationTokenSource();
        _ = Exited.ContinueWith(_ => gone.CancelAsync(), ended.Token, TaskContinuationOptions.None, TaskScheduler.Default);
        try
        {
            return _guest = await VsockConnection.ConnectAsync(SocketPath(FirecrackerFiles.VsockSocket), GuestPort, timeLimit, gone.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException e) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.Guest, "The guest's runner took no connection: the microVM has ended.", e);
        }
        finally
        {
            await ended.CancelAsync().ConfigureAwait(false);
        }
    }

    /// <inheritdoc/>
    public async Task PauseAsync(CancellationToken cancellationToken)
    {
        await SetStateAsync("Paused", cancellationToken).ConfigureAwait(false);
        _state = State.Paused;
    }

    /// <inheritdoc/>
    public async Task SaveAsync(string statePath, CancellationToken cancellationToken)
    {
        ArgumentNullException.ThrowIfNull(statePath);
        var timeLimit = _options.StepTimeLimit + TimeSpan.FromSeconds((double)_machine.MemoryMib / SlowestMibPerSecond);
        var request = new SnapshotCreateRequest(SnapshotType(), FirecrackerFiles.State, FirecrackerFiles.Memory);
        await _api!.PutAsync("/snapshot/create", request, FirecrackerJson.Default.SnapshotCreateRequest, timeLimit, cancellationToken).ConfigureAwait(false);
        _state = State.Saved;
        long length = new FileInfo(PathOf(FirecrackerFiles.Memory)).Length;
        if (length != _machine.MemoryBytes)
        {
            throw new DhException(DhErrorReason.Vmm, $"Firecracker wrote {length} bytes of memory of a machine that has {_machine.MemoryBytes}.");
        }

        Take(FirecrackerFiles.State, statePath);
        Take(FirecrackerFiles.Memory, _memoryPath);
    }

    /// <inheritdoc/>
    public Task SetBalloonAsync(int guestMib, CancellationToken cancellationToken) => _api!.PatchAsync(
        "/balloon", new BalloonUpdate(_machine.MemoryMib - guestMib), FirecrackerJson.Default.BalloonUpdate, _options.StepTimeLimit, cancellationToken);

    /// <inheritdoc/>
    public void Kill() => _process.Kill();

    /// <inheritdoc/>
    public void Hold(SafeFileHandle descriptor) => _process.Hold(descriptor);

    /// <inheritdoc/>
    public void LeaveTeardown() => _process.LeaveTeardown();

    /// <inheritdoc/>
    public string LastWords() => _process.LastLogLines(LastWordsLines);

    /// <inheritdoc/>
    public async ValueTask DisposeAsync()
    {
        await _process.DisposeAsync().ConfigureAwait(false);
        _guest?.Dispose();
        _api?.Dispose();
        _uffdListener?.Dispose();
        _directoryHandle.Dispose();
    }

    private static async Task<FirecrackerVmm> StartAsync(FirecrackerBinary firecracker, Jail? jail, MachineDescription machine, VmmStartOptions options, long? maxFileBytes)
    {
        string id = Path.GetFileName(options.RunDirectory);
        var limits = new JailLimits(machine.MemoryBytes + JailOverheadBytes, machine.Cpus, maxFileBytes);
        IReadOnlyList<string> command = jail is null
            ? [firecracker.Path, .. FirecrackerCommandLine.Build(id)]
            : [jail.JailerPath, .. JailerCommandLine.Build(jail, firecracker.Path, id, options.RunDirectory, limits)];
        string directory = jail is null ? options.RunDirectory : Jail.RootDirectory(options.RunDirectory, firecracker.Path, id);
        long startedAt = Stopwatch.GetTimestamp();
        // The jailer sets the limit itself, after it has copied the program.
        var launcher = new LauncherOptions { MaxFileBytes = jail is null ? maxFileBytes : null, CgroupDirectory = jail is null ? null : Jail.CgroupDirectory(id) };
        var process = VmmProcess.Start(options, new Dictionary<string, string>(), command, [], launcher);
        try
        {
            Directory.CreateDirectory(directory); // whoever comes first, the jailer or this
            return new FirecrackerVmm(firecracker, jail, machine, options, process, startedAt, directory, Files.OpenDirectory(directory));
        }
        catch
        {
            await process.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    private string PathOf(string name) => Path.Combine(_directory, name);

    // However long the run directory's path is.
    private string SocketPath(string name) => $"/proc/self/fd/{_directoryHandle.DangerousGetHandle()}/{name}";

    /// <summary>Makes a file known to Firecracker: by a link, which a jail cannot follow out of it unless it is a hard one.</summary>
    private void Place(string path, string name)
    {
        try
        {
            if (_jail is null)
            {
                File.CreateSymbolicLink(PathOf(name), Path.GetFullPath(path));
            }
            else
            {
                Files.Link(path, PathOf(name));
            }
        }
        catch (Exception e) when (e is LinuxException or IOException)
        {
            throw new DhException(
                DhErrorReason.Host,
                $"File {path} cannot be given to Firecracker as {PathOf(name)}: {e.Message.TrimEnd('.')}.{(e is LinuxException { Errno: Errno.EXDEV } ? " A jail takes files of its own file system: keep $DH_HOME on one." : "")}",
                e);
        }
    }

    private void GiveToJail(string name)
    {
        if (_jail is not null)
        {
            Files.ChangeOwner(PathOf(name), _jail.UserId, _jail.UserId);
        }
    }

    private void Take(string name, string path)
    {
        if (_jail is not null)
        {
            Files.ChangeOwner(PathOf(name), UnixSockets.CurrentUserId, 0);
        }

        File.Move(PathOf(name), path);
    }

    // A Diff of a machine that was booted has all of its memory, and holes where it touched none. Which pages those are Firecracker asks
    // mincore(2), which takes a page that was swapped out for one that was never touched: with swap, all of it is written, holes are punched later.
    private string SnapshotType() => _firecracker.Version >= DiffWithoutTrackingSince && File.ReadLines("/proc/swaps").Count() <= 1 ? "Diff" : "Full";

    private async Task ConnectApiAsync(CancellationToken cancellationToken) => _api = await FirecrackerApi.ConnectAsync(
        SocketPath(FirecrackerFiles.ApiSocket), _options.StepTimeLimit, Exited, Kill, DescribeEndAsync, DescribeWait, cancellationToken).ConfigureAwait(false);

    private Task SetStateAsync(string state, CancellationToken cancellationToken) =>
        _api!.PatchAsync("/vm", new VmState(state), FirecrackerJson.Default.VmState, _options.StepTimeLimit, cancellationToken);

    /// <summary>How it ended, as the end of a message.</summary>
    private async Task<string> DescribeEndAsync()
    {
        await Task.WhenAny(Exited, Task.Delay(EndTimeLimit)).ConfigureAwait(false);
        string exit = Exited.IsCompletedSuccessfully ? $" ({await Exited.ConfigureAwait(false)})" : "";
        string words = LastWords();
        return words.Length > 0 ? $"{exit}. Its last words:\n{words}" : $"{exit}.";
    }

    /// <summary>What it waits for, when it does not answer: restoring devices touches guest memory.</summary>
    private string DescribeWait() => _pageServer switch
    {
        null => "",
        { HandshakeReceived: false } => ", had not connected to the page server",
        { Completion.IsCompleted: true } => ", although the page server had done its work,",
        { Progress: var progress } => $", waited for the page server, which had placed {progress.PlacedBytes >> 20} MiB of {progress.PlannedBytes >> 20} MiB,",
    };
}
