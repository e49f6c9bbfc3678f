using System.Net.Sockets;
using System.Runtime.CompilerServices;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Guest;

/// <summary>Carries the bytes of a guest channel. Whoever made it owns what it is made of.</summary>
internal interface IGuestTransport
{
    /// <summary>Receives what there is, and waits for the first of it.</summary>
    /// <returns>How many bytes; 0 at the end.</returns>
    /// <exception cref="IOException">The channel broke.</exception>
    ValueTask<int> ReceiveAsync(Memory<byte> buffer, CancellationToken cancellationToken);

    /// <summary>Sends all bytes.</summary>
    /// <exception cref="IOException">The channel broke.</exception>
    ValueTask SendAsync(ReadOnlyMemory<byte> bytes);
}

/// <summary>A socket, waited for by the runtime's threads.</summary>
internal sealed class SocketTransport(Socket socket) : IGuestTransport
{
    /// <inheritdoc/>
    [AsyncMethodBuilder(typeof(PoolingAsyncValueTaskMethodBuilder<>))]
    public async ValueTask<int> ReceiveAsync(Memory<byte> buffer, CancellationToken cancellationToken)
    {
        try
        {
            return await socket.ReceiveAsync(buffer, SocketFlags.None, cancellationToken).ConfigureAwait(false);
        }
        catch (SocketException e)
        {
            throw new IOException(e.Message, e);
        }
    }

    /// <inheritdoc/>
    public async ValueTask SendAsync(ReadOnlyMemory<byte> bytes)
    {
        try
        {
            while (bytes.Length > 0)
            {
                bytes = bytes[await socket.SendAsync(bytes, SocketFlags.None).ConfigureAwait(false)..];
            }
        }
        catch (SocketException e)
        {
            throw new IOException(e.Message, e);
        }
    }
}

/// <summary>
/// A descriptor, waited for by the thread that calls: for a program that has nothing else to do. <see cref="Socket"/> would begin a thread when it
/// is used first, and others to go on in.
/// </summary>
internal sealed class DescriptorTransport(SafeFileHandle descriptor) : IGuestTransport
{
    /// <inheritdoc/>
    public ValueTask<int> ReceiveAsync(Memory<byte> buffer, CancellationToken cancellationToken)
    {
        // Code runs as long as it takes: what ends the wait is the guest, its end, or the token, which a time limit cancels.
        using var cancelled = new WakeEvent();
        using (cancellationToken.Register(cancelled.Set))
        {
            Poll.WaitAny(Timeout.InfiniteTimeSpan, descriptor, cancelled.Handle);
        }

        cancellationToken.ThrowIfCancellationRequested();
        return new(Files.Read(descriptor, buffer.Span));
    }

    /// <inheritdoc/>
    public ValueTask SendAsync(ReadOnlyMemory<byte> bytes)
    {
        // A guest that does not take the rest must not keep the caller from interrupting it.
        var rest = bytes[Files.WriteAtOnce(descriptor, bytes.Span)..];
        return rest.Length == 0 ? ValueTask.CompletedTask : new(Task.Run(() => Files.WriteAll(descriptor, rest.Span)));
    }
}
