using System.Globalization;
using System.Text;

namespace Dh.TestSupport;

/// <summary>The virtual CPU of a fake Firecracker's machine: it reads and writes guest memory when it is told to, and stands still in a paused machine.</summary>
public sealed class FakeVcpu(Stream stream) : IDisposable
{
    private readonly SemaphoreSlim _one = new(1);

    /// <summary>Reads pages and compares them with what they held at the snapshot, or were written to since.</summary>
    /// <param name="offset">In bytes; a multiple of 4,096.</param>
    /// <param name="length">In bytes; 0 for all that follows.</param>
    /// <returns>How many pages were read, and how many of them differ.</returns>
    public async Task<(long Pages, long Differing)> CheckAsync(long offset = 0, long length = 0) =>
        await AskAsync($"check {offset} {length}") is ["checked", var pages, var differing]
            ? (long.Parse(pages, CultureInfo.InvariantCulture), long.Parse(differing, CultureInfo.InvariantCulture))
            : throw new InvalidDataException("no `checked`");

    /// <summary>Writes to each of these pages.</summary>
    public Task WriteAsync(long offset, long length) => AskAsync($"write {offset} {length}");

    /// <summary>Gives pages back, as a balloon does: they read as zeros then.</summary>
    public Task RemoveAsync(long offset, long length) => AskAsync($"remove {offset} {length}");

    /// <summary>Ends the machine's process by a signal, after a last word on its console.</summary>
    public async Task DieAsync(int signal) => await stream.WriteAsync(Encoding.ASCII.GetBytes($"die {signal}\n"));

    /// <inheritdoc/>
    public void Dispose()
    {
        stream.Dispose();
        _one.Dispose();
    }

    private async Task<string[]> AskAsync(string command)
    {
        await _one.WaitAsync();
        try
        {
            await stream.WriteAsync(Encoding.ASCII.GetBytes(command + "\n"));
            return (await FakeFirecrackerGuest.ReadLineAsync(stream)).Split(' ');
        }
        finally
        {
            _one.Release();
        }
    }
}
