using System.Globalization;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Vmm;

/// <summary>
/// A VMM's process as its owner sees it: through the launcher (<c>native/launch.c</c>), which is its parent, reaps it, and removes its run
/// directory when this end of the control socket closes, in whatever way.
/// </summary>
internal sealed class VmmProcess : IAsyncDisposable
{
    /// <summary>The first descriptor number that the VMM inherits; the launcher keeps those below for itself.</summary>
    public const int FirstDescriptor = 10;

    /// <summary>The file in the run directory that has what the VMM prints (native/launch.c).</summary>
    public const string LogName = "vmm.log";

    private const int ControlDescriptor = 3;
    private const int MaxPacket = 4096;
    private static readonly TimeSpan StartTimeLimit = TimeSpan.FromSeconds(10);
    private static readonly TimeSpan EndTimeLimit = TimeSpan.FromSeconds(1);
    private static readonly TimeSpan TeardownTimeLimit = TimeSpan.FromSeconds(10);

    private readonly ChildProcess _launcher;
    private readonly Socket _control;
    private readonly PidFd _pidFd;
    private readonly string _runDirectory;
    private readonly TaskCompletionSource<VmmExit> _exited = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Task _watching;
    private bool _leaveTeardown;
    private bool _disposed;

    private VmmProcess(ChildProcess launcher, Socket control, int pid, PidFd pidFd, IReadOnlyList<CageLayer> cage, string runDirectory)
    {
        Cage = cage;
        _launcher = launcher;
        _control = control;
        _pidFd = pidFd;
        _runDirectory = runDirectory;
        Pid = pid;
        _watching = WatchAsync();
    }

    /// <summary>The VMM's number.</summary>
    public int Pid { get; }

    /// <summary>The layers of its cage; none without one. That of its cgroups comes while it starts.</summary>
    public IReadOnlyList<CageLayer> Cage { get; private set; }

    /// <summary>Completes when the VMM was reaped, or when its launcher, without which it cannot live, is gone.</summary>
    public Task<VmmExit> Exited => _exited.Task;

    /// <summary>Starts a launcher and, through it, the VMM.</summary>
    /// <param name="options">Where.</param>
    /// <param name="environment">The VMM's environment, besides PATH.</param>
    /// <param name="command">Program and arguments.</param>
    /// <param name="descriptors">What the VMM inherits, from number <see cref="FirstDescriptor"/> on.</param>
    /// <param name="launcherOptions">What else the launcher does.</param>
    /// <exception cref="DhException">It did not start; nothing is left.</exception>
    public static VmmProcess Start(
        VmmStartOptions options,
        IReadOnlyDictionary<string, string> environment,
        IReadOnlyList<string> command,
        IReadOnlyList<SafeHandle> descriptors,
        LauncherOptions launcherOptions = default)
    {
        var (control, theirs) = UnixSockets.CreateSocketPair(UnixSocketKind.SequencedPacket);
        ChildProcess? launcher = null;
        try
        {
            using (theirs)
            {
                List<string> arguments = ["supervise", "--run-dir", options.RunDirectory];
                arguments.AddRange(environment.SelectMany(variable => (string[])["--env", $"{variable.Key}={variable.Value}"]));
                if (launcherOptions.MaxFileBytes is { } bytes)
                {
                    arguments.AddRange(["--rlimit-fsize", bytes.ToString(CultureInfo.InvariantCulture)]);
                }

                if (launcherOptions.MaxDescriptors is { } count)
                {
                    arguments.AddRange(["--rlimit-nofile", count.ToString(CultureInfo.InvariantCulture)]);
                }

                if (launcherOptions.CgroupDirectory is { } cgroup)
                {
                    arguments.AddRange(["--cgroup", cgroup]);
                }

                arguments.AddRange(launcherOptions.Cage is { } cage ? Arguments(cage) : []);
                arguments.Add("--");
                arguments.AddRange(command);
                List<(int, SafeHandle)> inherited = [(ControlDescriptor, theirs), .. descriptors.Select((descriptor, index) => (FirstDescriptor + index, descriptor))];
                launcher = ChildProcess.Start(options.Installation.LauncherPath, arguments, new Dictionary<string, string>(), inherited);
            }

            var (pid, pidFd, layers) = ReceiveStarted(control.SafeHandle, command[0]);
            return new VmmProcess(launcher, control, pid, pidFd, layers, options.RunDirectory);
        }
        catch (Exception e)
        {
            control.Dispose();
            if (launcher is not null)
            {
                if (!launcher.WaitAndReap(EndTimeLimit))
                {
                    KillLauncher(launcher);
                }

                launcher.Dispose();
            }

            throw e is LinuxException ? new DhException(DhErrorReason.Vmm, $"The launcher {options.Installation.LauncherPath} could not be started: {e.Message}", e) : e;
        }
    }

