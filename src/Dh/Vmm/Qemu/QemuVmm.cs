using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using Dh.Linux;
using Dh.Paging;
using Microsoft.Win32.SafeHandles;

namespace Dh.Vmm.Qemu;

/// <summary>
/// A microVM under QEMU. Monitor, guest channel, console, handshake socket and device state are inherited descriptors: there is no socket
/// file, and nothing to poll for.
/// </summary>
internal sealed class QemuVmm : IVmm
{
    private const int LastWordsLines = 20;

    private readonly VmmProcess _process;
    private readonly QmpClient _qmp;
    private readonly Socket _channel;
    private readonly Socket _console;
    private readonly TailBuffer _consoleTail = new();
    private readonly string? _statePath;
    private readonly int _stateDescriptor;
    private readonly Accelerator _accelerator;
    private readonly QemuPurpose _purpose;
    private readonly TimeSpan _stepTimeLimit;
    private readonly Socket? _lock;
    private CageLayer[] _lateLock = [];
    private SafeSocketHandle? _handshake;

    private QemuVmm(
        VmmProcess process, Socket qmp, Socket channel, Socket console, Socket? @lock, SafeSocketHandle? handshake, Accelerator accelerator, QemuPurpose purpose,
        VmmStartOptions options, long startedAt, string? statePath, int stateDescriptor)
    {
        _process = process;
        _lock = @lock;
        _accelerator = accelerator;
        _purpose = purpose;
        _stepTimeLimit = options.StepTimeLimit;
        _console = console;
        _statePath = statePath;
        _stateDescriptor = stateDescriptor;
        StartedAt = startedAt;
        _channel = channel;
        _handshake = handshake;
        _qmp = new QmpClient(qmp, options.StepTimeLimit, AppendedLastWords);
        _ = DrainConsoleAsync();
    }

    /// <inheritdoc/>
    public int ProcessId => _process.Pid;

    /// <inheritdoc/>
    public IReadOnlyList<CageLayer> Cage => [.. _process.Cage, .. _lateLock];

    /// <inheritdoc/>
    public Task<VmmExit> Exited => _process.Exited;

    /// <inheritdoc/>
    public long StartedAt { get; }

