using Dh.TestSupport;
using Dh.Vmm;
using Dh.Vmm.Firecracker;

namespace Dh.Tests.Vmm.Firecracker;

/// <summary>What Firecracker and its jailer are told, reviewed in the diff of golden files.</summary>
public sealed class FirecrackerCommandLineTests
{
    private static readonly MachineDescription Machine = new()
    {
        Accelerator = Accelerator.Kvm,
        MemoryMib = 512,
        Cpus = 2,
        Balloon = true,
        KernelPath = "/snapshot/kernel",
        InitrdPath = "/snapshot/initrd",
        RootDiskPath = "/snapshot/root.img",
        TscKhz = 2_445_424,
    };

    [Fact]
    public void A_machine_is_made_by_the_golden_requests() => Golden.Verify(
        string.Join('\n', FirecrackerMachine.Requests(Machine, new Version(1, 16, 1)).Select(request => $"PUT {request.Path} {request.Json}")), "firecracker-boot.txt");

    [Fact]
    public void A_probe_is_the_golden_file() => Golden.Verify(FirecrackerMachine.ProbeFile("/image/vmlinux", "/image/initrd"), "firecracker-probe.txt");

    [Fact]
    public void The_arguments_are_the_golden_ones() => Golden.Verify(string.Join('\n', FirecrackerCommandLine.Build("2f1d")), "firecracker.txt");

    [Theory]
    [InlineData(null, "jailer-boot.txt")]
    [InlineData(16L << 20, "jailer-restore.txt")]
    public void The_jailers_arguments_are_the_golden_ones(long? fileBytes, string golden)
    {
        var limits = new JailLimits(Machine.MemoryBytes + (128 << 20), Machine.Cpus, fileBytes);
        Golden.Verify(string.Join('\n', JailerCommandLine.Build(new Jail("/usr/bin/jailer", 2_000_000_123), "/usr/bin/firecracker", "2f1d", "/home/dh/run/2f1d", limits)), golden);
    }

    [Fact]
    public void A_jail_is_in_the_run_directory()
    {
        Assert.Equal("/home/dh/run/2f1d/firecracker-v1.16/2f1d/root", Jail.RootDirectory("/home/dh/run/2f1d", "/opt/firecracker-v1.16", "2f1d"));
        Assert.Equal("/sys/fs/cgroup/dh/2f1d", Jail.CgroupDirectory("2f1d"));
    }

    [Fact]
    public void Each_jail_has_a_user_of_its_own_that_is_nobody_elses()
    {
        uint[] users = [.. Enumerable.Range(0, 20).Select(_ => Jail.Create("/usr/bin/jailer").UserId)];
        Assert.True(users.Distinct().Count() > 15);
        Assert.All(users, user => Assert.InRange(user, 2_000_000_000u, 2_001_048_575u));
    }

    [Fact]
    public void The_machine_hash_does_not_depend_on_where_files_are()
    {
        var version = new Version(1, 16, 1);
        Assert.Equal(FirecrackerMachine.Hash(Machine, version), FirecrackerMachine.Hash(Machine with { RootDiskPath = "/elsewhere/root.img" }, version));
        Assert.NotEqual(FirecrackerMachine.Hash(Machine, version), FirecrackerMachine.Hash(Machine with { Cpus = 1 }, version));
        Assert.NotEqual(FirecrackerMachine.Hash(Machine, version), FirecrackerMachine.Hash(Machine with { Balloon = false }, version));
    }

    [Theory]
    [InlineData("Load snapshot error: ...: Failed to load snapshot state from file: bitcode error", DhErrorReason.Snapshot, "another snapshot version")]
    [InlineData("Load snapshot error: ...: CRC64 validation failed", DhErrorReason.Snapshot, "device state is damaged")]
    [InlineData("Load snapshot error: ...: IO Error: File too short to contain CRC", DhErrorReason.Snapshot, "cut off")]
    [InlineData("... Total sum of memory regions exceeds largest possible file offset", DhErrorReason.Snapshot, "shorter than guest memory")]
    [InlineData("... Failed to load guest memory: No such file or directory (os error 2)", DhErrorReason.Snapshot, "is missing")]
    [InlineData("... from uffd: Failed to connect to UDS Unix stream: No such file or directory (os error 2)", DhErrorReason.Vmm, "page server's socket")]
    [InlineData("... VsockUnixBackend: Error binding to the host-side Unix socket: Address already in use (os error 98)", DhErrorReason.Vmm, "alone")]
    [InlineData("... Kvm error: Error creating KVM object: Permission denied (os error 13)", DhErrorReason.Host, "join its group")]
    [InlineData("something new", DhErrorReason.Vmm, "dh vm prepare --force")]
    public void What_a_refused_load_means_is_said(string fault, DhErrorReason reason, string part)
    {
        var (found, meaning) = LoadFault.Explain(fault);
        Assert.Equal(reason, found);
        Assert.Contains(part, meaning, StringComparison.Ordinal);
    }
}
