namespace Dh;

/// <summary>The files that come with the program: the native pieces, the guest's files and the templates.</summary>
/// <param name="directory">Where they are: <c>native/</c>, <c>guest/</c> and <c>templates/</c> in it.</param>
public sealed class Installation(string directory)
{
    /// <summary>The installation that this program runs from; symbolic links to the program are followed.</summary>
    public static Installation Current { get; } = new(AppContext.BaseDirectory);

    /// <summary>Where the files are.</summary>
    public string Directory { get; } = directory;

    /// <summary>The supervisor of a VMM (<c>native/launch.c</c>).</summary>
    public string LauncherPath => Path.Combine(Directory, "native", "launch");

    /// <summary>The library that is preloaded into QEMU (<c>native/vmm_preload.c</c>).</summary>
    public string PreloadPath => Path.Combine(Directory, "native", "vmm_preload.so");

    /// <summary>Init, runner and engines.</summary>
    public string GuestDirectory => Path.Combine(Directory, "guest");

    /// <summary>The templates by name: <c>python.toml</c>.</summary>
    public string TemplatesDirectory => Path.Combine(Directory, "templates");
}
