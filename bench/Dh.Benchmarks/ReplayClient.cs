using System.Globalization;
using System.Net.Sockets;
using System.Text;
using Dh.Linux;

namespace Dh.Benchmarks;

/// <summary>One process of bench/memory_replay.c: a guest as far as its memory goes. Obeying a line, it costs this process no allocation.</summary>
internal sealed class ReplayClient : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);
    private static readonly byte[] MapLine = "map\n"u8.ToArray();

    private readonly ChildProcess _process;
    private readonly Socket _console;
    private readonly SafeSocketHandle _connection;
    private readonly byte[] _answer = new byte[256];

    /// <summary>The number at which the client finds its socket.</summary>
    public const string SocketDescriptor = "3";

    private ReplayClient(ChildProcess process, Socket console, SafeSocketHandle connection)
    {
        _process = process;
        _console = console;
        _connection = connection;
    }

    /// <summary>Our end of the handshake socket; who takes it disposes it.</summary>
    public SafeSocketHandle Connection => _connection;

    /// <summary>Starts it, and returns when all is there that has to be before the clock starts.</summary>
    /// <param name="arguments">Its arguments.</param>
    public static ReplayClient Start(string[] arguments)
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        var (console, remote) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (theirs)
        using (remote)
        {
            var process = ChildProcess.Start(
                Path.Combine(AppContext.BaseDirectory, "memory_replay"), arguments, new Dictionary<string, string>(), [(0, remote), (1, remote), (3, theirs)]);
            var client = new ReplayClient(process, new Socket(console) { ReceiveTimeout = (int)Limit.TotalMilliseconds }, ours);
            remote.Dispose();
            _ = client.Text(client.Receive());
            return client;
        }
    }

    /// <summary>Brings back what comes back before a guest runs.</summary>
    /// <returns>When it began and ended, in nanoseconds of the monotonic clock; with the mode <c>uffd</c> both are when the handshake was sent.</returns>
    public (long Start, long End) Map()
    {
        _ = _console.Send(MapLine);
        long[] numbers = Numbers(Receive());
        return (numbers[0], numbers[1]);
    }

    /// <summary>Touches the next pages of the trace.</summary>
    public Replay Replay(int pages)
    {
        SendReplay(pages);
        return ReceiveReplay();
    }

    /// <summary>Begins <see cref="Replay"/>.</summary>
    public void SendReplay(int pages) => _ = _console.Send(Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"replay {pages}\n")));

    /// <summary>Ends <see cref="Replay"/>.</summary>
    public Replay ReceiveReplay()
    {
        long[] numbers = Numbers(Receive());
        return new Replay(numbers[0], numbers[1], numbers[2], numbers[3] / 1e3, numbers[4] / 1e3, numbers[5] / 1e3, numbers[6]);
    }

    /// <summary>Waits until the answer is there.</summary>
    public void WaitForAnswer() => _ = _console.Poll(Limit, SelectMode.SelectRead);

    /// <summary>Kills it.</summary>
    public void Dispose()
    {
        _ = _process.PidFd.SendSignal(PidFd.SigKill);
        _ = _process.WaitAndReap(Limit);
        _process.Dispose();
        _console.Dispose();
        _connection.Dispose();
    }

    // An answer is one short line, written at once.
    private int Receive() => _console.Receive(_answer) is var length and > 0 ? length : throw new InvalidOperationException("memory_replay failed");

    private string Text(int length) => Encoding.ASCII.GetString(_answer, 0, length);

    private long[] Numbers(int length) => [.. Text(length).Split(' ').Select(number => long.Parse(number, CultureInfo.InvariantCulture))];
}

/// <summary>What touching the pages took.</summary>
/// <param name="Start">When it began, in nanoseconds of the monotonic clock.</param>
/// <param name="End">When it ended.</param>
/// <param name="Slow">Accesses that took more than 2 us: those that somebody had to serve.</param>
/// <param name="P50">The median of those, in microseconds.</param>
/// <param name="P99">The 99th percentile of those.</param>
/// <param name="Max">The slowest.</param>
/// <param name="PrivateBytes">Memory that is its own afterwards: what this guest shares with no other.</param>
internal sealed record Replay(long Start, long End, long Slow, double P50, double P99, double Max, long PrivateBytes);
