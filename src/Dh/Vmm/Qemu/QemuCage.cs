namespace Dh.Vmm.Qemu;

/// <summary>What QEMU needs of this host to boot or restore a machine: all else is kept from it.</summary>
internal static class QemuCage
{
    private const long Mib = 1 << 20;
    private const int MaxThreads = 128; // virtual CPUs come on top; QEMU's block layer has up to 64
    private const long MaxFileBytes = 16 * Mib; // all that it may write to is its log, and after a boot the device state, which is small
    private const int MaxDescriptors = 256;
    private const long OwnMemoryMib = 64; // besides guest memory and translated code
    private const long BootMemoryMib = 64; // more, for kernel and initrd
    private const string KvmDevice = "/dev/kvm";

    // Libraries, stacks, the heaps of its threads (64 MiB of address space for each): 0.9 GiB were seen with two virtual CPUs.
    private const long AddressSpaceMib = 4096;
    private const long AddressSpaceMibPerCpu = 128;

    private static readonly string[] Libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/qemu", "/usr/share/seabios"];

    // For a QEMU that is started by a script.
    private static readonly string[] Programs = ["/bin", "/usr/bin"];

    /// <summary>The launcher's options for a machine.</summary>
    /// <param name="qemu">The program.</param>
    /// <param name="machine">The machine.</param>
    /// <param name="purpose">Boot or restore.</param>
    /// <param name="options">Where and how.</param>
    public static LauncherOptions Of(QemuBinary qemu, MachineDescription machine, QemuPurpose purpose, VmmStartOptions options)
    {
        bool boots = purpose == QemuPurpose.Boot;
        long codeBufferMib = machine.Accelerator != Accelerator.Tcg ? 0 : boots ? QemuCommandLine.BootCodeBufferMib : QemuCommandLine.RestoreCodeBufferMib;
        List<string> read = [.. Libraries, qemu.Path, options.Installation.PreloadPath];
        if (boots)
        {
            read.AddRange([machine.KernelPath, machine.InitrdPath]);
        }

        if (IsScript(qemu.Path))
        {
            read.AddRange(Programs);
        }

        // An installation of its own has its libraries and firmware beside it.
        string directory = Path.GetDirectoryName(qemu.Path)!;
        if (Path.GetFileName(directory) == "bin" && Path.GetDirectoryName(directory) is { } prefix and not ("/" or "/usr"))
        {
            read.Add(prefix);
        }

        return Of(options, read, machine.Accelerator == Accelerator.Kvm ? [KvmDevice] : [], machine.MemoryMib + codeBufferMib + (boots ? BootMemoryMib : 0), machine.Cpus);
    }

    /// <summary>The same for a program that does nothing.</summary>
    /// <param name="options">Where and how.</param>
    public static LauncherOptions ForProbe(VmmStartOptions options) => Of(options, [.. Libraries, options.Installation.LauncherPath], [], 0, 1);

    private static LauncherOptions Of(VmmStartOptions options, IReadOnlyList<string> readPaths, IReadOnlyList<string> devices, long memoryMib, int cpus) => new()
    {
        MaxFileBytes = MaxFileBytes,
        MaxDescriptors = MaxDescriptors,
        Cage = new CageOptions
        {
            ReadPaths = readPaths,
            Devices = devices,
            MaxProcesses = MaxThreads + cpus,
            MaxAddressSpaceBytes = (memoryMib + AddressSpaceMib + (cpus * AddressSpaceMibPerCpu)) * Mib,
            Cgroups = Cgroups.Host.Of(Path.GetFileName(options.RunDirectory), (memoryMib + OwnMemoryMib) * Mib, MaxThreads + cpus, options.CpuWeight),
        },
    };

    private static bool IsScript(string path)
    {
        Span<byte> start = stackalloc byte[2];
        using var file = File.OpenHandle(path);
        return RandomAccess.Read(file, start, 0) == 2 && start.SequenceEqual("#!"u8);
    }
}
