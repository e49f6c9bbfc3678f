using System.Diagnostics;
using System.Text;
using System.Threading.Channels;
using Dh.Linux;

namespace Dh.Guest;

/// <summary>
/// The host's side of a session with a runner. One task owns it; its state decides what may be sent:
/// <code>
/// Restored --hello/hello--> Greeted --exec--> Running --result--> Greeted, or Ended after the last run
///     |                      |    |                 |
///     |                      |    +-- HandOver --> HandedOver: another process goes on with Resume
///     +----------------------+----------------------+--> Broken (protocol, silence, end of file): the sandbox is of no more use
/// </code>
/// No code is sent before the guest has said that it is no copy any more.
/// </summary>
internal sealed class GuestSession(IGuestTransport transport) : IDisposable
{
    /// <summary>The protocol that this build speaks (docs/guest-protocol.md).</summary>
    public const int ProtocolVersion = 2;

    /// <summary>How long interrupted code may clean up before it is killed in the guest.</summary>
    public static readonly TimeSpan InterruptGrace = TimeSpan.FromSeconds(2);

    /// <summary>How long the runner may take beyond the grace to report the end: then the sandbox is broken.</summary>
    private static readonly TimeSpan InterruptMargin = TimeSpan.FromSeconds(5);

    /// <summary>How far behind the host's a guest's clock may be.</summary>
    private static readonly TimeSpan ClockTolerance = TimeSpan.FromMilliseconds(10);

    /// <summary>How far behind it may be when code is about to come, which brings the time once more.</summary>
    private static readonly TimeSpan HelloTolerance = TimeSpan.FromMilliseconds(50);

    private const int MaxClockExchanges = 16;
    private const int EntropyBytes = 256;
    private const int MaxCredit = 64 * 1024;
    private const int MaxUnusedCredits = 64;

    private readonly GuestChannel _channel = new(transport);
    private State _state = State.Restored;
    private long _lastId;

    private enum State
    {
        Restored,
        Greeted,
        Running,
        HandedOver,
        Ended,
        Broken,
    }

    /// <summary>Goes on with a session that another process has greeted and handed over.</summary>
    /// <param name="transport">The guest channel.</param>
    /// <param name="lastId">The number of the last request, as <see cref="HandOver"/> has told it.</param>
    public static GuestSession Resume(IGuestTransport transport, long lastId) => new(transport) { _state = State.Greeted, _lastId = lastId };

    /// <summary>Ends the use of the guest channel here, so that another process can go on with it.</summary>
    /// <returns>The number of the last request.</returns>
    /// <exception cref="DhException">The guest has sent something that nobody has asked for.</exception>
    /// <exception cref="InvalidOperationException">The guest was not greeted, or runs something.</exception>
    public long HandOver()
    {
        if (_state != State.Greeted)
        {
            throw new InvalidOperationException($"A guest is handed over when it was greeted and runs nothing; it is {_state}.");
        }

        if (_channel.HasUnread)
        {
            throw Break("it speaks without being asked");
        }

        _state = State.HandedOver;
        return _lastId;
    }

    /// <summary>Waits for the runner of a machine that boots.</summary>
    /// <returns>The engine's version.</returns>
    /// <exception cref="DhException">It did not come in time, or speaks another protocol.</exception>
    public async Task<string> WaitReadyAsync(TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        var header = await ExpectAsync("ready", timeLimit, cancellationToken).ConfigureAwait(false);
        return header.EngineVersion ?? throw Break("its `ready` has no engine_version");
    }

    /// <summary>Makes the clone its own: clock, entropy, identity. Required once before any code.</summary>
    /// <param name="timeLimit">At most this long.</param>
    /// <param name="cancellationToken">Gives up; the session is broken then.</param>
    /// <exception cref="DhException">The guest did not answer in time, or wrongly.</exception>
    public async Task GreetAsync(TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        if (_state != State.Restored)
        {
            throw new InvalidOperationException($"A guest is greeted once, after its restore; it is {_state}.");
        }

        _state = State.Broken; // until it has answered
        string id = Convert.ToHexStringLower(Entropy.GetBytes(16));
        var hello = new HelloHeader(ProtocolVersion, WallClockNs(), $"dh-{id[..12]}", id, Guid.NewGuid().ToString());
        await _channel.WriteAsync(hello, Entropy.GetBytes(EntropyBytes), cancellationToken).ConfigureAwait(false);
        var answer = await ExpectAsync("hello", timeLimit, cancellationToken).ConfigureAwait(false);
        _state = State.Greeted;
        if (IsBehind(answer, HelloTolerance))
        {
            await CorrectClockAsync(timeLimit, cancellationToken).ConfigureAwait(false);
        }
    }

