using System.Net.Sockets;
using System.Text;
using Dh.Linux;

namespace Dh.TestSupport;

/// <summary>The far end of a connected socket pair, played by a test: it says exactly these bytes, however wrong they are.</summary>
public class FakePeer : IDisposable
{
    private readonly Socket _socket;

    protected FakePeer()
    {
        var (near, far) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        Near = new Socket(near);
        _socket = new Socket(far);
    }

    /// <summary>The end of what is tested.</summary>
    public Socket Near { get; }

    /// <summary>Sends bytes as they are.</summary>
    public async Task SayAsync(ReadOnlyMemory<byte> bytes)
    {
        while (bytes.Length > 0)
        {
            bytes = bytes[await _socket.SendAsync(bytes, SocketFlags.None)..];
        }
    }

    /// <summary>Sends text as it is.</summary>
    public Task SayAsync(string text) => SayAsync(Encoding.UTF8.GetBytes(text));

    /// <summary>Hears exactly so many bytes.</summary>
    public async Task<byte[]> HearAsync(int count)
    {
        byte[] bytes = new byte[count];
        for (int at = 0; at < count;)
        {
            int read = await _socket.ReceiveAsync(bytes.AsMemory(at), SocketFlags.None);
            at += read > 0 ? read : throw new EndOfStreamException($"The tested side ended after {at} of {count} bytes.");
        }

        return bytes;
    }

    /// <summary>Says no more: the tested side reads end of file.</summary>
    public void HangUp() => _socket.Dispose();

    /// <summary>Says no more, but does not go away: what the tested side sends is taken.</summary>
    public void FallSilent() => _socket.Shutdown(SocketShutdown.Send);

    /// <inheritdoc/>
    public void Dispose()
    {
        HangUp();
        Near.Dispose();
        GC.SuppressFinalize(this);
    }
}
