using System.Collections.Concurrent;
using System.Globalization;
using System.Net.Sockets;

namespace Dh.TestSupport;

/// <summary>
/// The guest of a fake Firecracker: the runner's side of the guest protocol on each vsock connection, with programs that are written here
/// and found by their source, and the virtual CPU of each machine.
/// </summary>
public sealed class FakeFirecrackerGuest : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(10);

    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly CancellationTokenSource _ended = new();
    private readonly ConcurrentDictionary<int, TaskCompletionSource<FakeVcpu>> _vcpus = new();
    private readonly Task _accepting;

    /// <summary>Listens where the fake connects to.</summary>
    public FakeFirecrackerGuest(string socketPath)
    {
        _listener.Bind(new UnixDomainSocketEndPoint(socketPath));
        _listener.Listen(64);
        _accepting = AcceptAsync();
    }

    /// <summary>
    /// What runs for which source; returns the exit code. For source that is not here there is <see cref="Otherwise"/>. Before anything runs,
    /// the virtual CPU has read all of guest memory: when a page is not what it was, the run ends by SIGBUS.
    /// </summary>
    public ConcurrentDictionary<string, Func<FakeGuestRun, Task<int>>> Programs { get; } = new(StringComparer.Ordinal);

    /// <summary>What runs for all other source. Default: it says nothing, and ends with 0.</summary>
    public Func<FakeGuestRun, Task<int>> Otherwise { get; set; } = _ => Task.FromResult(0);

    /// <summary>The port that the guest listens on; null for any.</summary>
    public int? Port { get; set; }

    /// <summary>Whether a run reads all of guest memory first. Default: yes.</summary>
    public bool ChecksMemory { get; set; } = true;

    /// <summary>The virtual CPU of a machine.</summary>
    /// <param name="processId">The machine's process.</param>
    public Task<FakeVcpu> VcpuOfAsync(int processId) => Vcpu(processId).Task.WaitAsync(Limit);

    /// <inheritdoc/>
    public void Dispose()
    {
        _ended.Cancel();
        _listener.Dispose();
        foreach (var vcpu in _vcpus.Values.Where(vcpu => vcpu.Task.IsCompletedSuccessfully))
        {
            vcpu.Task.Result.Dispose();
        }

        _accepting.Wait(Limit);
        _ended.Dispose();
    }

    private TaskCompletionSource<FakeVcpu> Vcpu(int processId) =>
        _vcpus.GetOrAdd(processId, static _ => new TaskCompletionSource<FakeVcpu>(TaskCreationOptions.RunContinuationsAsynchronously));

    private async Task AcceptAsync()
    {
        while (!_ended.IsCancellationRequested)
        {
            try
            {
                var socket = await _listener.AcceptAsync(_ended.Token);
                _ = Task.Run(() => ServeAsync(socket));
            }
            catch (Exception e) when (e is OperationCanceledException or SocketException or ObjectDisposedException)
            {
                return;
            }
        }
    }

    private async Task ServeAsync(Socket socket)
    {
        var stream = new NetworkStream(socket, ownsSocket: true);
        try
        {
            string[] words = (await ReadLineAsync(stream)).Split(' ');
            int processId = int.Parse(words[1], CultureInfo.InvariantCulture);
            if (words[0] == "vcpu")
            {
                Vcpu(processId).SetResult(new FakeVcpu(stream)); // which owns the stream
                return;
            }

            if (Port is { } port && words[3] != port.ToString(CultureInfo.InvariantCulture))
            {
                await stream.DisposeAsync();
                return;
            }

            await stream.WriteAsync("yes\n"u8.ToArray(), _ended.Token);
            await using var session = new FakeGuestSession(this, stream, processId, _ended.Token);
            await session.RunAsync();
        }
        catch (Exception e) when (e is IOException or OperationCanceledException or ObjectDisposedException)
        {
            await stream.DisposeAsync(); // the machine has ended, or its host
        }
    }

    internal static async Task<string> ReadLineAsync(Stream stream)
    {
        var line = new List<char>();
        byte[] next = new byte[1];
        using var limit = new CancellationTokenSource(Limit * 3);
        while (true)
        {
            await stream.ReadExactlyAsync(next, limit.Token);
            if (next[0] == '\n')
            {
                return new string([.. line]);
            }

            line.Add((char)next[0]);
        }
    }
}