    /// <summary>
    /// Brings the guest's clock forward to the host's. A guest that waits for a processor takes the time late, and its clock stays behind by as
    /// much; its answer says by how much at most, and it is told again until that is little, or often enough.
    /// </summary>
    /// <param name="timeLimit">At most this long for each answer.</param>
    /// <param name="cancellationToken">Gives up; the session is broken then.</param>
    /// <exception cref="DhException">The guest did not answer in time, or wrongly.</exception>
    /// <exception cref="InvalidOperationException">The guest was not greeted, or runs something.</exception>
    public async Task CorrectClockAsync(TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        if (_state != State.Greeted)
        {
            throw new InvalidOperationException($"A guest's clock is corrected when it was greeted and runs nothing; it is {_state}.");
        }

        _state = State.Broken; // until it has answered
        GuestHeader answer;
        int exchanges = 0;
        do
        {
            await _channel.WriteAsync(new ClockHeader(WallClockNs()), default, cancellationToken).ConfigureAwait(false);
            answer = await ExpectAsync("clock", timeLimit, cancellationToken).ConfigureAwait(false);
        }
        while (++exchanges < MaxClockExchanges && IsBehind(answer, ClockTolerance));
        _state = State.Greeted;
    }

    /// <summary>Runs code and streams its output.</summary>
    /// <param name="request">What to run.</param>
    /// <param name="output">Takes the output.</param>
    /// <param name="cancellationToken">Interrupts the code; the result then says so.</param>
    /// <exception cref="DhException">The guest broke its protocol, or went away; the input that the code waits for cannot be read; the template's restore code failed, and the code did not run.</exception>
    /// <exception cref="InvalidOperationException">The guest was not greeted, or runs something.</exception>
    public async Task<ExecutionResult> ExecuteAsync(ExecutionRequest request, IOutputSink output, CancellationToken cancellationToken)
    {
        if (_state != State.Greeted)
        {
            throw new InvalidOperationException($"Code runs in a guest that was greeted and runs nothing else; it is {_state}.");
        }

        byte[] source = Encoding.UTF8.GetBytes(request.Source);
        if (source.Length > ExecutionRequest.MaxSourceBytes)
        {
            throw new DhException(DhErrorReason.Usage, $"The code has {source.Length} bytes; at most {ExecutionRequest.MaxSourceBytes} can be sent.");
        }

        if (request.Timeout is { } limit && (limit <= TimeSpan.Zero || limit > ExecutionRequest.MaxTimeout))
        {
            throw new DhException(DhErrorReason.Usage, $"Code gets a time limit of more than 0 and at most {ExecutionRequest.MaxTimeout.TotalDays:0} days, not {limit}.");
        }

        long start = Stopwatch.GetTimestamp();
        long id = ++_lastId;
        string name = request.Mode == ExecutionMode.Code ? "-c" : request.Filename;
        var exec = new ExecHeader(
            id, request.Mode == ExecutionMode.Code ? "code" : "script", request.Filename, [name, .. request.Arguments], request.Environment, WallClockNs(), request.ShowResult, request.ShowTables, request.IsLast);
        _state = State.Running;
        // Not waited for: a guest that does not take the code is interrupted like one that does not end it.
        var sending = _channel.WriteAsync(exec, source, CancellationToken.None);

        using var ended = new CancellationTokenSource();
        using var overdue = new CancellationTokenSource();
        var credit = Channel.CreateBounded<int>(new BoundedChannelOptions(MaxUnusedCredits) { SingleReader = true, SingleWriter = true });
        var interruption = InterruptAsync(id, request.Timeout, overdue, ended.Token, cancellationToken);
        DhException? inputFailure = null;
        void FailInput(DhException failure)
        {
            inputFailure = failure;
            overdue.Cancel(); // the code would wait for its input for ever
        }

        // Begun when the code waits for input for the first time.
        Task? input = null;
        bool TakeCredit(int bytes)
        {
            bool taken = credit.Writer.TryWrite(bytes);
            input ??= Task.Run(() => PumpInputAsync(id, request.Input ?? Stream.Null, credit.Reader, FailInput, ended.Token), CancellationToken.None);
            return taken;
        }

        GuestHeader? result = null;
        long received;
        try
        {
            var header = await ReceiveUntilResultAsync(id, output, TakeCredit, overdue.Token).ConfigureAwait(false);
            await sending.WaitAsync(overdue.Token).ConfigureAwait(false);
            result = header;
        }
        catch (OperationCanceledException) when (overdue.IsCancellationRequested)
        {
            if (inputFailure is not null)
            {
                throw inputFailure;
            }

            // The guest does not even report the end of interrupted code: the caller gets its outcome, the sandbox is of no more use.
        }
        finally
        {
            received = Stopwatch.GetTimestamp();
            _state = result is null ? State.Broken : request.IsLast ? State.Ended : State.Greeted;
#pragma warning disable VSTHRD103 // What it calls is short, and this session's own; CancelAsync would begin a thread for it.
            ended.Cancel();
#pragma warning restore VSTHRD103
            // A read of the caller's input that still waits cannot be called back, nor can code that is half sent.
            LeaveBehind(input ?? Task.CompletedTask);
            LeaveBehind(sending);
        }

        var interrupted = await interruption.ConfigureAwait(false);
        var ending = result is null
            ? new ExecutionResult { Outcome = interrupted!.Value, ExitCode = 128 + PidFd.SigKill, Signal = PidFd.SigKill }
            : Result(result, interrupted);
        return ending with { Elapsed = Stopwatch.GetElapsedTime(start, received), ReceivedAt = received };
    }

