using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization.Metadata;

namespace Dh.Vmm.Firecracker;

/// <summary>
/// Firecracker's API: HTTP/1.1 over one connection to its unix socket, one request at a time. Its own client instead of <c>HttpClient</c>:
/// a run makes two requests, and pays for whatever the first one brings in. Firecracker answers on the thread that restores, so a call that
/// hangs hangs every other one, and cannot be taken back: whoever does not answer in time is killed. It is hostile, too: no answer grows
/// beyond a bound.
/// </summary>
internal sealed class FirecrackerApi : IDisposable
{
    /// <summary>The longest body that Firecracker takes, in bytes.</summary>
    public const int MaxRequestBytes = 51_200;

    private const int MaxHeadBytes = 16 << 10;
    private const int MaxBodyBytes = 1 << 20;
    private const int MaxFaultLength = 1000; // its causes stand one behind the other, the one that matters last
    // It listens some milliseconds after its start; one that has not after a tenth of a second has other troubles than this wait.
    private const int ShortPauses = 100;
    private static readonly TimeSpan ShortPause = TimeSpan.FromMilliseconds(1);
    private static readonly TimeSpan LongPause = TimeSpan.FromMilliseconds(20);

    private readonly Socket _socket;
    private readonly Action _kill;
    private readonly Func<Task<string>> _end;
    private readonly Func<string> _waitedFor;
    private byte[] _input = new byte[4096];
    private int _inputLength;

    /// <summary>Talks over a connection.</summary>
    /// <param name="socket">Our end; owned from now on.</param>
    /// <param name="kill">Kills Firecracker.</param>
    /// <param name="end">How Firecracker has ended, with its last words, as the end of a message.</param>
    /// <param name="waitedFor">What a Firecracker that does not answer waits for, as a part of a message.</param>
    public FirecrackerApi(Socket socket, Action kill, Func<Task<string>> end, Func<string> waitedFor)
    {
        _socket = socket;
        _kill = kill;
        _end = end;
        _waitedFor = waitedFor;
    }

    /// <summary>Connects as soon as Firecracker, which has just been started, listens.</summary>
    /// <param name="path">The socket.</param>
    /// <param name="timeLimit">At most this long; then Firecracker is killed.</param>
    /// <param name="exited">Completes when Firecracker has ended.</param>
    /// <param name="kill">Kills Firecracker.</param>
    /// <param name="end">How Firecracker has ended, with its last words, as the end of a message.</param>
    /// <param name="waitedFor">What a Firecracker that does not answer waits for, as a part of a message.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">It ended, or does not listen in time.</exception>
    public static async Task<FirecrackerApi> ConnectAsync(
        string path, TimeSpan timeLimit, Task<VmmExit> exited, Action kill, Func<Task<string>> end, Func<string> waitedFor, CancellationToken cancellationToken)
    {
        long start = Stopwatch.GetTimestamp();
        for (int pauses = 0; ; pauses++)
        {
            var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            try
            {
                socket.Connect(new UnixDomainSocketEndPoint(path)); // local: it is there or it is not
                return new FirecrackerApi(socket, kill, end, waitedFor);
            }
            catch (SocketException e)
            {
                socket.Dispose();
                if (exited.IsCompleted)
                {
                    throw new DhException(DhErrorReason.Vmm, $"Firecracker ended before it listened for requests{await end().ConfigureAwait(false)}", e);
                }

                if (Stopwatch.GetElapsedTime(start) > timeLimit)
                {
                    kill();
                    throw new DhException(DhErrorReason.Vmm, $"Firecracker did not listen for requests within {timeLimit.TotalSeconds:0.#} s ({e.SocketErrorCode}) and was killed{await end().ConfigureAwait(false)}", e);
                }
            }

            await Task.WhenAny(exited, Task.Delay(pauses < ShortPauses ? ShortPause : LongPause, cancellationToken)).ConfigureAwait(false);
            cancellationToken.ThrowIfCancellationRequested();
        }
    }

