using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;

namespace Dh.Vmm.Firecracker;

/// <summary>
/// A stream to a guest through Firecracker's socket: <c>CONNECT PORT</c>, answered with <c>OK HOSTPORT</c>; a refusal is end of file without a
/// word. Only a machine that runs is connected to: what is accepted before is reset, and so may be what comes to a restored guest before it has
/// reset the connections of its snapshot. Hence a connection counts once the guest has spoken, which the runner does at once. A half-closed
/// connection loses its replies, so none is.
/// </summary>
internal static class VsockConnection
{
    private const int MaxAnswerBytes = 32;
    private const string NotAnswered = "it was not answered";
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(1);
    private static readonly TimeSpan FirstPause = TimeSpan.FromMilliseconds(2);
    private static readonly TimeSpan LongestPause = TimeSpan.FromMilliseconds(100);

    /// <summary>Connects to a guest that speaks first; one that does not listen yet, or drops the connection, is asked again.</summary>
    /// <param name="path">Firecracker's socket.</param>
    /// <param name="port">The guest's port.</param>
    /// <param name="timeLimit">At most this long.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">The guest does not take it in time, or the answer is none.</exception>
    public static async Task<Socket> ConnectAsync(string path, uint port, TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        long start = Stopwatch.GetTimestamp(), begun = start;
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(timeLimit);
        string state = NotAnswered;
        string? ended = null; // how the attempt before went
        int attempts = 0;
        try
        {
            for (var pause = FirstPause; ; pause = TimeSpan.FromTicks(Math.Min(pause.Ticks * 2, LongestPause.Ticks)))
            {
                attempts++;
                begun = Stopwatch.GetTimestamp();
                state = NotAnswered;
                var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
                bool connected = false;
                try
                {
                    await socket.ConnectAsync(new UnixDomainSocketEndPoint(path), limit.Token).ConfigureAwait(false);
                    await socket.SendAsync(Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"CONNECT {port}\n")), SocketFlags.None, limit.Token).ConfigureAwait(false);
                    if (await IsAcceptedAsync(socket, port, limit.Token).ConfigureAwait(false))
                    {
                        state = "it was taken, and nothing was said";
                        connected = await socket.ReceiveAsync(new byte[1], SocketFlags.Peek, limit.Token).ConfigureAwait(false) > 0;
                    }
                    else
                    {
                        state = "it was refused";
                    }
                }
                catch (SocketException e)
                {
                    state = e.SocketErrorCode.ToString();
                }
                finally
                {
                    if (!connected)
                    {
                        socket.Dispose();
                    }
                }

                if (connected)
                {
                    return socket;
                }

                ended = state;
                await Task.Delay(pause, limit.Token).ConfigureAwait(false);
            }
        }
        catch (OperationCanceledException e) when (!cancellationToken.IsCancellationRequested)
        {
            // An attempt that had only just begun says less than the one before.
            string last = ended is null || Stopwatch.GetElapsedTime(begun) > Patience ? state : ended;
            throw new DhException(
                DhErrorReason.Guest,
                $"The guest's runner took no connection on vsock port {port} within {Stopwatch.GetElapsedTime(start).TotalSeconds:0.#} s ({attempts} attempts, the last: {last}).",
                e);
        }
    }

    // Byte by byte: what follows the line is the guest's.
    private static async Task<bool> IsAcceptedAsync(Socket socket, uint port, CancellationToken cancellationToken)
    {
        byte[] answer = new byte[MaxAnswerBytes];
        for (int length = 0; length < answer.Length; length++)
        {
            if (await socket.ReceiveAsync(answer.AsMemory(length, 1), SocketFlags.None, cancellationToken).ConfigureAwait(false) == 0)
            {
                return length == 0 ? false : throw Wrong(answer.AsSpan(0, length));
            }

            if (answer[length] == '\n')
            {
                return answer.AsSpan().StartsWith("OK "u8) ? true : throw Wrong(answer.AsSpan(0, length));
            }
        }

        throw Wrong(answer);

        DhException Wrong(ReadOnlySpan<byte> said) =>
            new(DhErrorReason.Vmm, $"Firecracker answered `CONNECT {port}` with \"{Untrusted.OneLine(Encoding.Latin1.GetString(said))}\" instead of OK.");
    }
}
