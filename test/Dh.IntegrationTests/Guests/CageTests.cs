using System.Diagnostics;
using System.Globalization;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;
using Dh.Vmm.Qemu;

namespace Dh.IntegrationTests.Guests;

/// <summary>The cage around QEMU: what a VMM has, what one that was taken over reaches, and what is said where a layer is missing.</summary>
public sealed class CageTests(PreparedHome prepared) : IDisposable
{
    private const int Attempts = 40;
    private const int SigSys = 31; // what a violation of the late lock ends with

    private readonly OwnHome _own = new(prepared);
    private readonly TempDir _directory = new();

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    private DhHome Home => new(_own.Dh.Home);

    private Snapshot Snapshot => new SnapshotStore(Home).FindNewest("python")!;

    [Fact(Timeout = 120_000)]
    public async Task Forty_attempts_from_inside_a_taken_over_VMM_fail()
    {
        var outcomes = new List<string>();
        for (int number = 0; number < Attempts; number++)
        {
            outcomes.Add(await AttemptAsync(number));
        }

        Assert.All(outcomes, outcome => Assert.Matches("^(killed|evil: [^:]+: E[A-Z]+)$", outcome));
        Assert.Equal(Attempts, outcomes.Count);
        Assert.Contains("killed", outcomes);
    }

