using System.Collections.Concurrent;
using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using Dh.IntegrationTests.Guests;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Pool;

/// <summary>A daemon that keeps a pool in a home of its own, as a user starts it.</summary>
internal sealed class RunningPool : IAsyncDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);
    private readonly ConcurrentQueue<string> _events = new();
    private readonly TaskCompletionSource _full = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly DhProgram _dh;

    private RunningPool(DhProgram dh, string[] options)
    {
        _dh = dh;
        Daemon = dh.Start(["vm", "pool", "start", .. options]);
        _ = ReadAsync();
    }

    public Process Daemon { get; }

    public string[] Events => [.. _events];

    /// <summary>Starts it and waits until its sandboxes are ready.</summary>
    public static async Task<RunningPool> StartAsync(DhProgram dh, params string[] options)
    {
        var pool = new RunningPool(dh, options);
        await pool._full.Task.WaitAsync(Limit);
        return pool;
    }

    /// <summary>The only pool's status.</summary>
    public async Task<JsonElement> StatusAsync() =>
        JsonDocument.Parse((await _dh.RunAsync(["vm", "pool", "status", "--json"])).Output).RootElement.GetProperty("pools").EnumerateArray().Single();

    /// <summary>Waits until a number of its status is so.</summary>
    public async Task WaitAsync(string name, int value)
    {
        using var limit = new CancellationTokenSource(Limit);
        while ((await StatusAsync()).GetProperty(name).GetInt32() != value)
        {
            await Task.Delay(50, limit.Token);
        }
    }

    /// <summary>Waits until it has told of an event.</summary>
    public async Task WaitForEventAsync(string part)
    {
        using var limit = new CancellationTokenSource(Limit);
        while (!Events.Any(line => line.Contains(part, StringComparison.Ordinal)))
        {
            await Task.Delay(20, limit.Token);
        }
    }

    /// <summary>Its VMMs, as its events name those that were handed out.</summary>
    public int[] HandedOutVmms() =>
        [.. Events.Where(line => line.Contains(" 11 HandedOut ", StringComparison.Ordinal)).Select(line => int.Parse(line.Split("vmm=")[1], CultureInfo.InvariantCulture))];

    /// <summary>Signals it and waits for its end.</summary>
    public Task<int> EndAsync(string signal) => Processes.EndAsync(Daemon, signal);

    public async ValueTask DisposeAsync()
    {
        if (!Daemon.HasExited)
        {
            await EndAsync("TERM");
        }

        Daemon.Dispose();
    }

    private async Task ReadAsync()
    {
        while (await Daemon.StandardError.ReadLineAsync() is { } line)
        {
            _events.Enqueue(line);
            if (line.Contains(" 2 Full", StringComparison.Ordinal))
            {
                _full.TrySetResult();
            }
        }

        _full.TrySetException(new InvalidOperationException($"The daemon has ended: {string.Join('\n', _events)}"));
    }
}
