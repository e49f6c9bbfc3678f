using System.Buffers;
using System.Text;
using Dh.Guest;

namespace Dh.Preparation;

/// <summary>The output of code that is run to check or to record a snapshot: both streams, the first 64 KiB.</summary>
internal sealed class CapturedText : IOutputSink
{
    private const int Limit = 64 << 10;

    private readonly ArrayBufferWriter<byte> _bytes = new();

    /// <summary>What has been written so far.</summary>
    public string Text => Encoding.UTF8.GetString(_bytes.WrittenSpan);

    /// <inheritdoc/>
    public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
    {
        _bytes.Write(bytes.Span[..Math.Min(bytes.Length, Limit - _bytes.WrittenCount)]);
        return ValueTask.CompletedTask;
    }
}
