using System.Text;
using Dh.Guest;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Cli;

/// <summary>Standard output and error as they are: bytes, unbuffered, in the order of the writes.</summary>
internal sealed class StandardStreams : IOutputSink
{
    // The console's streams take a broken pipe for success, and a file's stream has a position of its own, which two descriptors of one file would not share.
    private static readonly SafeFileHandle Output = new(1, ownsHandle: false);
    private static readonly SafeFileHandle Error = new(2, ownsHandle: false);

    /// <summary>Whether a reader went away; the write that noticed it has thrown.</summary>
    public bool Broken { get; private set; }

    // A write that nobody takes blocks its thread for ever; the run's time limit and its interruption must not be blocked with it.
    public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
    {
        var rest = bytes[Files.WriteAtOnce(HandleOf(stream), bytes.Span)..];
        return rest.Length == 0 ? ValueTask.CompletedTask : new(Task.Run(() => Write(stream, rest.Span), CancellationToken.None).WaitAsync(cancellationToken));
    }

    public void Write(OutputStream stream, ReadOnlySpan<byte> bytes)
    {
        try
        {
            Files.WriteAll(HandleOf(stream), bytes);
        }
        catch (LinuxException e) when (e.Errno is Errno.EPIPE or Errno.ECONNRESET)
        {
            Broken = true;
            throw;
        }
        catch (LinuxException e)
        {
            throw new DhException(DhErrorReason.Host, $"{(stream == OutputStream.Output ? "Standard output" : "Standard error")} does not take what is written to it: {e.Message}", e);
        }
    }

    public void WriteLine(OutputStream stream, string line) => Write(stream, Encoding.UTF8.GetBytes(line + "\n"));

    private static SafeFileHandle HandleOf(OutputStream stream) => stream == OutputStream.Output ? Output : Error;
}