    public void Dispose() => _channel.Dispose();

    /// <summary>Waits no more for a task, and observes its failure.</summary>
    private static void LeaveBehind(Task task) =>
        _ = task.ContinueWith(static task => task.Exception, CancellationToken.None, TaskContinuationOptions.OnlyOnFaulted, TaskScheduler.Default);

    /// <summary>Whether the guest's clock may be behind this host's by more than is tolerable. It is never before it.</summary>
    private bool IsBehind(GuestHeader answer, TimeSpan tolerance) =>
        WallClockNs() - (answer.WallClockNs ?? throw Break($"its `{answer.Type}` has no wall_clock_ns")) > tolerance.Ticks * 100;

    private static long WallClockNs() => (DateTimeOffset.UtcNow - DateTimeOffset.UnixEpoch).Ticks * 100;

    private ExecutionResult Result(GuestHeader header, ExecutionOutcome? interrupted)
    {
        if (header.ExitCode is not (>= 0 and <= 255) || header.Outcome is not ("exited" or "signaled"))
        {
            throw Break("its `result` has no valid outcome and exit_code");
        }

        if (!double.IsFinite(header.RunMs))
        {
            throw Break("its `result` has no valid run_ms");
        }

        if (header.NotRun)
        {
            throw new DhException(DhErrorReason.Image, $"The template's restore code failed, and the code did not run: {Untrusted.OneLine($"{header.Error?.Type}: {header.Error?.Message}")}. Correct [restore] in the template, then `dh vm prepare --template FILE`.");
        }

        return new ExecutionResult
        {
            Outcome = interrupted ?? (header.Outcome == "exited" ? ExecutionOutcome.Exited : ExecutionOutcome.Signaled),
            ExitCode = header.ExitCode.Value,
            Signal = header.Signal,
            OutOfMemory = header.OutOfMemory,
            ResultRepr = header.ResultRepr,
            Error = header.Error,
            Tables = header.Tables ?? [],
            GuestRunMilliseconds = header.RunMs,
        };
    }

