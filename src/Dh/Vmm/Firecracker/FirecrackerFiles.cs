namespace Dh.Vmm.Firecracker;

/// <summary>
/// The names of everything that Firecracker is told of, in its working directory: the run directory, or the root of its jail. They are part of
/// the device state, which is why they are the same for every machine: a snapshot moves, and its clones have a directory each. And a unix
/// socket's path has at most 107 bytes.
/// </summary>
internal static class FirecrackerFiles
{
    public const string ApiSocket = "api.sock";
    public const string VsockSocket = "v.sock";
    public const string UffdSocket = "uffd.sock";
    public const string Kernel = "kernel";
    public const string Initrd = "initrd";
    public const string RootDisk = "root.img";
    public const string State = "state";
    public const string Memory = "memory";
}
