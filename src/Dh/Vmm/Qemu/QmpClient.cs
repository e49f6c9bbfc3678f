using System.Net.Sockets;
using System.Text.Json;
using System.Threading.Channels;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Vmm.Qemu;

/// <summary>
/// QEMU's monitor protocol over an inherited socketpair (docs/interop/qmp-spec.txt): one command at a time, answers in order, events between them.
/// QEMU is hostile: neither its lines nor the number of those that wait to be read grow beyond a bound.
/// </summary>
internal sealed class QmpClient : IDisposable
{
    private const int MaxLineBytes = 1 << 20;
    private const int MaxWaiting = 64;
    private const int MaxDepth = 64;
    private const string MigrationEvent = "MIGRATION";

    private readonly Socket _socket;
    private readonly TimeSpan _timeLimit;
    private readonly Func<string> _lastWords;
    private readonly Channel<QmpMessage> _replies = Channel.CreateBounded<QmpMessage>(new BoundedChannelOptions(MaxWaiting) { SingleReader = true, SingleWriter = true });
    private readonly Channel<QmpMessage> _events = Channel.CreateBounded<QmpMessage>(new BoundedChannelOptions(MaxWaiting) { SingleReader = true, SingleWriter = true });

    /// <summary>Starts reading.</summary>
    /// <param name="socket">Our end; owned from now on.</param>
    /// <param name="timeLimit">For each command and each event that is waited for.</param>
    /// <param name="lastWords">What QEMU last said, for messages.</param>
    public QmpClient(Socket socket, TimeSpan timeLimit, Func<string> lastWords)
    {
        _socket = socket;
        _timeLimit = timeLimit;
        _lastWords = lastWords;
        _ = ReadAllAsync();
    }

    /// <summary>Waits for the greeting and leaves the negotiation mode.</summary>
    public async Task ConnectAsync(CancellationToken cancellationToken)
    {
        var greeting = await NextAsync(_replies.Reader, "greeting", cancellationToken).ConfigureAwait(false);
        if (!greeting.IsGreeting)
        {
            throw new DhException(DhErrorReason.Vmm, "QEMU's first words on its monitor are no QMP greeting.");
        }

        await ExecuteAsync("qmp_capabilities", cancellationToken).ConfigureAwait(false);
    }

    /// <summary>A command without arguments.</summary>
    public Task ExecuteAsync(string command, CancellationToken cancellationToken) => SendAsync(command, null, null, cancellationToken);

    /// <summary>balloon: asks the guest to give memory back until it has this much left, or to take it again; the guest takes its time.</summary>
    /// <param name="bytes">What the guest is to have.</param>
    /// <param name="cancellationToken">Gives up.</param>
    public Task SetBalloonAsync(long bytes, CancellationToken cancellationToken) =>
        SendAsync("balloon", json => json.WriteNumber("value"u8, bytes), null, cancellationToken);

    /// <summary>migrate-set-capabilities: what a save and a restore must both have on.</summary>
    public Task SetMigrationCapabilitiesAsync(CancellationToken cancellationToken) => SendAsync("migrate-set-capabilities", WriteCapabilities, null, cancellationToken);

    /// <summary>migrate-incoming from an inherited descriptor; ends when the state is loaded.</summary>
    public async Task MigrateIncomingAsync(int descriptor, CancellationToken cancellationToken)
    {
        await SendAsync("migrate-incoming", json => json.WriteString("uri"u8, $"fd:{descriptor}"), null, cancellationToken).ConfigureAwait(false);
        await WaitMigrationAsync("migrate-incoming", cancellationToken).ConfigureAwait(false);
    }

    /// <summary>migrate to a file that is passed along; ends when the state is written.</summary>
    public async Task MigrateAsync(SafeFileHandle file, CancellationToken cancellationToken)
    {
        await SendAsync("getfd", static json => json.WriteString("fdname"u8, "state"u8), file, cancellationToken).ConfigureAwait(false);
        await SendAsync("migrate", static json => json.WriteString("uri"u8, "fd:state"u8), null, cancellationToken).ConfigureAwait(false);
        await WaitMigrationAsync("migrate", cancellationToken).ConfigureAwait(false);
    }

    /// <inheritdoc/>
    public void Dispose() => _socket.Dispose();

