using Dh.Images;
using Dh.Preparation;
using Dh.Vmm;
using Dh.Vmm.Firecracker;
using Dh.Vmm.Qemu;

namespace Dh.Tests.Vmm;

/// <summary>The best VMM that works is taken, within what was asked for, and what is passed over is said.</summary>
public sealed class VmmSelectionTests
{
    private static readonly KvmVerdict Works = new(true, "");
    private static readonly KvmVerdict Fails = new(false, "a guest's kernel did not boot under it");

    private static readonly VmmCandidate Firecracker = new("firecracker", Accelerator.Kvm)
    {
        Driver = new FirecrackerDriver(new FirecrackerBinary("/usr/bin/firecracker", new Version(1, 16, 1), new Version(10, 0, 0)), null),
        Program = "/usr/bin/firecracker, 1.16.1",
    };

    private static readonly VmmCandidate NoFirecracker = new("firecracker", Accelerator.Kvm) { Refusal = "there is no firecracker in PATH", Advice = "take it" };
    private static readonly QemuDriver Qemu = new(new QemuBinary("/usr/bin/qemu", new Version(7, 2)));
    private static readonly VmmCandidate QemuKvm = new("qemu", Accelerator.Kvm) { Driver = Qemu, Program = "/usr/bin/qemu, 7.2" };
    private static readonly VmmCandidate QemuTcg = new("qemu", Accelerator.Tcg) { Driver = Qemu, Program = "/usr/bin/qemu, 7.2", IsProved = true };
    private static readonly VmmCandidate NoQemu = new("qemu", Accelerator.Tcg) { Failure = new DhException(DhErrorReason.Host, "QEMU is not installed"), Refusal = "QEMU is not installed" };

    private readonly List<string> _said = [];

    [Fact]
    public async Task Firecracker_comes_first()
    {
        Assert.Equal(("firecracker", Accelerator.Kvm), await TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Auto, _ => Works));
        Assert.Equal(["VMM: firecracker with KVM: /usr/bin/firecracker, 1.16.1"], _said);
    }

    [Fact]
    public async Task Where_KVM_works_QEMU_uses_it()
    {
        Assert.Equal(("qemu", Accelerator.Kvm), await TakeAsync([NoFirecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Auto, _ => Works));
        Assert.Equal(["VMM: not firecracker with KVM: there is no firecracker in PATH", "VMM: qemu with KVM: /usr/bin/qemu, 7.2"], _said);
    }

    [Fact]
    public async Task The_verdict_is_that_of_the_VMM_which_is_to_run() =>
        Assert.Equal(("qemu", Accelerator.Kvm), await TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Auto, driver => driver.Name == "qemu" ? Works : Fails));

    [Fact]
    public async Task Where_KVM_does_not_work_QEMU_emulates()
    {
        Assert.Equal(("qemu", Accelerator.Tcg), await TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Auto, _ => Fails));
        Assert.Equal("VMM: qemu without KVM: /usr/bin/qemu, 7.2", _said[^1]);
    }

    [Fact]
    public async Task What_was_asked_for_is_taken_or_refused()
    {
        Assert.Equal(("qemu", Accelerator.Kvm), await TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Qemu, AcceleratorChoice.Auto, _ => Works));
        Assert.Equal(("qemu", Accelerator.Tcg), await TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Tcg, _ => Works));
        Assert.Equal(
            "Firecracker was asked for and cannot be used here: a guest's kernel did not boot under it. Use --vmm auto; `dh doctor` says more.",
            (await Assert.ThrowsAsync<DhException>(() => TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Firecracker, AcceleratorChoice.Auto, _ => Fails))).Message);
        Assert.Equal(
            "Firecracker was asked for and cannot be used here: there is no firecracker in PATH (take it). Use --vmm auto; `dh doctor` says more.",
            (await Assert.ThrowsAsync<DhException>(() => TakeAsync([NoFirecracker, QemuKvm, QemuTcg], VmmChoice.Firecracker, AcceleratorChoice.Auto, _ => Works))).Message);
        Assert.Equal(
            "KVM was asked for and does not work here: a guest's kernel did not boot under it. Use --accel tcg; `dh doctor` says more.",
            (await Assert.ThrowsAsync<DhException>(() => TakeAsync([NoFirecracker, QemuKvm, QemuTcg], VmmChoice.Auto, AcceleratorChoice.Kvm, _ => Fails))).Message);
        Assert.Equal(
            DhErrorReason.Usage,
            (await Assert.ThrowsAsync<DhException>(() => TakeAsync([Firecracker, QemuKvm, QemuTcg], VmmChoice.Firecracker, AcceleratorChoice.Tcg, _ => Works))).Reason);
    }

    [Fact]
    public async Task Without_any_VMM_the_last_resort_says_what_to_install() => Assert.Equal(
        "QEMU is not installed", (await Assert.ThrowsAsync<DhException>(() => TakeAsync([NoFirecracker, NoQemu], VmmChoice.Auto, AcceleratorChoice.Auto, _ => Works))).Message);

    private async Task<(string Vmm, Accelerator Accelerator)> TakeAsync(
        IReadOnlyList<VmmCandidate> all, VmmChoice vmm, AcceleratorChoice accelerator, Func<IVmmDriver, KvmVerdict> probe)
    {
        var options = new PreparationOptions { Template = Template.Find("python", Dh.TestSupport.Repository.PathOf("templates")), Vmm = vmm, Accelerator = accelerator };
        var (driver, taken) = await VmmSelection.TakeAsync(
            VmmSelection.Wanted(all, options), options, driver => Task.FromResult(probe(driver)), (step, detail) => _said.Add($"{step}: {detail}"));
        return (driver.Name, taken);
    }
}
