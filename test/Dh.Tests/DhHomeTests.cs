using Dh.TestSupport;

namespace Dh.Tests;

public sealed class DhHomeTests : IDisposable
{
    private const UnixFileMode Private = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;

    private readonly TempDir _directory = new();

    [Fact]
    public void What_is_made_is_private_up_to_what_was_there()
    {
        var home = new DhHome(_directory["new/home"]);
        var above = File.GetUnixFileMode(_directory.Path);
        Assert.Equal(home.SnapshotsDirectory, DhHome.EnsurePrivate(home.SnapshotsDirectory));
        for (string directory = home.SnapshotsDirectory; directory != _directory.Path; directory = Path.GetDirectoryName(directory)!)
        {
            Assert.Equal(Private, File.GetUnixFileMode(directory));
        }

        Assert.Equal(above, File.GetUnixFileMode(_directory.Path));
    }

    public void Dispose() => _directory.Dispose();
}
