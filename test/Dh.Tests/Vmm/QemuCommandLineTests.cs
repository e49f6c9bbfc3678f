using Dh.TestSupport;
using Dh.Vmm;
using Dh.Vmm.Qemu;

namespace Dh.Tests.Vmm;

/// <summary>QEMU's command line, reviewed in the diff of golden files.</summary>
public sealed class QemuCommandLineTests
{
    private static readonly QemuDescriptors Descriptors = new(10, 11, 12, 13);

    private static MachineDescription Machine(Accelerator accelerator) => new()
    {
        Accelerator = accelerator,
        MemoryMib = 512,
        Cpus = 2,
        KernelPath = "/snapshot/kernel",
        InitrdPath = "/snapshot/initrd",
        RootDiskPath = "/snapshot/root,disk.img",
        TscKhz = 2_445_424,
    };

    [Theory]
    [InlineData(Accelerator.Tcg, true)]
    [InlineData(Accelerator.Tcg, false)]
    [InlineData(Accelerator.Kvm, true)]
    [InlineData(Accelerator.Kvm, false)]
    public void It_is_the_golden_files(Accelerator accelerator, bool boot)
    {
        var arguments = QemuCommandLine.Build(Machine(accelerator), boot ? QemuPurpose.Boot : QemuPurpose.Restore, Descriptors);
        Golden.Verify(string.Join('\n', arguments), $"qemu-{accelerator}-{(boot ? "boot" : "restore")}.txt".ToLowerInvariant());
    }

    [Fact]
    public void The_machine_hash_does_not_depend_on_where_files_are()
    {
        var machine = Machine(Accelerator.Tcg);
        Assert.Equal(QemuCommandLine.MachineHash(machine), QemuCommandLine.MachineHash(machine with { RootDiskPath = "/elsewhere/root.img" }));
        Assert.NotEqual(QemuCommandLine.MachineHash(machine), QemuCommandLine.MachineHash(machine with { Cpus = 1 }));
    }

    [Theory]
    [InlineData("exited 0", 0, 0)]
    [InlineData("signaled 9", -1, 9)]
    public void A_launchers_report_is_understood(string packet, int exitCode, int signal)
    {
        Assert.Equal(new VmmExit(exitCode, signal), VmmProcess.ParseExit(packet));
    }

    [Theory]
    [InlineData("")]
    [InlineData("exited")]
    [InlineData("exited x")]
    [InlineData("exited 1 2")]
    public void What_is_no_report_of_an_end_is_none(string packet) => Assert.Null(VmmProcess.ParseExit(packet));
}
