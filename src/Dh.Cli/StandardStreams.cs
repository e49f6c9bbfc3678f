using System.Text;
using Dh.Guest;
using Microsoft.Win32.SafeHandles;

namespace Dh.Cli;

/// <summary>Standard output and error as they are: bytes, unbuffered, in the order of the writes.</summary>
internal sealed class StandardStreams : IOutputSink
{
    private readonly Lazy<Stream> _output = new(() => Open(1, Console.IsOutputRedirected, Console.OpenStandardOutput));
    private readonly Lazy<Stream> _error = new(() => Open(2, Console.IsErrorRedirected, Console.OpenStandardError));

    /// <summary>Whether a reader went away; the write that noticed it has thrown.</summary>
    public bool Broken { get; private set; }

    // A write that nobody takes blocks its thread for ever; the run's time limit and its interruption must not be blocked with it.
    public async ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken) =>
        await Task.Run(() => Write(stream, bytes.Span), CancellationToken.None).WaitAsync(cancellationToken);

    public void Write(OutputStream stream, ReadOnlySpan<byte> bytes)
    {
        try
        {
            (stream == OutputStream.Output ? _output : _error).Value.Write(bytes);
        }
        catch (IOException)
        {
            Broken = true;
            throw;
        }
    }

    public void WriteLine(OutputStream stream, string line) => Write(stream, Encoding.UTF8.GetBytes(line + "\n"));

    // The console's stream takes a broken pipe for success; a file's stream has a position of its own, which two descriptors of one file would not share.
    private static Stream Open(int descriptor, bool redirected, Func<Stream> console)
    {
        if (redirected)
        {
            var pipe = new FileStream(new SafeFileHandle(descriptor, ownsHandle: false), FileAccess.Write, bufferSize: 0);
            if (!pipe.CanSeek)
            {
                return pipe;
            }
        }

        return console();
    }
}
