using System.Globalization;
using System.IO.Hashing;
using System.Text;

namespace Dh.Vmm.Qemu;

/// <summary>What QEMU is started for.</summary>
internal enum QemuPurpose
{
    /// <summary>To boot an image; its memory is a shared mapping of the file that becomes the snapshot's.</summary>
    Boot,

    /// <summary>To restore a snapshot.</summary>
    Restore,
}

/// <summary>The descriptor numbers that QEMU inherits; without one for the root disk it opens that by its path.</summary>
internal readonly record struct QemuDescriptors(int Qmp, int Channel, int Console, int? RootDisk = null);

/// <summary>
/// QEMU's arguments, from a machine description: a pure function that booting and restoring share, because whatever is part of the device
/// state must be the same for both. The preload library provides the memory of either. They differ in whether it is shared, in the kernel, in <c>-incoming</c>, and in TCG's code buffer.
/// </summary>
internal static class QemuCommandLine
{
    /// <summary>The name of the guest channel's port.</summary>
    public const string ChannelName = "dh.channel";

    // The size of TCG's code buffer is no machine state. A restored machine runs briefly and fills little of it: a run with a Java engine 50 MiB,
    // and with less than that QEMU drops and translates all of it again, which costs that run some tenths of a second.
    internal const int RestoreCodeBufferMib = 64;

    // What QEMU takes by itself, at most (tcg/region.c).
    internal const int BootCodeBufferMib = 1024;

    private const int RootDiskSet = 1;

    /// <summary>The arguments, without the program.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="purpose">Boot or restore.</param>
    /// <param name="descriptors">What QEMU inherits.</param>
    public static IReadOnlyList<string> Build(MachineDescription machine, QemuPurpose purpose, QemuDescriptors descriptors)
    {
        string size = $"{machine.MemoryMib}M";
        string rootDisk = descriptors.RootDisk is null ? Escape(machine.RootDiskPath) : $"/dev/fdset/{RootDiskSet}";
        string codeBuffer = purpose == QemuPurpose.Restore ? $",tb-size={RestoreCodeBufferMib}" : "";
        // What is shared, QEMU leaves out of the device state.
        string memory = $"memory-backend-ram,id=ram0,size={size}{(purpose == QemuPurpose.Boot ? ",share=on" : "")}";
        // A restored machine has its kernel in memory; QEMU would read the file into memory of its own all the same.
        string[] kernel = purpose == QemuPurpose.Boot ? ["-kernel", machine.KernelPath, "-initrd", machine.InitrdPath, "-append", KernelArguments(machine)] : [];
        List<string> arguments =
        [
            "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot", "-S",
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-object", memory,
            "-machine", "microvm,memory-backend=ram0,dump-guest-core=off,mem-merge=off,x-option-roms=off,usb=off,pcie=off",
            "-global", "apic-common.vapic=off",
            "-accel", machine.Accelerator == Accelerator.Kvm ? "kvm" : $"tcg,thread=multi{codeBuffer}",
            // Emulating AVX costs more than it gives; spec-ctrl is what TCG lacks of this model. KVM guests get no nested virtualization. Without
            // arat Linux does not trust the local APIC's timer to wake an idle CPU, and ticks 250 times a second for ever (tick_is_oneshot_available).
            "-cpu", machine.Accelerator == Accelerator.Kvm ? "host,svm=off,vmx=off" : "Nehalem,spec-ctrl=off,arat=on",
            "-smp", machine.Cpus.ToString(CultureInfo.InvariantCulture),
            "-m", size,
            "-chardev", $"socket,id=qmp,fd={descriptors.Qmp}", "-mon", "chardev=qmp,mode=control",
            "-chardev", $"socket,id=console,fd={descriptors.Console}", "-serial", "chardev:console",
            "-chardev", $"socket,id=channel,fd={descriptors.Channel}",
            "-device", "virtio-serial-device,max_ports=2", "-device", $"virtserialport,chardev=channel,name={ChannelName}",
            "-drive", $"if=none,id=root,file={rootDisk},format=raw,read-only=on,file.locking=off", "-device", "virtio-blk-device,drive=root",
            .. kernel,
        ];
        if (machine.Balloon)
        {
            arguments.AddRange(["-device", "virtio-balloon-device"]);
        }

        if (descriptors.RootDisk is { } descriptor)
        {
            arguments.AddRange(["-add-fd", $"fd={descriptor},set={RootDiskSet}"]);
        }

        if (purpose == QemuPurpose.Restore)
        {
            arguments.AddRange(["-incoming", "defer"]);
        }

        return arguments;
    }

    /// <summary>A hash of what booting and restoring must have in common, for the manifest.</summary>
    /// <param name="machine">The machine; its paths do not count.</param>
    public static string MachineHash(MachineDescription machine)
    {
        var withoutPaths = machine with { KernelPath = "kernel", InitrdPath = "initrd", RootDiskPath = "root.img" };
        var arguments = Build(withoutPaths, QemuPurpose.Boot, new QemuDescriptors(0, 1, 2));
        return Convert.ToHexStringLower(XxHash128.Hash(Encoding.UTF8.GetBytes(string.Join('\n', arguments))));
    }

    // One guest has one tenant: mitigations inside it protect nobody. 8250.nr_uarts: probing absent ports is slow under TCG.
    private static string KernelArguments(MachineDescription machine) =>
        "console=ttyS0 quiet panic=-1 reboot=t mitigations=off init_on_free=1 random.trust_cpu=on 8250.nr_uarts=1"
        + (machine.Accelerator == Accelerator.Tcg ? string.Create(CultureInfo.InvariantCulture, $" tsc=reliable tsc_early_khz={machine.TscKhz}") : "");

    // In QEMU's option syntax a comma ends a value; a doubled one stands for itself.
    private static string Escape(string path) => path.Replace(",", ",,", StringComparison.Ordinal);
}