    /// <summary>Sets something: <c>PUT</c>.</summary>
    /// <param name="path">What.</param>
    /// <param name="json">To what.</param>
    /// <param name="timeLimit">At most this long; then Firecracker is killed.</param>
    /// <param name="cancellationToken">Gives up; the connection is of no more use then.</param>
    /// <exception cref="VmmException">Firecracker refused.</exception>
    /// <exception cref="DhException">Firecracker ended, broke the protocol, or did not answer in time and was killed.</exception>
    public Task PutAsync(string path, string json, TimeSpan timeLimit, CancellationToken cancellationToken) =>
        SendAsync("PUT", path, Encoding.UTF8.GetBytes(json), timeLimit, cancellationToken);

    /// <inheritdoc cref="PutAsync(string, string, TimeSpan, CancellationToken)"/>
    /// <param name="path">What.</param>
    /// <param name="body">To what.</param>
    /// <param name="type">How it is written.</param>
    /// <param name="timeLimit">At most this long; then Firecracker is killed.</param>
    /// <param name="cancellationToken">Gives up; the connection is of no more use then.</param>
    public Task PutAsync<T>(string path, T body, JsonTypeInfo<T> type, TimeSpan timeLimit, CancellationToken cancellationToken) =>
        SendAsync("PUT", path, JsonSerializer.SerializeToUtf8Bytes(body, type), timeLimit, cancellationToken);

    /// <summary>Changes something: <c>PATCH</c>.</summary>
    /// <inheritdoc cref="PutAsync{T}(string, T, JsonTypeInfo{T}, TimeSpan, CancellationToken)"/>
    public Task PatchAsync<T>(string path, T body, JsonTypeInfo<T> type, TimeSpan timeLimit, CancellationToken cancellationToken) =>
        SendAsync("PATCH", path, JsonSerializer.SerializeToUtf8Bytes(body, type), timeLimit, cancellationToken);

