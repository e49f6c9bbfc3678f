using System.Globalization;
using System.Text;
using System.Threading.Channels;

namespace Dh.TestSupport;

/// <summary>The virtual CPU of a fake Firecracker's machine: it reads and writes guest memory when it is told to, and stands still in a paused machine.</summary>
public sealed class FakeVcpu : IDisposable
{
    private readonly Stream _stream;
    private readonly SemaphoreSlim _one = new(1);
    private readonly Channel<string> _answers = Channel.CreateUnbounded<string>();

    internal FakeVcpu(Stream stream)
    {
        _stream = stream;
        _ = ReceiveAsync();
    }

    /// <summary>Reads pages and compares them with what they held at the snapshot, or were written to since.</summary>
    /// <param name="offset">In bytes; a multiple of 4,096.</param>
    /// <param name="length">In bytes; 0 for all that follows.</param>
    /// <returns>How many pages were read, and how many of them differ.</returns>
    public async Task<(long Pages, long Differing)> CheckAsync(long offset = 0, long length = 0)
    {
        if (await AskAsync($"check {offset} {length}") is not ["checked", var pages, var differing, .. var first])
        {
            throw new InvalidDataException("no `checked`");
        }

        FirstDifference = string.Join(' ', first);
        return (long.Parse(pages, CultureInfo.InvariantCulture), long.Parse(differing, CultureInfo.InvariantCulture));
    }

    /// <summary>What the last check found where the first page differs; empty when none did.</summary>
    public string FirstDifference { get; private set; } = "";

    /// <summary>Writes to each of these pages.</summary>
    public Task WriteAsync(long offset, long length) => AskAsync($"write {offset} {length}");

    /// <summary>Gives pages back, as a balloon does: they read as zeros then.</summary>
    public Task RemoveAsync(long offset, long length) => AskAsync($"remove {offset} {length}");

    /// <summary>Ends the machine's process by a signal, after a last word on its console.</summary>
    public async Task DieAsync(int signal) => await _stream.WriteAsync(Encoding.ASCII.GetBytes($"die {signal}\n"));

    /// <inheritdoc/>
    public void Dispose()
    {
        _stream.Dispose();
        _one.Dispose();
    }

    /// <summary>Takes its answers until the machine has ended: then nothing is kept open for it.</summary>
    private async Task ReceiveAsync()
    {
        using var lines = new StreamReader(_stream);
        try
        {
            while (await lines.ReadLineAsync() is { } line)
            {
                await _answers.Writer.WriteAsync(line);
            }

            _answers.Writer.Complete(new IOException("the machine has ended"));
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            _answers.Writer.Complete(e);
        }
    }

    private async Task<string[]> AskAsync(string command)
    {
        await _one.WaitAsync();
        try
        {
            await _stream.WriteAsync(Encoding.ASCII.GetBytes(command + "\n"));
            return (await _answers.Reader.ReadAsync()).Split(' ');
        }
        finally
        {
            _one.Release();
        }
    }
}
