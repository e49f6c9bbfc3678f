using System.Buffers.Binary;
using System.Text.Json;

namespace Dh.TestSupport;

/// <summary>The runner's side of one connection from the host (docs/guest-protocol.md).</summary>
internal sealed class FakeGuestSession(FakeFirecrackerGuest guest, Stream stream, int processId, CancellationToken ended) : IAsyncDisposable
{
    private const int SigBus = 7;

    private readonly SemaphoreSlim _writing = new(1);
    private FakeGuestRun? _run;

    /// <summary>Answers until the host has gone.</summary>
    public async Task RunAsync()
    {
        await SendAsync(FakeGuest.Ready);
        try
        {
            while (await ReceiveAsync() is { } frame)
            {
                using var header = JsonDocument.Parse(frame.Header);
                switch (header.RootElement.GetProperty("type").GetString())
                {
                    case "hello":
                        await SendAsync(FakeGuest.Hello);
                        break;
                    case "exec":
                        _run = new FakeGuestRun(this, header.RootElement.GetProperty("id").GetInt64(), await guest.VcpuOfAsync(processId), ended);
                        _ = ExecuteAsync(_run, System.Text.Encoding.UTF8.GetString(frame.Body));
                        break;
                    case "stdin":
                        _run?.TakeInput(frame.Body, header.RootElement.TryGetProperty("eof", out var eof) && eof.ValueKind == JsonValueKind.True);
                        break;
                    case "cancel":
                        _run?.Cancel();
                        break;
                }
            }
        }
        finally
        {
            _run?.Cancel(); // nobody is left to hear of it
        }
    }

    public async Task SendAsync(string header, byte[]? body = null)
    {
        await _writing.WaitAsync(ended);
        try
        {
            await stream.WriteAsync(FakeGuest.Frame(header, body), ended);
        }
        finally
        {
            _writing.Release();
        }
    }

    public async ValueTask DisposeAsync()
    {
        await stream.DisposeAsync();
    }

    private async Task ExecuteAsync(FakeGuestRun run, string source)
    {
        try
        {
            var (outcome, code) = ("exited", 0);
            if (guest.ChecksMemory && await run.Vcpu.CheckAsync() is (var pages, > 0 and var differing))
            {
                await run.PrintErrorAsync($"{differing} of {pages} pages are not what they were; {run.Vcpu.FirstDifference}\n");
                (outcome, code) = ("signaled", 128 + SigBus);
            }
            else
            {
                code = await RunProgramAsync(run, guest.Programs.GetValueOrDefault(source, guest.Otherwise));
            }

            string repr = run.ResultRepr is null ? "null" : JsonSerializer.Serialize(run.ResultRepr);
            await SendAsync($$"""{"type": "result", "id": {{run.Id}}, "outcome": "{{outcome}}", "exit_code": {{code}}, "result_repr": {{repr}}, "run_ms": 1.5}""");
        }
        catch (Exception e) when (e is IOException or OperationCanceledException or ObjectDisposedException or System.Threading.Channels.ChannelClosedException)
        {
            // The machine has ended.
        }
    }

    private static async Task<int> RunProgramAsync(FakeGuestRun run, Func<FakeGuestRun, Task<int>> program)
    {
        try
        {
            return await program(run);
        }
        catch (OperationCanceledException) when (run.Cancelled.IsCancellationRequested)
        {
            return 130;
        }
    }

    private async Task<(byte[] Header, byte[] Body)?> ReceiveAsync()
    {
        byte[] prefix = new byte[8];
        if (await stream.ReadAtLeastAsync(prefix, prefix.Length, throwOnEndOfStream: false, ended) < prefix.Length)
        {
            return null;
        }

        byte[] header = new byte[BinaryPrimitives.ReadUInt32LittleEndian(prefix)];
        byte[] body = new byte[BinaryPrimitives.ReadUInt32LittleEndian(prefix.AsSpan(4))];
        await stream.ReadExactlyAsync(header, ended);
        await stream.ReadExactlyAsync(body, ended);
        return (header, body);
    }
}