    /// <summary>Kills the VMM at once; its end is seen by <see cref="Exited"/>.</summary>
    public void Kill()
    {
        try
        {
            _pidFd.SendSignal(PidFd.SigKill);
        }
        catch (ObjectDisposedException)
        {
            // Disposed: the launcher has killed it, or is about to.
        }
    }

    /// <summary>Has the launcher keep a descriptor open until it has reaped the VMM.</summary>
    /// <param name="descriptor">The descriptor, which stays open here, too.</param>
    /// <exception cref="LinuxException">The launcher did not take it.</exception>
    public void Hold(SafeFileHandle descriptor)
    {
        try
        {
            FdPassing.Send(_control.SafeHandle, "hold"u8, descriptor);
        }
        catch (Exception e) when (e is ObjectDisposedException or LinuxException { Errno: Errno.EPIPE or Errno.ECONNRESET })
        {
            // Disposed, or without its launcher: the VMM ends.
        }
    }

    /// <summary>The last lines that the VMM has printed, without control characters; empty when there are none.</summary>
    /// <param name="count">How many.</param>
    public string LastLogLines(int count)
    {
        try
        {
            return TailBuffer.LastLines(File.ReadAllText(Path.Combine(_runDirectory, LogName)), count);
        }
        catch (IOException)
        {
            return ""; // the launcher is gone, and the directory with it
        }
    }

    /// <summary>Disposing does not wait for the launcher from now on.</summary>
    public void LeaveTeardown() => _leaveTeardown = true;

    /// <summary>Kills the VMM, lets the launcher reap it and remove the run directory, and waits for that unless told not to.</summary>
    public async ValueTask DisposeAsync()
    {
        if (_disposed)
        {
            return;
        }

        _disposed = true;
        Kill();
        if (_leaveTeardown)
        {
            return; // the descriptors close with this process, and the launcher does the rest
        }

        // The launcher takes the end of our sending as the order to end, and closes its side when all is done.
        try
        {
            _control.Shutdown(SocketShutdown.Send);
        }
        catch (SocketException)
        {
            // It has ended already.
        }

        await Task.WhenAny(_watching, Task.Delay(TeardownTimeLimit)).ConfigureAwait(false);
        _control.Dispose();
        if (!_launcher.WaitAndReap(EndTimeLimit))
        {
            KillLauncher(_launcher);
        }

        _launcher.Dispose();
        if (Directory.Exists(_runDirectory))
        {
            RemoveForLauncher();
        }

        _pidFd.Dispose();
    }

    // It is stopped, or hangs. Its VMM ends with it; what it has made, whoever killed it removes, or the next run does.
    private static void KillLauncher(ChildProcess launcher)
    {
        launcher.PidFd.SendSignal(PidFd.SigKill);
        if (!launcher.WaitAndReap(TeardownTimeLimit))
        {
            throw new DhException(DhErrorReason.Vmm, $"The launcher (process {launcher.Pid}) was killed and did not end within {TeardownTimeLimit.TotalSeconds:0} s.");
        }
    }

    // The launcher itself was killed. A VMM that takes long to end is left to the next run, which finds the directory unlocked.
    private void RemoveForLauncher()
    {
        _pidFd.WaitForExit(EndTimeLimit);
        try
        {
            Cgroups.Host.EndAbandoned(Path.GetFileName(_runDirectory));
            Directory.Delete(_runDirectory, recursive: true);
        }
        catch (IOException)
        {
            // Its cgroup still has a process.
        }
    }

    /// <summary>Parses what a launcher says of a VMM's end.</summary>
    internal static VmmExit? ParseExit(string packet) => packet.Split(' ') switch
    {
        ["exited", var code] when int.TryParse(code, NumberStyles.None, CultureInfo.InvariantCulture, out int value) => new VmmExit(value, 0),
        ["signaled", var signal] when int.TryParse(signal, NumberStyles.None, CultureInfo.InvariantCulture, out int value) => new VmmExit(-1, value),
        _ => null,
    };