    /// <summary>Starts a machine that will boot when it is resumed.</summary>
    /// <param name="qemu">The program.</param>
    /// <param name="machine">The machine.</param>
    /// <param name="memoryPath">The file that is its memory; it is made.</param>
    /// <param name="options">Where and how.</param>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    public static async Task<QemuVmm> BootAsync(
        QemuBinary qemu, MachineDescription machine, string memoryPath, VmmStartOptions options, CancellationToken cancellationToken)
    {
        var vmm = Start(qemu, machine, null, memoryPath, null, options);
        try
        {
            await vmm._qmp.ConnectAsync(cancellationToken).ConfigureAwait(false);
            await vmm.LockAsync(cancellationToken).ConfigureAwait(false);
            return vmm;
        }
        catch
        {
            await vmm.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Starts the restore of a snapshot; <see cref="WaitRestoredAsync"/> completes it.</summary>
    /// <param name="qemu">The program.</param>
    /// <param name="machine">The machine that was saved.</param>
    /// <param name="memory">Where its memory comes from; the descriptors in it are closed.</param>
    /// <param name="statePath">The device state.</param>
    /// <param name="options">Where and how.</param>
    /// <exception cref="DhException">It could not be started; nothing is left.</exception>
    public static QemuVmm Restore(QemuBinary qemu, MachineDescription machine, MemoryBackend memory, string statePath, VmmStartOptions options) =>
        Start(qemu, machine, memory, null, statePath, options);

    /// <inheritdoc/>
    public PageServer ServeMemory(IMemorySource source, PageServerOptions options)
    {
        var connection = _handshake ?? throw new InvalidOperationException("This machine's memory comes from no page server, or is served already.");
        _handshake = null;
        return PageServer.Start(connection, source, options);
    }

    /// <inheritdoc/>
    public async Task WaitRestoredAsync(CancellationToken cancellationToken)
    {
        await _qmp.ConnectAsync(cancellationToken).ConfigureAwait(false);
        await _qmp.SetMigrationCapabilitiesAsync(cancellationToken).ConfigureAwait(false);
        try
        {
            await _qmp.MigrateIncomingAsync(_stateDescriptor, cancellationToken).ConfigureAwait(false);
        }
        catch (DhException e)
        {
            await Task.WhenAny(Exited, Task.Delay(TimeSpan.FromSeconds(1), cancellationToken)).ConfigureAwait(false);
            if (Exited.IsCompletedSuccessfully && (await Exited.ConfigureAwait(false)).Signal == PidFd.SigKill)
            {
                throw; // from outside, or by the kernel for memory: the state is not to blame
            }

            throw new DhException(DhErrorReason.Snapshot, $"The device state {_statePath} could not be restored: {e.Message}", e);
        }

        await LockAsync(cancellationToken).ConfigureAwait(false);
    }

    /// <inheritdoc/>
    public Task ResumeAsync(CancellationToken cancellationToken) => _qmp.ExecuteAsync("cont", cancellationToken);

    /// <inheritdoc/>
    public Task<Socket> ConnectGuestAsync(TimeSpan timeLimit, CancellationToken cancellationToken) => Task.FromResult(_channel); // since the start

    /// <inheritdoc/>
    public Task PauseAsync(CancellationToken cancellationToken) => _qmp.ExecuteAsync("stop", cancellationToken);

    /// <inheritdoc/>
    public async Task SaveAsync(string statePath, CancellationToken cancellationToken)
    {
        using var file = File.OpenHandle(statePath, FileMode.CreateNew, FileAccess.Write);
        await _qmp.SetMigrationCapabilitiesAsync(cancellationToken).ConfigureAwait(false);
        await _qmp.MigrateAsync(file, cancellationToken).ConfigureAwait(false);
    }

    /// <inheritdoc/>
    public Task SetBalloonAsync(int guestMib, CancellationToken cancellationToken) => _qmp.SetBalloonAsync((long)guestMib << 20, cancellationToken);

    /// <inheritdoc/>
    public void Kill() => _process.Kill();

    /// <inheritdoc/>
    public void Hold(SafeFileHandle descriptor) => _process.Hold(descriptor);

    /// <inheritdoc/>
    public void LeaveTeardown() => _process.LeaveTeardown();

    /// <inheritdoc/>
    public string LastWords()
    {
        string log = _process.LastLogLines(LastWordsLines);
        string console = _consoleTail.LastLines(LastWordsLines);
        return string.Join('\n', ((string[])[log, console]).Where(text => text.Length > 0));
    }

    /// <inheritdoc/>
    public async ValueTask DisposeAsync()
    {
        await _process.DisposeAsync().ConfigureAwait(false);
        _qmp.Dispose();
        _channel.Dispose();
        _console.Dispose();
        _lock?.Dispose();
        _handshake?.Dispose();
    }

    private static QemuVmm Start(QemuBinary qemu, MachineDescription machine, MemoryBackend? memory, string? bootMemoryPath, string? statePath, VmmStartOptions options)
    {
        var theirs = new List<SafeHandle>();
        var ours = new List<Socket>();
        Socket? @lock = null;
        SafeSocketHandle? handshake = null;
        var purpose = memory is null ? QemuPurpose.Boot : QemuPurpose.Restore;
        var environment = new Dictionary<string, string>
        {
            ["LD_PRELOAD"] = options.Installation.PreloadPath,
            ["DH_RAM_SIZE"] = machine.MemoryBytes.ToString(CultureInfo.InvariantCulture),
        };
        try
        {
            for (int i = 0; i < 3; i++)
            {
                var (our, their) = UnixSockets.CreateSocketPair(UnixSocketKind.Stream);
                ours.Add(our);
                theirs.Add(their);
            }

            // What the VMM reads of a snapshot it gets opened: it may open nothing of it itself.
            int rootDisk = Inherit(theirs, File.OpenHandle(machine.RootDiskPath, FileMode.Open, FileAccess.Read));
            var descriptors = new QemuDescriptors(VmmProcess.FirstDescriptor, VmmProcess.FirstDescriptor + 1, VmmProcess.FirstDescriptor + 2, rootDisk);
            int state = 0;
            if (statePath is not null)
            {
                state = Inherit(theirs, File.OpenHandle(statePath, FileMode.Open, FileAccess.Read));
            }

            switch (memory)
            {
                case MemoryBackend.Uffd uffd:
                    (handshake, var theirHandshake) = UnixSockets.CreatePair(UnixSocketKind.Stream);
                    environment["DH_HANDSHAKE_FD"] = Number(Inherit(theirs, theirHandshake));
                    environment["DH_USERFAULTFD_FD"] = Number(Inherit(theirs, uffd.Device));
                    break;
                case MemoryBackend.File file:
                    environment["DH_MEMORY_FD"] = Number(Inherit(theirs, File.OpenHandle(file.MemoryPath, FileMode.Open, FileAccess.Read)));
                    if (file.Prefault.Count > 0)
                    {
                        environment["DH_PREFAULT_FD"] = Number(Inherit(theirs, MemoryFile.Create("dh-prefault", MemoryMarshal.AsBytes([.. file.Prefault]))));
                    }

                    break;
                case null:
                    environment["DH_BOOT_MEMORY_FD"] = Number(Inherit(theirs, CreateMemory(bootMemoryPath!, machine.MemoryBytes)));
                    break;
            }

            LauncherOptions cage = default;
            if (options.Caged)
            {
                (@lock, var theirLock) = UnixSockets.CreateSocketPair(UnixSocketKind.SequencedPacket);
                environment["DH_LOCK_FD"] = Number(Inherit(theirs, theirLock));
                cage = QemuCage.Of(qemu, machine, purpose, options);
            }

            var arguments = QemuCommandLine.Build(machine, purpose, descriptors);
            long startedAt = Stopwatch.GetTimestamp();
            var process = VmmProcess.Start(options, environment, [qemu.Path, .. arguments], theirs, cage);
            return new QemuVmm(process, ours[0], ours[1], ours[2], @lock, handshake, machine.Accelerator, purpose, options, startedAt, statePath, state);
        }
        catch (Exception e)
        {
            ours.ForEach(socket => socket.Dispose());
            @lock?.Dispose();
            handshake?.Dispose();
            throw e is IOException or UnauthorizedAccessException ? new DhException(DhErrorReason.Snapshot, $"A file of the snapshot cannot be opened: {e.Message}", e) : e;
        }
        finally
        {
            // The VMM has its own copies; with ours open, its end would not be seen.
            theirs.ForEach(descriptor => descriptor.Dispose());
        }
    }

    private async Task LockAsync(CancellationToken cancellationToken)
    {
        if (_lock is not null)
        {
            _lateLock = [await LateLock.CloseAsync(_lock, _accelerator, _purpose, _stepTimeLimit, AppendedLastWords, cancellationToken).ConfigureAwait(false)];
        }
    }

    private static int Inherit(List<SafeHandle> descriptors, SafeHandle descriptor)
    {
        descriptors.Add(descriptor);
        return VmmProcess.FirstDescriptor + descriptors.Count - 1;
    }

    private static SafeFileHandle CreateMemory(string path, long length)
    {
        var file = File.OpenHandle(path, FileMode.CreateNew, FileAccess.ReadWrite);
        try
        {
            RandomAccess.SetLength(file, length);
            return file;
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    private static string Number(int value) => value.ToString(CultureInfo.InvariantCulture);

    private string AppendedLastWords()
    {
        string words = LastWords();
        return words.Length == 0 ? "" : $" Its last words:\n{words}";
    }

    private async Task DrainConsoleAsync()
    {
        byte[] buffer = new byte[4096];
        try
        {
            for (int read; (read = await _console.ReceiveAsync(buffer, SocketFlags.None).ConfigureAwait(false)) > 0;)
            {
                _consoleTail.Append(buffer.AsSpan(0, read));
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // The VMM has ended; what it wrote before is kept.
        }
    }
}