    private async Task<GuestHeader> ReceiveUntilResultAsync(long id, IOutputSink output, Func<int, bool> takeCredit, CancellationToken overdue)
    {
        while (true)
        {
            var (header, body) = await _channel.ReadAsync(overdue).ConfigureAwait(false);
            if (header.Type is "error")
            {
                throw Break($"it refused the code: {Untrusted.OneLine(header.Message)}");
            }

            if (header.Id != id)
            {
                throw Break($"a `{Untrusted.OneLine(header.Type)}` for request {header.Id} while {id} runs");
            }

            switch (header.Type)
            {
                case "stdout" or "stderr":
                    await output.WriteAsync(header.Type == "stdout" ? OutputStream.Output : OutputStream.Error, body, overdue).ConfigureAwait(false);
                    break;
                case "stdin-credit" when header.Bytes is > 0 and <= MaxCredit && takeCredit(header.Bytes.Value):
                    break;
                case "result":
                    return header;
                default:
                    throw Break($"an unexpected `{Untrusted.OneLine(header.Type)}`");
            }
        }
    }

    /// <summary>Waits for the end of the run, of its time, or of the caller's patience; on the latter two interrupts the code.</summary>
    private async Task<ExecutionOutcome?> InterruptAsync(
        long id, TimeSpan? timeout, CancellationTokenSource overdue, CancellationToken ended, CancellationToken cancellationToken)
    {
        using var over = CancellationTokenSource.CreateLinkedTokenSource(ended, cancellationToken);
        over.CancelAfter(timeout ?? Timeout.InfiniteTimeSpan);
        var waiting = new TaskCompletionSource(); // goes on where it is cancelled: with a run that has just ended, in its own thread
        using (over.Token.Register(waiting.SetResult))
        {
            await waiting.Task.ConfigureAwait(false);
        }

        if (ended.IsCancellationRequested)
        {
            return null;
        }

        var outcome = cancellationToken.IsCancellationRequested ? ExecutionOutcome.Interrupted : ExecutionOutcome.Timeout;
        overdue.CancelAfter(InterruptGrace + InterruptMargin);
        var cancel = new CancelHeader(id, (int)InterruptGrace.TotalMilliseconds);
        try
        {
            await _channel.WriteAsync(cancel, default, ended).ConfigureAwait(false);
        }
        catch (Exception e) when (e is DhException or OperationCanceledException)
        {
            // The machine has ended, or the result came first: the reader knows.
        }

        return outcome;
    }

    /// <summary>Reads the caller's input only against the guest's credit: a loop around the program keeps what the code does not read.</summary>
    private async Task PumpInputAsync(long id, Stream input, ChannelReader<int> credit, Action<DhException> failed, CancellationToken ended)
    {
        byte[] buffer = [];
        await foreach (int bytes in credit.ReadAllAsync(ended).ConfigureAwait(false))
        {
            buffer = buffer.Length < bytes ? new byte[bytes] : buffer;
            int read;
            try
            {
                read = await input.ReadAsync(buffer.AsMemory(0, bytes), ended).ConfigureAwait(false);
            }
            catch (Exception e) when (e is not OperationCanceledException && !ended.IsCancellationRequested)
            {
                failed(new DhException(DhErrorReason.Host, $"The code's standard input cannot be read: {e.Message.TrimEnd('.')}. Give it another one, or /dev/null.", e));
                return;
            }

            await _channel.WriteAsync(new StdinHeader(id, read == 0), buffer.AsMemory(0, read), ended).ConfigureAwait(false);
            if (read == 0)
            {
                return;
            }
        }
    }

    private async Task<GuestHeader> ExpectAsync(string type, TimeSpan timeLimit, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(timeLimit);
        try
        {
            var (header, _) = await _channel.ReadAsync(limit.Token).ConfigureAwait(false);
            if (header.Type == "ready" && type == "hello")
            {
                // What every connection over vsock begins with.
                (header, _) = await _channel.ReadAsync(limit.Token).ConfigureAwait(false);
            }

            if (header.Type != type)
            {
                throw Break($"`{Untrusted.OneLine(header.Type)}` instead of `{type}`");
            }

            return type == "clock" || header.Protocol == ProtocolVersion
                ? header
                : throw Break($"it speaks version {header.Protocol}, this dh {ProtocolVersion}: run `dh vm prepare --force`");
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            _state = State.Broken;
            throw new DhException(DhErrorReason.Guest, $"The guest sent no `{type}` within {timeLimit.TotalSeconds:0} s.");
        }
    }

    private DhException Break(string what)
    {
        _state = State.Broken;
        return new DhException(DhErrorReason.Guest, $"The guest broke its protocol: {what}.");
    }
}
