using System.Buffers.Binary;
using System.Runtime.CompilerServices;
using System.Text.Json;

namespace Dh.Guest;

/// <summary>
/// Frames over the guest channel (docs/guest-protocol.md). One reader; any number of writers. The guest is hostile: every length is checked
/// before a byte is stored, and the buffers never grow beyond the protocol's bounds.
/// </summary>
internal sealed class GuestChannel(IGuestTransport transport) : IDisposable
{
    public const int MaxHeaderBytes = 1 << 20;
    public const int MaxGuestBodyBytes = 1 << 20;
    private const int PrefixBytes = 8;
    private const int MaxTogetherBytes = 64 << 10;

    private readonly SemaphoreSlim _writing = new(1, 1);
    private byte[] _header = new byte[4096];
    private byte[] _body = GC.AllocateUninitializedArray<byte>(64 * 1024);
    private readonly byte[] _input = GC.AllocateUninitializedArray<byte>(16 * 1024);
    private int _inputStart;
    private int _inputEnd;

    /// <summary>Reads one frame.</summary>
    /// <returns>The header and the body, which is valid until the next call.</returns>
    /// <exception cref="DhException">The channel ended, or the frame breaks the protocol.</exception>
    public async ValueTask<(GuestHeader Header, ReadOnlyMemory<byte> Body)> ReadAsync(CancellationToken cancellationToken)
    {
        await FillAsync(_header.AsMemory(0, PrefixBytes), cancellationToken).ConfigureAwait(false);
        uint headerLength = BinaryPrimitives.ReadUInt32LittleEndian(_header);
        uint bodyLength = BinaryPrimitives.ReadUInt32LittleEndian(_header.AsSpan(4));
        if (headerLength is < 2 or > MaxHeaderBytes || bodyLength > MaxGuestBodyBytes)
        {
            throw new DhException(DhErrorReason.Guest, $"The guest broke its protocol: a frame with a header of {headerLength} and a body of {bodyLength} bytes.");
        }

        _header = headerLength > _header.Length ? new byte[headerLength] : _header;
        _body = bodyLength > _body.Length ? new byte[bodyLength] : _body;
        await FillAsync(_header.AsMemory(0, (int)headerLength), cancellationToken).ConfigureAwait(false);
        await FillAsync(_body.AsMemory(0, (int)bodyLength), cancellationToken).ConfigureAwait(false);
        try
        {
            var header = GuestHeader.Parse(_header.AsMemory(0, (int)headerLength));
            return header?.Type is not null
                ? (header, _body.AsMemory(0, (int)bodyLength))
                : throw new DhException(DhErrorReason.Guest, "The guest broke its protocol: a frame without a type.");
        }
        catch (JsonException e)
        {
            throw new DhException(DhErrorReason.Guest, $"The guest broke its protocol: a header that is no JSON object of the expected shape ({Untrusted.OneLine(e.Message)}).", e);
        }
    }

    /// <summary>Writes one frame, whole.</summary>
    /// <exception cref="DhException">The channel ended.</exception>
    public async Task WriteAsync(RequestHeader header, ReadOnlyMemory<byte> body, CancellationToken cancellationToken)
    {
        var json = header.ToJson();
        // In one piece where it is small: each write interrupts the guest once more.
        int together = body.Length <= MaxTogetherBytes ? body.Length : 0;
        byte[] start = new byte[PrefixBytes + json.Length + together];
        BinaryPrimitives.WriteInt32LittleEndian(start, json.Length);
        BinaryPrimitives.WriteInt32LittleEndian(start.AsSpan(4), body.Length);
        json.CopyTo(start.AsMemory(PrefixBytes));
        body[..together].CopyTo(start.AsMemory(PrefixBytes + json.Length));
        await _writing.WaitAsync(cancellationToken).ConfigureAwait(false);
        try
        {
            // A frame that was begun is finished: half of one would end the sandbox.
            await transport.SendAsync(start).ConfigureAwait(false);
            await transport.SendAsync(body[together..]).ConfigureAwait(false);
        }
        catch (IOException e)
        {
            throw new DhException(DhErrorReason.Guest, "The guest channel was closed while a request was sent: the microVM has ended.", e);
        }
        finally
        {
            _writing.Release();
        }
    }

    /// <summary>Whether bytes have come that nobody has asked for yet.</summary>
    public bool HasUnread => _inputStart < _inputEnd;

    public void Dispose() => _writing.Dispose();

    // Pooled: a guest that sends its output in small pieces must not make the host allocate for each.
    [AsyncMethodBuilder(typeof(PoolingAsyncValueTaskMethodBuilder))]
    private async ValueTask FillAsync(Memory<byte> target, CancellationToken cancellationToken)
    {
        while (target.Length > 0)
        {
            if (_inputStart < _inputEnd)
            {
                int count = Math.Min(target.Length, _inputEnd - _inputStart);
                _input.AsMemory(_inputStart, count).CopyTo(target);
                _inputStart += count;
                target = target[count..];
            }
            else if (target.Length >= _input.Length)
            {
                // What is larger than the buffer goes where it belongs.
                target = target[await ReceiveAsync(target, cancellationToken).ConfigureAwait(false)..];
            }
            else
            {
                _inputStart = _inputEnd = 0;
                _inputEnd = await ReceiveAsync(_input, cancellationToken).ConfigureAwait(false);
            }
        }
    }

    [AsyncMethodBuilder(typeof(PoolingAsyncValueTaskMethodBuilder<>))]
    private async ValueTask<int> ReceiveAsync(Memory<byte> buffer, CancellationToken cancellationToken)
    {
        int count;
        try
        {
            count = await transport.ReceiveAsync(buffer, cancellationToken).ConfigureAwait(false);
        }
        catch (IOException e)
        {
            throw new DhException(DhErrorReason.Guest, $"The guest channel broke: {e.Message.TrimEnd('.')}.", e);
        }

        return count > 0 ? count : throw new DhException(DhErrorReason.Guest, "The guest channel ended: the microVM has ended.");
    }
}
