using System.Text;
using Dh.Guest;
using Dh.Linux;
using Dh.Preparation;
using Dh.TestSupport;
using Microsoft.Win32.SafeHandles;

namespace Dh.Tests.Guest;

/// <summary>A session with a guest that breaks the protocol: one clear error, soon, and no more than bounded memory.</summary>
[Collection(AloneCollection.Name)]
public sealed class GuestSessionTests : IDisposable
{
    private const int TestLimitMs = 10_000;
    private static readonly TimeSpan AnswerLimit = TimeSpan.FromSeconds(5);

    private readonly FakeGuest _guest = new();
    private readonly GuestSession _session;
    private readonly List<SafeFileHandle> _descriptors = [];

    public GuestSessionTests() => _session = new GuestSession(new SocketTransport(_guest.Near));

    [Fact(Timeout = TestLimitMs)]
    public async Task A_run_streams_its_output_and_ends_with_its_result()
    {
        await GreetAsync();
        var output = new CapturedText();
        var running = _session.ExecuteAsync(new ExecutionRequest { Source = "code" }, output, Cancellation);
        var (type, body) = await _guest.HearFrameAsync();
        Assert.Equal(("exec", "code"), (type, Encoding.UTF8.GetString(body)));
        await _guest.SayFrameAsync("""{"type": "stdout", "id": 1}""", "out"u8.ToArray());
        await _guest.SayFrameAsync(FakeGuest.Result());
        Assert.Equal(ExecutionOutcome.Exited, (await running).Outcome);
        Assert.Equal("out", output.Text);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_run_that_waits_on_its_callers_thread_has_ended_when_it_returns()
    {
        await GreetAsync();
        using var session = GuestSession.Resume(Waiting(), _session.HandOver());
        await _guest.SayFrameAsync("""{"type": "stdout", "id": 1}""", "out"u8.ToArray());
        await _guest.SayFrameAsync(FakeGuest.Result());
        var output = new CapturedText();
        var run = session.ExecuteAsync(new ExecutionRequest { Source = "code" }, output, Cancellation);
        Assert.True(run.IsCompletedSuccessfully);
        Assert.Equal(("out", 0), (output.Text, (await run).ExitCode));
    }

    [Theory(Timeout = 20_000)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_run_that_waits_on_its_callers_thread_can_be_interrupted(bool byTimeout)
    {
        await GreetAsync();
        using var session = GuestSession.Resume(Waiting(), _session.HandOver());
        using var cancelled = new CancellationTokenSource();
        var request = new ExecutionRequest { Source = "code", Timeout = byTimeout ? TimeSpan.FromMilliseconds(100) : null };
        var run = Task.Run(() => session.ExecuteAsync(request, new CapturedText(), cancelled.Token), Cancellation);
        Assert.Equal("exec", (await _guest.HearFrameAsync()).Type);
        if (!byTimeout)
        {
            await cancelled.CancelAsync();
        }

        Assert.Equal("cancel", (await _guest.HearFrameAsync()).Type);
        var result = await run; // the guest never answers
        Assert.Equal((byTimeout ? ExecutionOutcome.Timeout : ExecutionOutcome.Interrupted, 137), (result.Outcome, result.ExitCode));
    }

    [Fact(Timeout = 20_000)]
    public async Task Code_that_the_guest_does_not_take_does_not_keep_a_waiting_thread_from_its_timeout()
    {
        await GreetAsync();
        using var session = GuestSession.Resume(Waiting(), _session.HandOver());
        var request = new ExecutionRequest { Source = new string('#', ExecutionRequest.MaxSourceBytes), Timeout = TimeSpan.FromMilliseconds(100) };
        Assert.Equal(ExecutionOutcome.Timeout, (await Task.Run(() => session.ExecuteAsync(request, new CapturedText(), Cancellation), Cancellation)).Outcome);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_waiting_thread_sees_the_end_of_the_guest()
    {
        await GreetAsync();
        using var session = GuestSession.Resume(Waiting(), _session.HandOver());
        var run = Task.Run(() => session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation), Cancellation);
        Assert.Equal("exec", (await _guest.HearFrameAsync()).Type);
        _guest.HangUp();
        Assert.StartsWith("The guest channel ", (await Assert.ThrowsAsync<DhException>(() => run)).Message, StringComparison.Ordinal);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData(0)]
    [InlineData(-1)]
    [InlineData(31)]
    public async Task A_time_limit_that_nobody_could_keep_is_refused_before_anything_is_sent(int days)
    {
        await GreetAsync();
        var request = new ExecutionRequest { Source = "code", Timeout = TimeSpan.FromDays(days) };
        Assert.Equal(DhErrorReason.Usage, (await Assert.ThrowsAsync<DhException>(() => _session.ExecuteAsync(request, new CapturedText(), Cancellation))).Reason);
        await _guest.SayFrameAsync(FakeGuest.Result());
        Assert.Equal(0, (await _session.ExecuteAsync(request with { Timeout = ExecutionRequest.MaxTimeout }, new CapturedText(), Cancellation)).ExitCode);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_session_that_was_handed_over_goes_on_where_it_was_and_no_longer_here()
    {
        await GreetAsync();
        await RunAsync(_session, FakeGuest.Result());
        using var next = GuestSession.Resume(new SocketTransport(_guest.Near), _session.HandOver());
        await RunAsync(next, FakeGuest.Result(id: 2));
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation));
        Assert.Throws<InvalidOperationException>(() => _session.HandOver());

        async Task RunAsync(GuestSession session, string result)
        {
            var running = session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation);
            _ = await _guest.HearFrameAsync();
            await _guest.SayFrameAsync(result);
            Assert.Equal(0, (await running).ExitCode);
        }
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Nothing_is_asked_of_a_guest_after_its_last_run()
    {
        await GreetAsync();
        await _guest.SayFrameAsync(FakeGuest.Result());
        Assert.Equal(0, (await _session.ExecuteAsync(new ExecutionRequest { Source = "code", IsLast = true }, new CapturedText(), Cancellation)).ExitCode);
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation));
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.CorrectClockAsync(AnswerLimit, Cancellation));
        Assert.Throws<InvalidOperationException>(() => _session.HandOver());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_guest_that_speaks_without_being_asked_is_not_handed_over()
    {
        var greeting = _session.GreetAsync(AnswerLimit, Cancellation);
        await _guest.SayAsync((byte[])[.. FakeGuest.Frame(FakeGuest.Hello), 1]);
        await greeting;
        Assert.Equal("The guest broke its protocol: it speaks without being asked.", Assert.Throws<DhException>(() => _session.HandOver()).Message);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData(1u, 0u)]
    [InlineData((1u << 20) + 1, 0u)]
    [InlineData(2u, (1u << 20) + 1)]
    [InlineData(16u << 20, 16u << 20)]
    [InlineData(uint.MaxValue, uint.MaxValue)]
    public async Task A_frame_out_of_bounds_is_refused_before_its_bytes_come(uint headerLength, uint bodyLength)
    {
        await _guest.SayAsync(FakeGuest.Prefix(headerLength, bodyLength));
        Assert.Equal($"The guest broke its protocol: a frame with a header of {headerLength} and a body of {bodyLength} bytes.", await GreetingFailsAsync());
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("no JSON")]
    [InlineData("[]")]
    [InlineData("{\"type\": \"hello\"")]
    [InlineData("{\"type\": 5}")]
    [InlineData("{\"type\": \"hello\", \"protocol\": 99999999999}")]
    [InlineData("{\"type\": \"\\ud800\"}")]
    public async Task A_header_that_is_no_JSON_object_of_the_right_shape_is_refused(string header)
    {
        await _guest.SayFrameAsync(header);
        Assert.StartsWith("The guest broke its protocol: a header that is no JSON object of the expected shape", await GreetingFailsAsync(), StringComparison.Ordinal);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("null")]
    [InlineData("{}")]
    public async Task A_header_without_a_type_is_refused(string header)
    {
        await _guest.SayFrameAsync(header);
        Assert.Equal("The guest broke its protocol: a frame without a type.", await GreetingFailsAsync());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Another_protocol_version_says_what_to_do()
    {
        await _guest.SayFrameAsync("""{"type": "hello", "protocol": 1}""");
        Assert.Equal("The guest broke its protocol: it speaks version 1, this dh 2: run `dh vm prepare --force`.", await GreetingFailsAsync());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_connection_may_begin_with_ready_but_only_begin()
    {
        const string ready = """{"type": "ready", "protocol": 2, "engine": "python", "engine_version": "3.11.2"}""";
        await _guest.SayFrameAsync(ready);
        await _guest.SayFrameAsync(ready);
        Assert.Equal("The guest broke its protocol: `ready` instead of `hello`.", await GreetingFailsAsync());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_guest_that_begins_with_ready_is_greeted()
    {
        await _guest.SayFrameAsync("""{"type": "ready", "protocol": 2, "engine": "python", "engine_version": "3.11.2"}""");
        await GreetAsync();
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_result_before_anything_was_sent_is_no_hello()
    {
        await _guest.SayFrameAsync(FakeGuest.Result());
        Assert.Equal("The guest broke its protocol: `result` instead of `hello`.", await GreetingFailsAsync());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_silent_guest_is_given_up()
    {
        var failure = await Assert.ThrowsAsync<DhException>(() => _session.GreetAsync(TimeSpan.FromMilliseconds(200), Cancellation));
        Assert.StartsWith("The guest sent no `hello` within", failure.Message, StringComparison.Ordinal);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task An_end_in_the_middle_of_a_frame_is_an_end()
    {
        await _guest.SayAsync(FakeGuest.Frame(FakeGuest.Hello).AsMemory(0, 20));
        _guest.HangUp();
        Assert.StartsWith("The guest channel ", await GreetingFailsAsync(), StringComparison.Ordinal);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("""{"type": "stdout", "id": 2}""", "a `stdout` for request 2 while 1 runs")]
    [InlineData("""{"type": "stdout"}""", "a `stdout` for request  while 1 runs")]
    [InlineData("""{"type": "result", "id": 2, "outcome": "exited", "exit_code": 0}""", "a `result` for request 2 while 1 runs")]
    [InlineData("""{"type": "no-such-type", "id": 1}""", "an unexpected `no-such-type`")]
    [InlineData("""{"type": "hello", "id": 1, "protocol": 2}""", "an unexpected `hello`")]
    [InlineData("""{"type": "\u001b[2J\n", "id": 1}""", "an unexpected ` [2J `")]
    [InlineData("""{"type": "error", "message": "no\u001b[2J\nway"}""", "it refused the code: no [2J way")]
    [InlineData("""{"type": "stdin-credit", "id": 1}""", "an unexpected `stdin-credit`")]
    [InlineData("""{"type": "stdin-credit", "id": 1, "bytes": 0}""", "an unexpected `stdin-credit`")]
    [InlineData("""{"type": "stdin-credit", "id": 1, "bytes": -1}""", "an unexpected `stdin-credit`")]
    [InlineData("""{"type": "stdin-credit", "id": 1, "bytes": 65537}""", "an unexpected `stdin-credit`")]
    [InlineData("""{"type": "result", "id": 1}""", "its `result` has no valid outcome and exit_code")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "exited", "exit_code": 256}""", "its `result` has no valid outcome and exit_code")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "won", "exit_code": 0}""", "its `result` has no valid outcome and exit_code")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "exited", "exit_code": 0, "run_ms": 1e999}""", "its `result` has no valid run_ms")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "exited", "exit_code": 0, "tables": [null]}""", "a header that is no JSON object of the expected shape (`tables` has another type or range)")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "exited", "exit_code": 0, "tables": [{"columns": [{"name": "x"}]}]}""", "a header that is no JSON object of the expected shape (`type` is missing)")]
    [InlineData("""{"type": "result", "id": 1, "outcome": "exited", "exit_code": 1, "error": {"type": "E"}}""", "a header that is no JSON object of the expected shape (`message` is missing)")]
    public async Task A_frame_that_the_run_does_not_allow_ends_it(string header, string what)
    {
        await GreetAsync();
        await _guest.SayFrameAsync(header);
        Assert.Equal($"The guest broke its protocol: {what}.", await RunFailsAsync());
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.ExecuteAsync(new ExecutionRequest { Source = "" }, new CapturedText(), Cancellation));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Code_that_was_not_run_is_no_result_and_the_guest_stays_usable()
    {
        await GreetAsync();
        var notRun = _session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation);
        _ = await _guest.HearFrameAsync();
        await _guest.SayFrameAsync(
            """{"type": "result", "id": 1, "outcome": "exited", "exit_code": 125, "run_ms": 1, "not_run": true, "error": {"type": "OSError", "message": "no\nway", "traceback": ""}}""");
        var error = await Assert.ThrowsAsync<DhException>(() => notRun);
        Assert.Equal(
            (DhErrorReason.Image, "The template's restore code failed, and the code did not run: OSError: no way. Correct [restore] in the template, then `dh vm prepare --template FILE`."),
            (error.Reason, error.Message));

        var next = _session.ExecuteAsync(new ExecutionRequest { Source = "code" }, new CapturedText(), Cancellation);
        _ = await _guest.HearFrameAsync();
        await _guest.SayFrameAsync(FakeGuest.Result(id: 2));
        Assert.Equal(0, (await next).ExitCode);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task What_the_guest_says_is_cut_in_messages()
    {
        await GreetAsync();
        var said = _guest.SayFrameAsync($$"""{"type": "error", "message": "{{new string('x', 500_000)}}"}""");
        Assert.InRange((await RunFailsAsync()).Length, 100, 300);
        await said;
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Output_after_the_result_fails_the_next_run()
    {
        await GreetAsync();
        await _guest.SayFrameAsync(FakeGuest.Result());
        await _guest.SayFrameAsync("""{"type": "stdout", "id": 1}""", "late"u8.ToArray());
        var output = new CapturedText();
        await _session.ExecuteAsync(new ExecutionRequest { Source = "" }, output, Cancellation);
        Assert.Equal("The guest broke its protocol: a `stdout` for request 1 while 2 runs.", await RunFailsAsync(output));
        Assert.Equal("", output.Text);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_second_result_is_not_the_next_runs()
    {
        await GreetAsync();
        await _guest.SayFrameAsync(FakeGuest.Result());
        await _guest.SayFrameAsync(FakeGuest.Result());
        await _session.ExecuteAsync(new ExecutionRequest { Source = "" }, new CapturedText(), Cancellation);
        Assert.Equal("The guest broke its protocol: a `result` for request 1 while 2 runs.", await RunFailsAsync());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_second_result_keeps_a_guest_from_being_handed_over()
    {
        await GreetAsync();
        await _guest.SayAsync((byte[])[.. FakeGuest.Frame(FakeGuest.Result()), .. FakeGuest.Frame(FakeGuest.Result())]);
        await _session.ExecuteAsync(new ExecutionRequest { Source = "" }, new CapturedText(), Cancellation);
        Assert.Throws<DhException>(() => _session.HandOver());
    }

    [Fact(Timeout = 20_000)]
    public async Task A_guest_that_stops_in_the_middle_of_a_frame_is_ended_by_the_timeout()
    {
        await GreetAsync();
        await _guest.SayAsync(FakeGuest.Frame("""{"type": "stdout", "id": 1}""", new byte[1000]).AsMemory(0, 500));
        var request = new ExecutionRequest { Source = "", Timeout = TimeSpan.FromMilliseconds(100) };
        var result = await _session.ExecuteAsync(request, new CapturedText(), Cancellation);
        Assert.Equal((ExecutionOutcome.Timeout, 137), (result.Outcome, result.ExitCode));
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.ExecuteAsync(request, new CapturedText(), Cancellation));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_thousand_frames_of_the_greatest_length_pass_through_bounded_memory()
    {
        const int Frames = 1000;
        const long MaxAllocated = 32 << 20;
        await GreetAsync();
        byte[] frame = FakeGuest.Frame("""{"type": "stdout", "id": 1}""" + new string(' ', (1 << 20) - 27), new byte[1 << 20]);
        long before = GC.GetTotalAllocatedBytes(precise: true);
        var said = Task.Run(async () =>
        {
            for (int i = 0; i < Frames; i++)
            {
                await _guest.SayAsync(frame);
            }

            await _guest.SayFrameAsync(FakeGuest.Result());
        }, Cancellation);
        var output = new CountingSink();
        await _session.ExecuteAsync(new ExecutionRequest { Source = "" }, output, Cancellation);
        await said;
        Assert.Equal((long)Frames << 20, output.Bytes);
        Assert.InRange(GC.GetTotalAllocatedBytes(precise: true) - before, 1, MaxAllocated);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Credit_that_the_input_does_not_keep_up_with_is_refused()
    {
        await GreetAsync();
        for (int i = 0; i < 100; i++)
        {
            await _guest.SayFrameAsync("""{"type": "stdin-credit", "id": 1, "bytes": 1}""");
        }

        using var input = new SilentStream();
        Assert.Equal("The guest broke its protocol: an unexpected `stdin-credit`.", await RunFailsAsync(input: input));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task The_input_is_read_once_for_each_credit_and_no_further()
    {
        await GreetAsync();
        using var input = new MemoryStream("abcdef"u8.ToArray());
        var running = _session.ExecuteAsync(new ExecutionRequest { Source = "", Input = input }, new CapturedText(), Cancellation);
        Assert.Equal("exec", (await _guest.HearFrameAsync()).Type);
        await _guest.SayFrameAsync("""{"type": "stdin-credit", "id": 1, "bytes": 4}""");
        Assert.Equal("abcd", Encoding.UTF8.GetString((await _guest.HearFrameAsync()).Body));
        await _guest.SayFrameAsync(FakeGuest.Result());
        await running;
        Assert.Equal(4, input.Position);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Input_that_cannot_be_read_ends_the_run_that_waits_for_it()
    {
        await GreetAsync();
        var input = new MemoryStream();
        await input.DisposeAsync();
        await _guest.SayFrameAsync("""{"type": "stdin-credit", "id": 1, "bytes": 4}""");
        var request = new ExecutionRequest { Source = "", Input = input };
        var failure = await Assert.ThrowsAsync<DhException>(() => _session.ExecuteAsync(request, new CapturedText(), Cancellation));
        Assert.Equal((DhErrorReason.Host, "The code's standard input cannot be read: Cannot access a closed Stream. Give it another one, or /dev/null."), (failure.Reason, failure.Message));
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.ExecuteAsync(request, new CapturedText(), Cancellation));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task An_end_in_the_middle_of_output_is_an_end()
    {
        await GreetAsync();
        await _guest.SayAsync(FakeGuest.Frame("""{"type": "stdout", "id": 1}""", new byte[1000]).AsMemory(0, 500));
        _guest.HangUp();
        Assert.StartsWith("The guest channel ", await RunFailsAsync(), StringComparison.Ordinal);
    }

    [Fact(Timeout = 20_000)]
    public async Task Code_that_the_guest_does_not_take_is_ended_by_the_timeout()
    {
        await GreetAsync();
        var request = new ExecutionRequest { Source = new string('#', ExecutionRequest.MaxSourceBytes), Timeout = TimeSpan.FromMilliseconds(100) };
        Assert.Equal(ExecutionOutcome.Timeout, (await _session.ExecuteAsync(request, new CapturedText(), Cancellation)).Outcome);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_guest_that_has_taken_the_hello_late_is_told_the_time_again_until_it_is_right()
    {
        var greeted = _session.GreetAsync(AnswerLimit, Cancellation);
        await _guest.HearFrameAsync();
        await _guest.SayFrameAsync(Clock("hello", TimeSpan.FromSeconds(-1)));
        Assert.Equal("clock", (await _guest.HearFrameAsync()).Type);
        await _guest.SayFrameAsync(Clock("clock", TimeSpan.FromSeconds(-0.5)));
        Assert.Equal("clock", (await _guest.HearFrameAsync()).Type);
        await _guest.SayFrameAsync(Clock("clock", TimeSpan.FromSeconds(1)));
        await greeted;
        Assert.Equal(0, _session.HandOver());
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_guest_whose_clock_stays_behind_is_told_sixteen_times()
    {
        await GreetAsync();
        var corrected = _session.CorrectClockAsync(AnswerLimit, Cancellation);
        for (int i = 0; i < 16; i++)
        {
            Assert.Equal("clock", (await _guest.HearFrameAsync()).Type);
            await _guest.SayFrameAsync(Clock("clock", TimeSpan.FromDays(-1)));
        }

        await corrected;
        Assert.Equal(0, _session.HandOver());
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("{\"type\": \"clock\"}", "its `clock` has no wall_clock_ns")]
    [InlineData("{\"type\": \"hello\", \"protocol\": 2}", "`hello` instead of `clock`")]
    public async Task A_wrong_answer_to_the_time_breaks_the_session(string answer, string what)
    {
        await GreetAsync();
        await _guest.SayFrameAsync(answer);
        var failure = await Assert.ThrowsAsync<DhException>(() => _session.CorrectClockAsync(AnswerLimit, Cancellation));
        Assert.Equal($"The guest broke its protocol: {what}.", failure.Message);
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.CorrectClockAsync(AnswerLimit, Cancellation));
    }

    public void Dispose()
    {
        _session.Dispose();
        _guest.Dispose();
        _descriptors.ForEach(descriptor => descriptor.Dispose());
    }

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    private static string Clock(string type, TimeSpan ahead) =>
        $$"""{"type": "{{type}}", "protocol": 2, "wall_clock_ns": {{(DateTimeOffset.UtcNow + ahead - DateTimeOffset.UnixEpoch).Ticks * 100}}}""";

    /// <summary>A channel as a pool hands it out: a descriptor of its own, which stays open as long as a thread that was left behind still uses it.</summary>
    private DescriptorTransport Waiting()
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.SequencedPacket);
        using (ours)
        using (theirs)
        using (var near = new SafeFileHandle(_guest.Near.Handle, ownsHandle: false))
        {
            FdPassing.Send(ours, [0], near);
            Assert.Equal(1, FdPassing.Receive(theirs, new byte[1], _descriptors));
            return new DescriptorTransport(_descriptors[^1]);
        }
    }

    private async Task GreetAsync()
    {
        var greeted = _session.GreetAsync(AnswerLimit, Cancellation);
        var (type, entropy) = await _guest.HearFrameAsync();
        Assert.Equal(("hello", 256), (type, entropy.Length));
        await _guest.SayFrameAsync(FakeGuest.Hello);
        await greeted;
    }

    private async Task<string> GreetingFailsAsync()
    {
        var failure = await Assert.ThrowsAsync<DhException>(() => _session.GreetAsync(AnswerLimit, Cancellation));
        Assert.Equal(DhErrorReason.Guest, failure.Reason);
        // Broken for good.
        await Assert.ThrowsAsync<InvalidOperationException>(() => _session.GreetAsync(AnswerLimit, Cancellation));
        return failure.Message;
    }

    private async Task<string> RunFailsAsync(IOutputSink? output = null, Stream? input = null)
    {
        var request = new ExecutionRequest { Source = "", Input = input };
        var failure = await Assert.ThrowsAsync<DhException>(() => _session.ExecuteAsync(request, output ?? new CapturedText(), Cancellation));
        Assert.Equal(DhErrorReason.Guest, failure.Reason);
        return failure.Message;
    }

    /// <summary>Output that is counted and dropped.</summary>
    private sealed class CountingSink : IOutputSink
    {
        public long Bytes { get; private set; }

        public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
        {
            Bytes += bytes.Length;
            return ValueTask.CompletedTask;
        }
    }

    /// <summary>Input that never comes.</summary>
    private sealed class SilentStream : MemoryStream
    {
        public override async ValueTask<int> ReadAsync(Memory<byte> buffer, CancellationToken cancellationToken = default)
        {
            await Task.Delay(Timeout.InfiniteTimeSpan, cancellationToken);
            return 0;
        }
    }
}
