namespace Dh.Vmm.Qemu;

/// <summary>What QEMU needs of this host to restore a machine: all else is kept from it.</summary>
internal static class QemuCage
{
    private const long Mib = 1 << 20;
    private const int MaxThreads = 128; // virtual CPUs come on top; QEMU's block layer has up to 64
    private const long MaxLogBytes = 16 * Mib; // all that it may write to is its log
    private const string KvmDevice = "/dev/kvm";

    // Libraries, stacks, the heaps of its threads (64 MiB of address space for each): 0.9 GiB were seen with two virtual CPUs.
    private const long AddressSpaceMib = 4096;

    private static readonly string[] Libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/qemu", "/usr/share/seabios"];

    // For a QEMU that is started by a script.
    private static readonly string[] Programs = ["/bin", "/usr/bin"];

    /// <summary>The launcher's options for a machine.</summary>
    /// <param name="qemu">The program.</param>
    /// <param name="machine">The machine.</param>
    /// <param name="options">Where and how.</param>
    public static LauncherOptions Of(QemuBinary qemu, MachineDescription machine, VmmStartOptions options)
    {
        long codeBufferMib = machine.Accelerator == Accelerator.Tcg ? QemuCommandLine.RestoreCodeBufferMib : 0;
        List<string> read = [.. Libraries, qemu.Path, options.Installation.PreloadPath, machine.KernelPath, machine.InitrdPath];
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

        return new LauncherOptions
        {
            MaxFileBytes = MaxLogBytes,
            Cage = new CageOptions
            {
                ReadPaths = read,
                Devices = machine.Accelerator == Accelerator.Kvm ? [KvmDevice] : [],
                MaxProcesses = MaxThreads + machine.Cpus,
                MaxAddressSpaceBytes = (machine.MemoryMib + codeBufferMib + AddressSpaceMib) * Mib,
            },
        };
    }

    private static bool IsScript(string path)
    {
        Span<byte> start = stackalloc byte[2];
        using var file = File.OpenHandle(path);
        return RandomAccess.Read(file, start, 0) == 2 && start.SequenceEqual("#!"u8);
    }
}
