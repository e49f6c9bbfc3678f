using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>A DH_HOME with copies of the prepared snapshots, holes and all, that a test may damage.</summary>
internal sealed class CopyOfHome : IDisposable
{
    private readonly TempDir _directory = new();

    public CopyOfHome(PreparedHome prepared)
    {
        Directory.CreateDirectory(_directory["vm"]);
        using var cp = Process.Start("/bin/cp", ["-r", "-d", "--sparse=always", prepared.Home.SnapshotsDirectory, _directory["vm"]]);
        cp.WaitForExit();
        foreach (string file in Directory.EnumerateFiles(_directory.Path, "*", SearchOption.AllDirectories))
        {
            File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        }

        Dh = new DhProgram(_directory.Path);
    }

    public DhProgram Dh { get; }

    public DhHome Home => new(_directory.Path);

    /// <summary>A file of the snapshot, by the path that the program names it with.</summary>
    public string FileOf(string name)
    {
        string entry = Directory.EnumerateDirectories(Home.SnapshotsDirectory, "python-*").Single();
        return Path.Combine(entry, new DirectoryInfo(Path.Combine(entry, "current")).LinkTarget!, name);
    }

    public void Dispose() => _directory.Dispose();
}