    private static List<string> Arguments(CageOptions cage)
    {
        List<string> arguments = ["--cage-processes", cage.MaxProcesses.ToString(CultureInfo.InvariantCulture)];
        if (cage.MaxAddressSpaceBytes is { } bytes)
        {
            arguments.AddRange(["--cage-address-space", bytes.ToString(CultureInfo.InvariantCulture)]);
        }

        arguments.AddRange(cage.ReadPaths.SelectMany(path => (string[])["--cage-read", path]));
        arguments.AddRange(cage.Devices.SelectMany(path => (string[])["--cage-device", path]));
        foreach (var cgroup in cage.Cgroups)
        {
            arguments.AddRange(["--cage-cgroup", cgroup.Directory]);
            arguments.AddRange(cgroup.Settings.SelectMany(setting => (string[])["--cage-cgroup-set", $"{setting.File}={setting.Value}"]));
        }

        return arguments;
    }

    private static (int Pid, PidFd PidFd, IReadOnlyList<CageLayer> Cage) ReceiveStarted(SafeSocketHandle control, string program)
    {
        if (!Poll.Wait(control, StartTimeLimit))
        {
            throw new DhException(DhErrorReason.Vmm, $"The launcher did not start {program} within {StartTimeLimit.TotalSeconds:0} s.");
        }

        byte[] packet = new byte[MaxPacket];
        var received = new List<SafeFileHandle>();
        int length = FdPassing.Receive(control, packet, received);
        string text = length > 0 ? Encoding.UTF8.GetString(packet, 0, length) : "";
        if (text.Split(' ') is ["started", var pid, .. var layers] && received.Count == 1 && int.TryParse(pid, NumberStyles.None, CultureInfo.InvariantCulture, out int number))
        {
            return (number, new PidFd(received[0]), CageLayer.Parse(layers));
        }

        received.ForEach(descriptor => descriptor.Dispose());
        throw new DhException(DhErrorReason.Vmm, text.Split(' ', 4) is ["failed", var step, var errno, ..]
            ? $"{program} could not be started: {step} failed with {errno}{(text.Split(' ', 4) is [_, _, _, var what] ? $" ({what})" : "")}."
            : $"The launcher ended before it had started {program}{(text.Length > 0 ? $" (it said `{text}`)" : "")}.");
    }

    private async Task WatchAsync()
    {
        byte[] packet = new byte[MaxPacket];
        try
        {
            for (int length; (length = await _control.ReceiveAsync(packet, SocketFlags.None).ConfigureAwait(false)) > 0;)
            {
                string text = Encoding.UTF8.GetString(packet, 0, length);
                if (ParseExit(text) is { } exit)
                {
                    _exited.TrySetResult(exit);
                }
                else if (text.Split(' ') is ["joined", var layer])
                {
                    Cage = [.. Cage, .. CageLayer.Parse([layer])];
                }
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException or DhException)
        {
            // The same as an end of file: unix(7) reports ECONNRESET when the peer closed with unread data. So is a launcher that cannot be understood.
        }

        // Without its launcher a VMM gets SIGKILL as its parent-death signal; one that has changed its user since does not (prctl(2)).
        if (!_exited.Task.IsCompleted)
        {
            Kill();
        }

        _exited.TrySetResult(new VmmExit(-1, PidFd.SigKill));
    }
}

/// <summary>What a launcher does for a VMM beyond starting it.</summary>
internal readonly record struct LauncherOptions
{
    /// <summary>The longest file that the VMM may write, in bytes (RLIMIT_FSIZE); null without a limit.</summary>
    public long? MaxFileBytes { get; init; }

    /// <summary>The descriptors that the VMM may have open (RLIMIT_NOFILE); null for as many as this process.</summary>
    public int? MaxDescriptors { get; init; }

    /// <summary>The cage that the VMM is put into; null for none.</summary>
    public CageOptions? Cage { get; init; }

    /// <summary>The cgroup that the VMM makes for itself; the launcher removes it when the VMM was reaped.</summary>
    public string? CgroupDirectory { get; init; }
}