    /// <summary>Asks for something: <c>GET</c>, which must have no body.</summary>
    /// <inheritdoc cref="PutAsync{T}(string, T, JsonTypeInfo{T}, TimeSpan, CancellationToken)"/>
    public async Task<T> GetAsync<T>(string path, JsonTypeInfo<T> type, TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        byte[] answer = await SendAsync("GET", path, null, timeLimit, cancellationToken).ConfigureAwait(false);
        try
        {
            return JsonSerializer.Deserialize(answer, type) ?? throw Broken($"GET {path}", "its answer is `null`");
        }
        catch (JsonException e)
        {
            throw Broken($"GET {path}", "its answer is no JSON of the expected shape", e);
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _socket.Dispose();

    private static DhException Broken(string request, string what, Exception? inner = null) =>
        new(DhErrorReason.Vmm, $"Firecracker broke HTTP when it answered `{request}`: {what}.", inner);

    private async Task<byte[]> SendAsync(string method, string path, byte[]? body, TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        string request = $"{method} {path}";
        if (body?.Length > MaxRequestBytes)
        {
            throw new DhException(DhErrorReason.Vmm, $"`{request}` has {body.Length} bytes; Firecracker takes at most {MaxRequestBytes}.");
        }

        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(timeLimit);
        try
        {
            await SendAllAsync(Message(request, body), limit.Token).ConfigureAwait(false);
            var (status, answer) = await ReceiveAsync(request, limit.Token).ConfigureAwait(false);
            return status is 200 or 204 ? answer : throw Refused(request, status, answer);
        }
        catch (Exception e) when (e is SocketException or EndOfStreamException)
        {
            throw new DhException(DhErrorReason.Vmm, $"Firecracker ended before it had answered `{request}`{await _end().ConfigureAwait(false)}", e);
        }
        catch (OperationCanceledException e) when (!cancellationToken.IsCancellationRequested)
        {
            string waitedFor = _waitedFor();
            _kill();
            throw new DhException(DhErrorReason.Vmm, $"Firecracker did not answer `{request}` within {timeLimit.TotalSeconds:0.#} s{waitedFor} and was killed{await _end().ConfigureAwait(false)}", e);
        }
    }

    private static byte[] Message(string request, byte[]? body)
    {
        // No Content-Length without a body: a GET that has one is refused.
        string head = body is null
            ? $"{request} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
            : string.Create(CultureInfo.InvariantCulture, $"{request} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\nContent-Length: {body.Length}\r\n\r\n");
        return [.. Encoding.ASCII.GetBytes(head), .. body ?? []]; // in one write: what follows a half-sent request is not read
    }

    private static VmmException Refused(string request, int status, byte[] answer)
    {
        string fault;
        try
        {
            var error = JsonSerializer.Deserialize(answer, FirecrackerJson.Default.ErrorAnswer);
            fault = error?.FaultMessage ?? error?.Error ?? "";
        }
        catch (JsonException)
        {
            fault = Encoding.UTF8.GetString(answer);
        }

        fault = Untrusted.OneLine(fault, MaxFaultLength);
        return new VmmException(request, fault, $"Firecracker refused `{request}` ({status}): {(fault.Length > 0 ? fault : "it does not say why")}");
    }

    private async Task SendAllAsync(ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
    {
        while (bytes.Length > 0)
        {
            bytes = bytes[await _socket.SendAsync(bytes, SocketFlags.None, cancellationToken).ConfigureAwait(false)..];
        }
    }

    private async Task<(int Status, byte[] Body)> ReceiveAsync(string request, CancellationToken cancellationToken)
    {
        int headLength;
        while ((headLength = _input.AsSpan(0, _inputLength).IndexOf("\r\n\r\n"u8)) < 0)
        {
            if (_inputLength >= MaxHeadBytes)
            {
                throw Broken(request, $"more than {MaxHeadBytes} bytes before its body");
            }

            await ReceiveMoreAsync(cancellationToken).ConfigureAwait(false);
        }

        var (status, bodyLength) = ParseHead(request, Encoding.Latin1.GetString(_input, 0, headLength));
        int bodyStart = headLength + 4, end = bodyStart + bodyLength;
        while (_inputLength < end)
        {
            await ReceiveMoreAsync(cancellationToken).ConfigureAwait(false);
        }

        byte[] body = _input[bodyStart..end];
        _inputLength -= end;
        _input.AsSpan(end, _inputLength).CopyTo(_input); // nothing, unless it answers what nobody has asked
        return status == 100 ? await ReceiveAsync(request, cancellationToken).ConfigureAwait(false) : (status, body);
    }

    private static (int Status, int BodyLength) ParseHead(string request, string head)
    {
        string[] lines = head.Split("\r\n");
        // HTTP/1.1 204 REASON: the reason may be empty, with or without the space before it.
        if (lines[0].Split(' ', 3) is not [var version, var code, ..] || !version.StartsWith("HTTP/1.", StringComparison.Ordinal)
            || code.Length != 3 || !int.TryParse(code, NumberStyles.None, CultureInfo.InvariantCulture, out int status))
        {
            throw Broken(request, $"its first line is \"{Untrusted.OneLine(lines[0])}\"");
        }

        int bodyLength = 0;
        foreach (string line in lines[1..])
        {
            int colon = line.IndexOf(':', StringComparison.Ordinal);
            string name = colon < 0 ? line : line[..colon];
            if (name.Equals("Transfer-Encoding", StringComparison.OrdinalIgnoreCase))
            {
                throw Broken(request, "its body has no length");
            }

            if (name.Equals("Content-Length", StringComparison.OrdinalIgnoreCase)
                && (!int.TryParse(line.AsSpan(colon + 1).Trim(), NumberStyles.None, CultureInfo.InvariantCulture, out bodyLength) || bodyLength > MaxBodyBytes))
            {
                throw Broken(request, $"its body's length is \"{Untrusted.OneLine(line[(colon + 1)..].Trim())}\"");
            }
        }

        return (status, bodyLength);
    }

    private async Task ReceiveMoreAsync(CancellationToken cancellationToken)
    {
        if (_inputLength == _input.Length)
        {
            Array.Resize(ref _input, _input.Length * 2); // both parts of an answer are bounded, and with them this
        }

        int read = await _socket.ReceiveAsync(_input.AsMemory(_inputLength), SocketFlags.None, cancellationToken).ConfigureAwait(false);
        _inputLength += read > 0 ? read : throw new EndOfStreamException();
    }
}