    private static void WriteCapabilities(Utf8JsonWriter json)
    {
        json.WriteStartArray("capabilities"u8);
        foreach (string name in (string[])["x-ignore-shared", "events"])
        {
            json.WriteStartObject();
            json.WriteString("capability"u8, name);
            json.WriteBoolean("state"u8, true);
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private async Task SendAsync(string name, Action<Utf8JsonWriter>? writeArguments, SafeFileHandle? descriptor, CancellationToken cancellationToken)
    {
        byte[] line = [.. JsonMembers.Write(json =>
        {
            json.WriteString("execute"u8, name);
            if (writeArguments is not null)
            {
                json.WriteStartObject("arguments"u8);
                writeArguments(json);
                json.WriteEndObject();
            }
        }).Span, (byte)'\n'];
        try
        {
            FdPassing.Send(_socket.SafeHandle, line, descriptor is null ? [] : [descriptor]);
        }
        catch (Exception e) when (e is LinuxException or ObjectDisposedException)
        {
            throw Ended(name, e);
        }

        var reply = await NextAsync(_replies.Reader, name, cancellationToken).ConfigureAwait(false);
        if (reply.Error is { } error)
        {
            throw new DhException(DhErrorReason.Vmm, $"QEMU refused `{name}`: {Untrusted.OneLine(error.Desc)} ({Untrusted.OneLine(error.Class)}).{_lastWords()}");
        }
    }

    private async Task WaitMigrationAsync(string command, CancellationToken cancellationToken)
    {
        while (true)
        {
            var message = await NextAsync(_events.Reader, command, cancellationToken).ConfigureAwait(false);
            switch (message.Event, message.Status)
            {
                case (MigrationEvent, "completed"):
                    return;
                case (MigrationEvent, "failed"):
                    throw new DhException(DhErrorReason.Vmm, $"QEMU's `{command}` of the device state failed.{_lastWords()}");
            }
        }
    }

    private async Task<QmpMessage> NextAsync(ChannelReader<QmpMessage> reader, string what, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(_timeLimit);
        try
        {
            return await reader.ReadAsync(limit.Token).ConfigureAwait(false);
        }
        catch (ChannelClosedException e)
        {
            throw Ended(what, e.InnerException);
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.Vmm, $"QEMU did not answer `{what}` within {_timeLimit.TotalSeconds:0} s.{_lastWords()}");
        }
    }

    private DhException Ended(string what, Exception? inner) => new(
        DhErrorReason.Vmm,
        inner is InvalidDataException
            ? $"QEMU broke its monitor's protocol before it had answered `{what}`: {inner.Message}{_lastWords()}"
            : $"QEMU ended before it had answered `{what}`.{_lastWords()}",
        inner);

    private async Task ReadAllAsync()
    {
        Exception? failure = null;
        byte[] buffer = new byte[16 * 1024];
        int length = 0;
        try
        {
            while (true)
            {
                if (length == buffer.Length)
                {
                    Array.Resize(ref buffer, buffer.Length < MaxLineBytes
                        ? buffer.Length * 2
                        : throw new InvalidDataException($"a line of more than {MaxLineBytes} bytes."));
                }

                int read = await _socket.ReceiveAsync(buffer.AsMemory(length), SocketFlags.None).ConfigureAwait(false);
                if (read == 0)
                {
                    return;
                }

                length += read;
                int start = 0;
                for (int end; (end = Array.IndexOf(buffer, (byte)'\n', start, length - start)) >= 0; start = end + 1)
                {
                    Take(Parse(buffer.AsMemory(start, end - start)));
                }

                buffer.AsSpan(start, length - start).CopyTo(buffer);
                length -= start;
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException or InvalidDataException)
        {
            failure = e;
        }
        finally
        {
            _replies.Writer.TryComplete(failure);
            _events.Writer.TryComplete(failure);
        }
    }

    private static QmpMessage Parse(ReadOnlyMemory<byte> line)
    {
        try
        {
            return JsonMembers.Read(line, MaxDepth, static json => new QmpMessage(
                json.Has("QMP"u8), json.Has("return"u8), json.Object("error"u8, static error => new QmpError(error.Text("class"u8), error.Text("desc"u8))),
                json.Text("event"u8), json.Object("data"u8, static data => data.Text("status"u8) ?? ""), json.Has("id"u8))) is { IsOurs: true } message
                ? message
                : throw new InvalidDataException("a line that is no greeting, event, or answer to a command of ours.");
        }
        catch (JsonException e)
        {
            throw new InvalidDataException("a line that is no JSON object of the expected shape.", e);
        }
    }

    private void Take(QmpMessage message)
    {
        if (message.Event is not (null or MigrationEvent))
        {
            return; // nobody waits for it
        }

        if (!(message.Event is null ? _replies : _events).Writer.TryWrite(message))
        {
            throw new InvalidDataException($"more than {MaxWaiting} lines that nobody has asked for.");
        }
    }

    private sealed record QmpError(string? Class, string? Desc);

    /// <summary>A line of QEMU's.</summary>
    private sealed record QmpMessage(bool IsGreeting, bool IsReturn, QmpError? Error, string? Event, string? Status, bool HasId)
    {
        /// <summary>Whether it is something that can come without a command that has an id, which ours have not.</summary>
        public bool IsOurs => !HasId && (IsGreeting || IsReturn || Error is not null || Event is not null);
    }
}
