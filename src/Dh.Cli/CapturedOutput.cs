using System.Buffers;
using System.Text;
using Dh.Guest;

namespace Dh.Cli;

/// <summary>Output for the JSON object: the first <see cref="Limit"/> bytes of each stream are kept, the rest is dropped.</summary>
internal sealed class CapturedOutput : IOutputSink
{
    public const int Limit = 16 << 20;

    private readonly ArrayBufferWriter<byte> _output = new();
    private readonly ArrayBufferWriter<byte> _error = new();

    public string Output => Text(_output);

    public string Error => Text(_error);

    public bool OutputTruncated { get; private set; }

    public bool ErrorTruncated { get; private set; }

    public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
    {
        if (stream == OutputStream.Output)
        {
            OutputTruncated |= Append(_output, bytes.Span);
        }
        else
        {
            ErrorTruncated |= Append(_error, bytes.Span);
        }

        return ValueTask.CompletedTask;
    }

    private static bool Append(ArrayBufferWriter<byte> kept, ReadOnlySpan<byte> bytes)
    {
        int room = Math.Min(bytes.Length, Limit - kept.WrittenCount);
        kept.Write(bytes[..room]);
        return room < bytes.Length;
    }

    private static string Text(ArrayBufferWriter<byte> kept) => Encoding.UTF8.GetString(kept.WrittenSpan);
}
