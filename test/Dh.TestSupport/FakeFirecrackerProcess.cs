using System.Diagnostics;
using System.Net.Sockets;

namespace Dh.TestSupport;

/// <summary>One process of a fake Firecracker in a working directory of its own, spoken to by hand.</summary>
public sealed class FakeFirecrackerProcess : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(10);

    private readonly TempDir _directory = new();
    private readonly Process _process;

    private FakeFirecrackerProcess(string programPath)
    {
        _process = Process.Start(new ProcessStartInfo(programPath, ["--api-sock", "api.sock"])
        {
            WorkingDirectory = _directory.Path,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        Output = _process.StandardOutput.ReadToEndAsync();
    }

    /// <summary>Its working directory, where its sockets are.</summary>
    public string Directory => _directory.Path;

    /// <summary>What it has printed when it has ended.</summary>
    public Task<string> Output { get; }

    /// <summary>Its number.</summary>
    public int Id => _process.Id;

    /// <summary>Starts a process and waits until its API socket takes connections, or it has ended.</summary>
    public static async Task<FakeFirecrackerProcess> StartAsync(string programPath)
    {
        var started = new FakeFirecrackerProcess(programPath);
        long start = Stopwatch.GetTimestamp();
        while (!started.IsListening() && !started._process.HasExited && Stopwatch.GetElapsedTime(start) < Limit)
        {
            await Task.Delay(2);
        }

        return started;
    }

    /// <summary>A new connection to its API.</summary>
    public RawHttp Connect() => new(_directory["api.sock"]);

    /// <summary>A new connection to its vsock socket; nothing is said yet.</summary>
    public NetworkStream ConnectVsock()
    {
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(_directory["v.sock"]));
            return new NetworkStream(socket, ownsSocket: true);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Waits until it has ended.</summary>
    /// <returns>Its exit code; 128 + the signal's number when one ended it.</returns>
    public async Task<int> WaitForExitAsync()
    {
        await _process.WaitForExitAsync().WaitAsync(Limit);
        return _process.ExitCode;
    }

    /// <summary>Whether it has ended.</summary>
    public bool HasExited => _process.HasExited;

    /// <summary>Kills it.</summary>
    public void Kill() => _process.Kill();

    // The file is there a moment before the socket listens.
    private bool IsListening()
    {
        try
        {
            Connect().Dispose();
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (!_process.HasExited)
        {
            _process.Kill();
            _process.WaitForExit(Limit);
        }

        _process.Dispose();
        _directory.Dispose();
    }
}