    [Fact(Timeout = 60_000)]
    public async Task The_same_attempts_succeed_without_a_cage()
    {
        int succeeded = 0;
        for (int number = 0; number < Attempts; number++)
        {
            using var process = Process.Start(new ProcessStartInfo(Path.Combine(AppContext.BaseDirectory, "evil"), [number.ToString(CultureInfo.InvariantCulture)])
            {
                WorkingDirectory = _directory.Path,
                RedirectStandardOutput = true,
            })!;
            await process.WaitForExitAsync(Cancellation);
            Assert.InRange(process.ExitCode, 0, 1);
            succeeded += 1 - process.ExitCode;
        }

        // Some are root's alone; two need what a VMM inherits.
        Assert.InRange(succeeded, Environment.UserName == "root" ? 35 : 20, Attempts);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(MemoryPolicy.Eager)]
    [InlineData(MemoryPolicy.File)]
    public async Task A_VMM_has_no_capability_no_network_nothing_to_write_and_a_user_of_its_own(MemoryPolicy policy)
    {
        var options = new SandboxOptions { Home = Home, MemoryPolicy = policy, RequireIsolation = IsolationClass.EmulatedCage };
        await using var sandbox = await Sandbox.RestoreAsync(Snapshot, options, Cancellation);
        await using var other = await Sandbox.RestoreAsync(Snapshot, options, Cancellation);
        Assert.Equal(IsolationClass.EmulatedCage, sandbox.Isolation);
        Assert.All(sandbox.Cage.Where(layer => layer.IsRequired), layer => Assert.True(layer.IsOn, layer.ToString()));

        await AssertCagedAsync(sandbox.VmmProcessId);
        if (Environment.UserName == "root")
        {
            Assert.NotEqual(Status(sandbox.VmmProcessId)["Uid"], Status(other.VmmProcessId)["Uid"]);
        }

        string limits = await File.ReadAllTextAsync($"/proc/{sandbox.VmmProcessId}/limits", Cancellation);
        Assert.Matches(@"Max core file size +0 +0 ", limits);
        Assert.Matches(@"Max open files +256 +256 ", limits);
        Assert.Matches(@"Max file size +\d+ +\d+ ", limits);
        Assert.Matches(@"Max processes +\d+ +\d+ ", limits);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_VMM_that_boots_an_image_is_caged_and_locked_before_the_guest_runs()
    {
        var driver = await VmmCandidate.FindAsync(QemuDriver.DriverName, VmmPrograms.Default, DhHome.EnsurePrivate(Home.CacheDirectory), Cancellation);
        var options = new VmmStartOptions { RunDirectory = Path.Combine(DhHome.EnsurePrivate(Home.RunDirectory), "boot"), Installation = Installation.Current };
        await using var vmm = await driver.BootAsync(Snapshot.Machine, _directory["memory"], options, Cancellation);
        Assert.All(vmm.Cage.Where(layer => layer.IsRequired), layer => Assert.True(layer.IsOn, layer.ToString()));
        Assert.Contains(vmm.Cage, layer => layer is { Name: CageLayer.LateLock, IsOn: true });
        await AssertCagedAsync(vmm.ProcessId);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_layer_that_is_missing_is_named_before_any_code_runs()
    {
        // In a user namespace, whose root may forbid itself network namespaces, and has one user only.
        string command = $"echo 0 > /proc/sys/user/max_net_namespaces && exec {Repository.PathOf("bin/dh")} exec";
        var result = await _own.Dh.RunAsync(new ProcessStartInfo(
            "unshare", ["--user", "--map-root-user", "sh", "-c", $"{command} --require-isolation emulated+cage -c 'print(1)'"]));
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.Contains("This run would have isolation `emulated`, `emulated+cage` is required. Layer", result.Error, StringComparison.Ordinal);
        Assert.Contains("Layer network is off (unshare: ENOSPC): run as root", result.Error, StringComparison.Ordinal);

        var without = await _own.Dh.RunAsync(new ProcessStartInfo("unshare", ["--user", "--map-root-user", "sh", "-c", $"{command} -v -c 'print(1)'"]));
        Assert.Equal((0, "1\n"), (without.ExitCode, without.Output));
        Assert.Contains("isolation: emulated\n", without.Error, StringComparison.Ordinal);
        await _own.AssertNothingLeftAndUsableAsync("runs with an incomplete cage");
    }

    [Theory(Timeout = 60_000)]
    [InlineData("eager")]
    [InlineData("file")]
    public async Task An_ordinary_user_gets_the_cage_from_a_user_namespace(string policy)
    {
        // The home is this user's, who is no longer called root.
        var result = await _own.Dh.RunAsync(new ProcessStartInfo(
            "unshare",
            ["--user", "--map-user=1000", "--map-group=1000", Repository.PathOf("bin/dh"), "exec", "--memory-policy", policy, "--require-isolation", "emulated+cage", "-v", "-c", "print('hello')"]));
        Assert.Equal((0, "hello\n"), (result.ExitCode, result.Output));
        Assert.Contains("isolation: emulated+cage\n", result.Error, StringComparison.Ordinal);
        await _own.AssertNothingLeftAsync("a run of an ordinary user");
    }

    [Fact(Timeout = 60_000)]
    public async Task A_QEMU_that_only_its_owner_may_read_runs_as_its_owner_and_says_so()
    {
        string qemu = _own.Write("qemu", "#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 \"$@\"\n");
        var environment = new Dictionary<string, string> { ["DH_QEMU"] = qemu };
        File.SetUnixFileMode(qemu, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        Assert.Equal(new ProgramResult(0, "2\n", ""), await _own.Dh.RunAsync(["exec", "-c", "1+1"], environment: environment));
        if (Environment.UserName == "root")
        {
            var refused = await _own.Dh.RunAsync(["exec", "--require-isolation", "emulated+cage", "-c", "1+1"], environment: environment);
            Assert.Equal((125, ""), (refused.ExitCode, refused.Output));
            Assert.Contains("Layer user is off (permissions: EACCES): let others read and execute QEMU", refused.Error, StringComparison.Ordinal);
        }
    }

    [Fact(Timeout = 60_000)]
    public async Task A_launcher_that_is_killed_takes_its_caged_VMM_along()
    {
        await using var sandbox = await Sandbox.RestoreAsync(Snapshot, new SandboxOptions { Home = Home, RequireIsolation = IsolationClass.EmulatedCage }, Cancellation);
        int vmm = sandbox.VmmProcessId;
        await Processes.SignalAsync(int.Parse(Status(vmm)["PPid"], CultureInfo.InvariantCulture), "KILL");
        long start = Stopwatch.GetTimestamp();
        while (IsAlive(vmm) && Stopwatch.GetElapsedTime(start) < TimeSpan.FromSeconds(1))
        {
            await Task.Delay(5, Cancellation);
        }

        Assert.False(IsAlive(vmm));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_run_that_demands_a_cage_gets_one_and_says_so()
    {
        var result = await _own.Dh.ExecAsync("print('caged')", "--require-isolation", "emulated+cage", "--json");
        Assert.Equal(0, result.ExitCode);
        Assert.Contains("\"isolation\":\"emulated+cage\"", result.Output, StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_guest_sees_no_more_devices_than_it_needs()
    {
        const string Code = """
            import os
            for bus in ('acpi', 'i2c', 'nd', 'nvme', 'pci', 'platform', 'pnp', 'scsi', 'serio', 'usb', 'virtio'):
                devices = f'/sys/bus/{bus}/devices'
                for device in sorted(os.listdir(devices)) if os.path.exists(devices) else []:
                    kind = f'{devices}/{device}/device'
                    print(bus, device, open(kind).read().strip() if bus == 'virtio' else '')
            flags = next(line for line in open('/proc/cpuinfo') if line.startswith('flags')).split()
            print('nested virtualization:', [flag for flag in ('svm', 'vmx') if flag in flags])
            print('network:', os.listdir('/sys/class/net'))
            """;
        var result = await _own.Dh.ExecAsync(Code);
        Assert.Equal((0, ""), (result.ExitCode, result.Error));
        Golden.Verify(result.Output, "guest-devices.txt");
    }

    [Fact(Timeout = 60_000)]
    public async Task QEMU_has_no_more_objects_than_a_machine_needs()
    {
        var qemu = await QemuBinary.FindAsync(Cancellation);
        var arguments = QemuCommandLine.Build(Snapshot.Machine, QemuPurpose.Restore, new QemuDescriptors(0, 0, 0))
            .Select(argument => argument.StartsWith("socket,id=", StringComparison.Ordinal) ? $"null,{argument.Split(',')[1]}" : argument)
            .Where(argument => argument is not ("-incoming" or "defer"));
        using var process = Process.Start(new ProcessStartInfo(qemu.Path, [.. arguments, "-monitor", "stdio"]) { RedirectStandardInput = true, RedirectStandardOutput = true })!;
        await process.StandardInput.WriteAsync("info qom-tree\nquit\n");
        process.StandardInput.Close();
        string output = await process.StandardOutput.ReadToEndAsync(Cancellation);
        await process.WaitForExitAsync(Cancellation);
        string tree = string.Join('\n', output.Split('\n').Select(line => line.TrimEnd('\r')).Where(line => line.StartsWith("/machine", StringComparison.Ordinal) || line.StartsWith("  ", StringComparison.Ordinal)));
        Assert.Contains("virtio-blk", tree, StringComparison.Ordinal);
        Assert.All((string[])["vapic", "pci", "usb", "-net", "nvme", "vga", "slirp"], device => Assert.DoesNotContain(device, tree, StringComparison.OrdinalIgnoreCase));
        if (qemu.Version is { Major: 7, Minor: 2 })
        {
            Golden.Verify(tree, "qom-tree-7.2.txt"); // other versions name other inner parts
        }
    }

    public void Dispose()
    {
        _own.Dispose();
        _directory.Dispose();
    }

    // Whoever adopts a dead process may take a while to reap it.
    private static bool IsAlive(int pid) => Directory.Exists($"/proc/{pid}") && !Status(pid)["State"].StartsWith('Z');

    private static Dictionary<string, string> Status(int pid) => File.ReadLines($"/proc/{pid}/status")
        .Select(line => line.Split(":\t", 2)).Where(fields => fields.Length == 2).ToDictionary(fields => fields[0], fields => fields[1]);

    /// <summary>Looks at what a VMM's process has.</summary>
    private static async Task AssertCagedAsync(int pid)
    {
        var status = Status(pid);
        Assert.All((string[])["CapInh", "CapPrm", "CapEff", "CapAmb"], set => Assert.Equal("0000000000000000", status[set]));
        Assert.Equal(("1", "2"), (status["NoNewPrivs"], status["Seccomp"]));
        Assert.EndsWith("\t1", status["NSpid"], StringComparison.Ordinal);
        if (Environment.UserName == "root")
        {
            Assert.Equal("0000000000000000", status["CapBnd"]);
            Assert.InRange(long.Parse(status["Uid"].Split('\t')[0], CultureInfo.InvariantCulture), 0x70000000, 0x70000000 + (1 << 22));
        }

        string[] interfaces = [.. (await File.ReadAllLinesAsync($"/proc/{pid}/net/dev", Cancellation)).Skip(2).Select(line => line.Split(':')[0].Trim())];
        Assert.Equal(["lo"], interfaces);

        // ID PARENT DEVICE ROOT PLACE OPTIONS ...: nothing of the file system can be written to.
        string[][] mounts = [.. (await File.ReadAllLinesAsync($"/proc/{pid}/mountinfo", Cancellation)).Select(line => line.Split(' '))];
        Assert.NotEmpty(mounts);
        Assert.All(mounts, mount => Assert.Contains("ro", mount[5].Split(',')));
        Assert.All(mounts, mount => Assert.Contains("nosuid", mount[5].Split(',')));
    }

    /// <summary>Restores a machine whose VMM makes one attempt when it runs.</summary>
    /// <returns>What became of it.</returns>
    private async Task<string> AttemptAsync(int number)
    {
        string installation = Directory.CreateDirectory(_directory[$"evil-{number}/native"]).Parent!.FullName;
        File.CreateSymbolicLink(Path.Combine(installation, "native", "launch"), Installation.Current.LauncherPath);
        File.Copy(Path.Combine(AppContext.BaseDirectory, "evil.so"), Path.Combine(installation, "native", "vmm_preload.so"));
        var snapshot = Snapshot;
        var options = new VmmStartOptions
        {
            RunDirectory = Path.Combine(DhHome.EnsurePrivate(Home.RunDirectory), Guid.NewGuid().ToString("N")),
            Installation = new Installation(installation),
        };
        var qemu = await QemuBinary.FindAsync(Cancellation);
        await using var vmm = QemuVmm.Restore(qemu, snapshot.Machine, new MemoryBackend.File(snapshot.MemoryPath, []), snapshot.StatePath, options);
        await vmm.WaitRestoredAsync(Cancellation);
        Assert.True(Isolation.IsCaged(vmm.Cage));
        try
        {
            await vmm.ResumeAsync(Cancellation);
        }
        catch (DhException)
        {
            var exit = await vmm.Exited.WaitAsync(TimeSpan.FromSeconds(1), Cancellation);
            return exit.Signal == SigSys ? "killed" : exit.ToString();
        }

        return vmm.LastWords().Split('\n').FirstOrDefault(line => line.StartsWith("evil: ", StringComparison.Ordinal)) ?? $"attempt {number} was not made";
    }
}
