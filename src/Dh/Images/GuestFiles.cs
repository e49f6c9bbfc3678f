namespace Dh.Images;

/// <summary>What comes from this program into a guest.</summary>
/// <param name="InitPath">The first process: a static ELF file.</param>
/// <param name="PythonFiles">Runner and engines.</param>
internal sealed record GuestFiles(string InitPath, IReadOnlyList<string> PythonFiles)
{
    /// <summary>All of them.</summary>
    public IEnumerable<string> All => [InitPath, .. PythonFiles];

    /// <summary>Finds them in an installation.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: they are not there.</exception>
    public static GuestFiles Find(string directory)
    {
        string init = Path.Combine(directory, "init");
        return File.Exists(init)
            ? new GuestFiles(init, [.. Directory.EnumerateFiles(directory, "*.py").Order(StringComparer.Ordinal)])
            : throw new DhException(DhErrorReason.Host, $"{init} is missing: this installation of dh is incomplete; run `make build`, or install it again.");
    }
}
