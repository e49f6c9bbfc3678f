using System.Globalization;
using System.Net.Sockets;
using System.Text;

namespace Dh.TestSupport;

/// <summary>An HTTP answer as it stood on the wire.</summary>
/// <param name="Status">The status.</param>
/// <param name="Head">Status line and headers, with their line ends.</param>
/// <param name="Body">The body; empty without one.</param>
public sealed record RawAnswer(int Status, string Head, string Body);

/// <summary>A connection to an HTTP server on a Unix socket that says exactly what it is told to.</summary>
public sealed class RawHttp : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(10);

    private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);

    /// <summary>Connects.</summary>
    public RawHttp(string socketPath) => _socket.Connect(new UnixDomainSocketEndPoint(socketPath));

    /// <summary>Sends a request with a body of its Content-Length, without waiting.</summary>
    public Task SendAsync(string method, string path, string? body = null) => SayAsync(Request(method, path, body));

    /// <summary>Sends a request and hears the answer.</summary>
    public async Task<RawAnswer> AskAsync(string method, string path, string? body = null)
    {
        await SendAsync(method, path, body);
        return await HearAsync() ?? throw new EndOfStreamException($"end of file instead of an answer to {method} {path}");
    }

    /// <summary>Sends bytes as they are.</summary>
    public async Task SayAsync(string text) => await _socket.SendAsync(Encoding.UTF8.GetBytes(text), SocketFlags.None);

    /// <summary>Says no more, but hears on: shutdown(SHUT_WR).</summary>
    public void EndSending() => _socket.Shutdown(SocketShutdown.Send);

    /// <summary>Hears one answer; null at end of file.</summary>
    public async Task<RawAnswer?> HearAsync()
    {
        using var limit = new CancellationTokenSource(Limit);
        var text = new StringBuilder();
        while (!text.ToString().EndsWith("\r\n\r\n", StringComparison.Ordinal))
        {
            string next = await ReceiveAsync(1, limit.Token);
            if (next.Length == 0)
            {
                return text.Length == 0 ? null : throw new EndOfStreamException($"end of file after {text}");
            }

            text.Append(next);
        }

        string head = text.ToString();
        int length = head.Split("\r\n").FirstOrDefault(line => line.StartsWith("Content-Length: ", StringComparison.Ordinal)) is { } header
            ? int.Parse(header.AsSpan("Content-Length: ".Length), CultureInfo.InvariantCulture)
            : 0;
        return new RawAnswer(int.Parse(head.AsSpan(9, 3), CultureInfo.InvariantCulture), head, await ReceiveAsync(length, limit.Token));
    }

    /// <inheritdoc/>
    public void Dispose() => _socket.Dispose();

    private static string Request(string method, string path, string? body) =>
        $"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{(body is null ? "" : $"Content-Length: {Encoding.UTF8.GetByteCount(body)}\r\n")}\r\n{body}";

    private async Task<string> ReceiveAsync(int count, CancellationToken cancellationToken)
    {
        byte[] bytes = new byte[count];
        int at = 0;
        while (at < count)
        {
            int received;
            try
            {
                received = await _socket.ReceiveAsync(bytes.AsMemory(at), SocketFlags.None, cancellationToken);
            }
            catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionReset)
            {
                received = 0; // closed with what was sent unread
            }

            if (received == 0)
            {
                break;
            }

            at += received;
        }

        return Encoding.UTF8.GetString(bytes, 0, at);
    }
}
