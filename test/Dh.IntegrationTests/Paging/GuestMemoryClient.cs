using System.Globalization;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using Dh.Linux;

namespace Dh.IntegrationTests.Paging;

/// <summary>A process that plays the VMM's side: test/guest-memory-client.c says what it can do.</summary>
internal sealed class GuestMemoryClient : IAsyncDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(40);

    private readonly ChildProcess _process;
    private readonly NetworkStream _stream;
    private readonly StreamReader _lines;

    private GuestMemoryClient(ChildProcess process, SafeSocketHandle console)
    {
        _process = process;
        _stream = new NetworkStream(new Socket(console), ownsSocket: true);
        _lines = new StreamReader(_stream);
    }

    /// <summary>Where the byte at offset 0 of guest memory lies in the client.</summary>
    public ulong BaseAddress { get; private set; }

    /// <summary>Starts a client with an inherited socket; the other end of it is the page server's.</summary>
    public static async Task<(GuestMemoryClient Client, SafeSocketHandle Connection)> StartAsync(string mode, long size, long? split = null)
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (theirs)
        {
            return (await StartAsync(["fd", "3"], mode, size, split, [(3, theirs)]), ours);
        }
    }

    /// <summary>Starts a client that connects to a path.</summary>
    public static Task<GuestMemoryClient> ConnectAsync(string socketPath, string mode, long size) => StartAsync(["path", socketPath], mode, size, null, []);

    /// <summary>Waits until it has sent whatever its mode sends.</summary>
    public async Task SentAsync() => Assert.Equal("sent", await ReadLineAsync());

    /// <summary>One hash per page, in the order of the memory file.</summary>
    public async Task<ulong[]> HashPagesAsync()
    {
        ulong[] hashes = new ulong[await AskAsync("pages")];
        for (int i = 0; i < hashes.Length; i++)
        {
            hashes[i] = ulong.Parse(await ReadLineAsync(), NumberStyles.HexNumber, CultureInfo.InvariantCulture);
        }

        return hashes;
    }

    /// <summary>Writes to every page; returns how many that were.</summary>
    public Task<long> TouchAsync() => AskAsync("touch", "touched");

    /// <summary>Gives all memory back; returns how many pages read as zeros then.</summary>
    public Task<long> DiscardAsync() => AskAsync("discard", "discarded");

    /// <summary>Reads whole pages; returns their hash.</summary>
    public async Task<ulong> ReadAsync(long offset, long length) => (await ActAsync("read", $"read {offset} {length}"))[0];

    /// <summary>Changes a byte of each page (<see cref="PageHashes.Write"/>).</summary>
    public Task WriteAsync(long offset, long length) => ActAsync("write", $"write {offset} {length}");

    /// <summary>Gives pages back.</summary>
    public Task RemoveAsync(long offset, long length) => ActAsync("remove", $"remove {offset} {length}");

    /// <summary>Does two of these at once, on a thread each (`read OFFSET LENGTH`); returns the hashes of what was read.</summary>
    public async Task<(ulong First, ulong Second)> BothAsync(string first, string second) =>
        await ActAsync("both", $"both {first} {second}") is [var one, var other] ? (one, other) : throw new InvalidDataException("two hashes are missing");

    /// <summary>Makes the userfaultfd blocking, also for the server: they share its flags.</summary>
    public async Task BlockAsync() => Assert.Equal(0, await AskAsync("block"));

    /// <summary>Sends bytes through the handshake socket, up to 1 MiB; returns how many were taken.</summary>
    public Task<long> ChatterAsync() => AskAsync("chatter");

    /// <summary>Gives the first page back so many times.</summary>
    public Task<long> ChurnAsync(long count) => AskAsync($"churn {count}", "churn");

    /// <summary>Ends the threads of its mode; returns how often each went through memory.</summary>
    public Task<long> QuietAsync() => AskAsync("quiet");

    /// <summary>Kills it as the kernel would, and waits until it is gone.</summary>
    public void Kill()
    {
        _ = _process.PidFd.SendSignal(PidFd.SigKill);
        Assert.True(_process.WaitAndReap(Limit), "a killed client does not go away");
    }

    /// <summary>Waits until it has ended by itself.</summary>
    public void WaitForExit() => Assert.True(_process.WaitAndReap(Limit), "the client does not end");

    /// <summary>Whether it ends within a time limit.</summary>
    public bool HasEnded(TimeSpan timeLimit) => _process.WaitAndReap(timeLimit);

    public async ValueTask DisposeAsync()
    {
        if (_process.PidFd.SendSignal(PidFd.SigKill))
        {
            _ = _process.WaitAndReap(Limit);
        }

        _process.Dispose();
        _lines.Dispose();
        await _stream.DisposeAsync();
    }

    private static async Task<GuestMemoryClient> StartAsync(string[] socket, string mode, long size, long? split, (int Number, SafeHandle Descriptor)[] descriptors)
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using (theirs)
        {
            var process = ChildProcess.Start(
                Path.Combine(AppContext.BaseDirectory, "guest-memory-client"),
                [.. socket, mode, size.ToString(CultureInfo.InvariantCulture), .. split is { } at ? [at.ToString(CultureInfo.InvariantCulture)] : Array.Empty<string>()],
                new Dictionary<string, string>(),
                [(0, theirs), (1, theirs), .. descriptors]);
            var client = new GuestMemoryClient(process, ours);
            theirs.Dispose();
            string line = await client.ReadLineAsync();
            Assert.StartsWith("base ", line, StringComparison.Ordinal);
            client.BaseAddress = ulong.Parse(line.AsSpan(5), NumberStyles.HexNumber, CultureInfo.InvariantCulture);
            return client;
        }
    }

    private async Task<long> AskAsync(string command, string? answer = null) =>
        long.Parse(await AnswerAsync(command, answer ?? command), CultureInfo.InvariantCulture);

    private async Task<ulong[]> ActAsync(string name, string command) =>
        [.. (await AnswerAsync(command, name)).Split(' ').Select(word => ulong.Parse(word, NumberStyles.HexNumber, CultureInfo.InvariantCulture))];

    private async Task<string> AnswerAsync(string command, string answer)
    {
        await _stream.WriteAsync(System.Text.Encoding.ASCII.GetBytes(command + "\n"), TestContext.Current.CancellationToken);
        string line = await ReadLineAsync();
        Assert.StartsWith(answer + " ", line, StringComparison.Ordinal);
        return line[(answer.Length + 1)..];
    }

    private async Task<string> ReadLineAsync() =>
        await _lines.ReadLineAsync(TestContext.Current.CancellationToken).AsTask().WaitAsync(Limit) ?? throw new EndOfStreamException("the client has ended");
}
