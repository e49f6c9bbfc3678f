using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Tests.Snapshots;

public sealed class RestoreLogTests : IDisposable
{
    private const string Id = "20261125T200000-0a1b2c3d";

    private readonly TempDir _directory = new();

    private DhHome Home => new(_directory.Path);

    private string LogPath => Path.Combine(Home.CacheDirectory, "restores", Id);

    [Fact]
    public void The_last_restores_come_first()
    {
        var first = new PastRestore(DateTimeOffset.UnixEpoch, "prefetch", TimeSpan.FromMilliseconds(151.5));
        var second = new PastRestore(DateTimeOffset.UnixEpoch.AddSeconds(1), "file", TimeSpan.FromMilliseconds(160));

        RestoreLog.Append(Home, Id, first);
        RestoreLog.Append(Home, Id, second);

        Assert.Equal([second, first], RestoreLog.Read(Home, Id, 10));
        Assert.Equal([second], RestoreLog.Read(Home, Id, 1));
        Assert.Empty(RestoreLog.Read(Home, "another", 10));
    }

    [Fact]
    public void It_does_not_grow_for_ever()
    {
        for (int i = 0; i < 2000; i++)
        {
            RestoreLog.Append(Home, Id, new PastRestore(DateTimeOffset.UnixEpoch.AddSeconds(i), "eager", TimeSpan.FromMilliseconds(i)));
        }

        Assert.InRange(new FileInfo(LogPath).Length, 1, 17 << 10);
        Assert.Equal(1999, RestoreLog.Read(Home, Id, 1).Single().Time.TotalMilliseconds);
        Assert.Single(Directory.EnumerateFiles(Path.GetDirectoryName(LogPath)!));
    }

    [Fact]
    public void Lines_that_are_none_are_passed_over()
    {
        RestoreLog.Append(Home, Id, new PastRestore(DateTimeOffset.UnixEpoch, "lazy", TimeSpan.FromMilliseconds(1)));
        File.AppendAllText(LogPath, "half a li\n\n2026-11-25T20:00:00.0000000+00:00 eager fast\n");

        Assert.Equal("lazy", RestoreLog.Read(Home, Id, 10).Single().Policy);
    }

    [Fact]
    public void Where_nothing_can_be_written_nothing_fails()
    {
        string file = _directory.Write("file", "");

        RestoreLog.Append(new DhHome(file), Id, new PastRestore(DateTimeOffset.UnixEpoch, "lazy", TimeSpan.Zero));

        Assert.Empty(RestoreLog.Read(new DhHome(file), Id, 10));
    }

    [Fact]
    public void A_snapshot_that_is_removed_is_forgotten()
    {
        RestoreLog.Append(Home, Id, new PastRestore(DateTimeOffset.UnixEpoch, "lazy", TimeSpan.Zero));

        RestoreLog.Remove(Home, Id);
        RestoreLog.Remove(Home, Id);

        Assert.Empty(RestoreLog.Read(Home, Id, 10));
    }

    public void Dispose() => _directory.Dispose();
}
