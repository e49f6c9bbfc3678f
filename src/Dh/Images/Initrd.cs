using System.Text;

namespace Dh.Images;

/// <summary>
/// The guest's first root: init, the modules that it loads and the list of them in load order, and the directories that it mounts on.
/// Not compressed: it has about a megabyte, and decompressing is work that an emulated CPU does slowly.
/// </summary>
internal static class Initrd
{
    private const UnixFileMode ReadableMode = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.OtherRead;
    private const UnixFileMode ExecutableMode = ReadableMode | UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;

    private const string VsockMark = "vsock "; // guest/init.c, VSOCK_MARK

    private static readonly string[] Directories = ["dev", "proc", "sys", "run", "tmp", "root", "newroot", "modules"];

    /// <summary>Writes it.</summary>
    /// <param name="stream">Where to; stays open.</param>
    /// <param name="init">The program that the kernel starts: a static ELF file.</param>
    /// <param name="modules">Those that every machine loads, in load order.</param>
    /// <param name="vsockModules">Those that a machine with a vsock channel loads after them.</param>
    public static void Write(Stream stream, ReadOnlySpan<byte> init, IReadOnlyList<KernelModule> modules, IReadOnlyList<KernelModule> vsockModules)
    {
        var archive = new CpioWriter(stream);
        foreach (string directory in Directories)
        {
            archive.AddDirectory(directory, ExecutableMode);
        }

        // The kernel opens it for init's standard input, output and errors before anything is mounted.
        archive.AddCharacterDevice("dev/console", UnixFileMode.UserRead | UnixFileMode.UserWrite, major: 5, minor: 1);
        archive.AddFile("init", ExecutableMode, init);
        string[] lines = [.. modules.Select(module => $"/{PathOf(module)}\n"), .. vsockModules.Select(module => $"{VsockMark}/{PathOf(module)}\n")];
        archive.AddFile("modules.list", ReadableMode, Encoding.UTF8.GetBytes(string.Concat(lines)));
        foreach (var module in (ReadOnlySpan<KernelModule>)[.. modules, .. vsockModules])
        {
            archive.AddFile(PathOf(module), ReadableMode, module.Content.Span);
        }

        archive.Finish();
    }

    private static string PathOf(KernelModule module) => $"modules/{module.Name}.ko";
}
