using System.IO.Hashing;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization.Metadata;

namespace Dh.Vmm.Firecracker;

/// <summary>
/// A machine's configuration as the requests that make it, in their order: a pure function of the machine description. A restored machine has
/// all of it in its device state.
/// </summary>
internal static class FirecrackerMachine
{
    /// <summary>The guest's number on its vsock bus; each machine has a bus of its own.</summary>
    public const uint GuestCid = 3;

    private static readonly Version EntropySince = new(1, 4, 0);

    /// <summary>The requests, each with its path.</summary>
    /// <param name="machine">The machine; its files are those in Firecracker's working directory.</param>
    /// <param name="version">Firecracker's.</param>
    public static IReadOnlyList<(string Path, string Json)> Requests(MachineDescription machine, Version version)
    {
        List<(string, string)> requests =
        [
            Request("/machine-config", new MachineConfiguration(machine.Cpus, machine.MemoryMib), FirecrackerJson.Default.MachineConfiguration),
            Request("/boot-source", Boot(FirecrackerFiles.Kernel, FirecrackerFiles.Initrd, " dh.channel=vsock"), FirecrackerJson.Default.BootSource),
            // Not as a root device: that would add to the kernel's command line what init does itself.
            Request("/drives/root", new Drive("root", FirecrackerFiles.RootDisk, IsRootDevice: false, IsReadOnly: true), FirecrackerJson.Default.Drive),
            Request("/vsock", new VsockDevice(GuestCid, FirecrackerFiles.VsockSocket), FirecrackerJson.Default.VsockDevice),
        ];
        if (machine.Balloon)
        {
            requests.Add(Request("/balloon", new BalloonDevice(0, DeflateOnOom: true), FirecrackerJson.Default.BalloonDevice));
        }

        if (version >= EntropySince)
        {
            requests.Add(Request("/entropy", new EntropyDevice(), FirecrackerJson.Default.EntropyDevice));
        }

        return requests;
    }

    /// <summary>A hash of what booting and restoring must have in common, for the manifest.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="version">Firecracker's.</param>
    public static string Hash(MachineDescription machine, Version version) => Convert.ToHexStringLower(
        XxHash128.Hash(Encoding.UTF8.GetBytes(string.Join('\n', Requests(machine, version).Select(request => $"{request.Path} {request.Json}")))));

    /// <summary>The machine that only shows whether a kernel boots.</summary>
    /// <param name="kernelPath">The ELF kernel.</param>
    /// <param name="initrdPath">The initrd.</param>
    public static string ProbeFile(string kernelPath, string initrdPath) => JsonSerializer.Serialize(
        new MachineFile(Boot(kernelPath, initrdPath, " dh.probe"), [], new MachineConfiguration(1, 256)), FirecrackerJson.Default.MachineFile);

    // reboot=k: the keyboard controller's reset is what ends Firecracker. One guest has one tenant: mitigations inside it protect nobody.
    // init_on_free: what the guest's kernel has free is a hole of the memory file.
    private static BootSource Boot(string kernel, string initrd, string more) => new(
        kernel, initrd, $"console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 mitigations=off init_on_free=1 random.trust_cpu=on{more}");

    private static (string Path, string Json) Request<T>(string path, T body, JsonTypeInfo<T> type) => (path, JsonSerializer.Serialize(body, type));
}
