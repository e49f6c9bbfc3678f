using System.Net.Sockets;
using System.Text;
using Dh.Pool;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Tests.Pool;

/// <summary>A client in the queue of a daemon that does not do what daemons do: it ends up with no sandbox, and knows why.</summary>
public sealed class PooledSandboxTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(30);

    private readonly TempDir _directory = new();
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified);
    private readonly Snapshot _snapshot;
    private readonly SandboxOptions _options;
    private readonly string _socketPath;
    private readonly List<string> _said = [];

    public PooledSandboxTests()
    {
        var home = new DhHome(_directory.Path);
        var store = new SnapshotStore(home);
        string draft = store.CreateDraft("one");
        _snapshot = store.Publish(draft, WrittenSnapshot.Write(draft, compressed: false, 1 << 20, 1, id: "one"));
        _options = new SandboxOptions { Home = home };
        var kind = PoolKind.Of(_snapshot, _options);
        _ = DhHome.EnsurePrivate(PoolFiles.DirectoryOf(kind.Home));
        _socketPath = PoolFiles.SocketOf(kind);
        PoolFiles.WithShortPath(_socketPath, path => _listener.Bind(new UnixDomainSocketEndPoint(path)));
        _listener.Listen();
    }

    [Fact]
    public async Task It_leaves_the_queue_of_a_daemon_that_falls_silent()
    {
        var taking = TakeAsync();
        using var client = await AcceptAsync();
        await client.SendAsync("""{"type":"queued"}"""u8.ToArray(), Cancellation);
        Assert.Null(await taking.WaitAsync(Limit, Cancellation));
        Assert.Equal("The pool did not hand out a sandbox in time.", Assert.Single(_said));
    }

    [Fact]
    public async Task It_stays_as_long_as_it_is_told_to()
    {
        var taking = TakeAsync();
        using var client = await AcceptAsync();
        for (int i = 0; i < 6; i++)
        {
            await client.SendAsync("""{"type":"queued"}"""u8.ToArray(), Cancellation);
            await Task.Delay(PoolConnection.AnswerLimit / 4, Cancellation);
        }

        await client.SendAsync("""{"type":"refused","message":"none is left."}"""u8.ToArray(), Cancellation);
        Assert.Null(await taking.WaitAsync(Limit, Cancellation));
        Assert.Equal("The pool has no sandbox for this run: none is left.", Assert.Single(_said));
    }

    public void Dispose()
    {
        _listener.Dispose();
        File.Delete(_socketPath);
        _directory.Dispose();
    }

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    private Task<PooledSandbox?> TakeAsync() => Task.Run(() => PooledSandbox.TryTake(_snapshot, _options, _said.Add, Cancellation), Cancellation);

    private async Task<Socket> AcceptAsync()
    {
        var client = await _listener.AcceptAsync(Cancellation);
        byte[] request = new byte[PoolJson.MaxPacket];
        int length = await client.ReceiveAsync(request, Cancellation);
        Assert.Contains("\"take\"", Encoding.UTF8.GetString(request, 0, length), StringComparison.Ordinal);
        return client;
    }
}
