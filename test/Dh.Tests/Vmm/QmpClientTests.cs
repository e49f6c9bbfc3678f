using System.Text;
using Dh.TestSupport;
using Dh.Vmm.Qemu;

namespace Dh.Tests.Vmm;

/// <summary>The monitor's client against a QEMU that says what no QEMU should: it fails with one clear error, and soon.</summary>
[Collection(AloneCollection.Name)]
public sealed class QmpClientTests : IDisposable
{
    private const int TestLimitMs = 10_000;
    private static readonly TimeSpan AnswerLimit = TimeSpan.FromMilliseconds(300);

    private readonly FakeQmp _qemu = new();
    private readonly QmpClient _client;

    public QmpClientTests() => _client = new QmpClient(_qemu.Near, AnswerLimit, () => " Its last words:\nqemu: bye");

    [Fact(Timeout = TestLimitMs)]
    public async Task It_connects_and_commands_are_answered()
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        Assert.Equal("cont", await _qemu.HearCommandAsync());
        await _qemu.SayLineAsync(FakeQmp.Done);
        await resumed;
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Without_a_greeting_the_time_limit_ends_the_wait()
    {
        Assert.StartsWith("QEMU did not answer `greeting` within", await FailsAsync(_client.ConnectAsync(Cancellation)), StringComparison.Ordinal);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("")]
    [InlineData("no JSON")]
    [InlineData("[]")]
    [InlineData("{\"QMP\": ")]
    [InlineData("{\"event\": 5}")]
    [InlineData("\u0001\u00ff")]
    public async Task Garbage_instead_of_a_greeting_is_named_as_such(string line)
    {
        await _qemu.SayLineAsync(line);
        Assert.Equal(
            "QEMU broke its monitor's protocol before it had answered `greeting`: a line that is no JSON object of the expected shape. Its last words:\nqemu: bye",
            await FailsAsync(_client.ConnectAsync(Cancellation)));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task An_answer_instead_of_a_greeting_is_no_greeting()
    {
        await _qemu.SayLineAsync(FakeQmp.Done);
        Assert.Equal("QEMU's first words on its monitor are no QMP greeting.", await FailsAsync(_client.ConnectAsync(Cancellation)));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_refusal_gives_QEMUs_reason_in_one_line()
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.AnswerAsync("""{"error": {"class": "GenericError", "desc": "no\u001b[2J\nway"}}""");
        Assert.Equal("QEMU refused `cont`: no [2J way (GenericError). Its last words:\nqemu: bye", await FailsAsync(resumed));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_refusal_without_a_reason_is_a_refusal()
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.AnswerAsync("""{"error": {}}""");
        Assert.StartsWith("QEMU refused `cont`", await FailsAsync(resumed), StringComparison.Ordinal);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Events_between_a_command_and_its_answer_are_not_the_answer()
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.HearCommandAsync();
        await _qemu.SayLineAsync("""{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}""");
        await _qemu.SayLineAsync("""{"event": "GUEST_PANICKED", "data": {"action": "pause"}}""");
        await _qemu.SayLineAsync("""{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}""");
        await _qemu.SayLineAsync("""{"error": {"class": "C", "desc": "the answer"}}""");
        Assert.StartsWith("QEMU refused `cont`: the answer (C).", await FailsAsync(resumed), StringComparison.Ordinal);
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("""{"return": {}, "id": 7}""")]
    [InlineData("""{}""")]
    [InlineData("""{"timestamp": {}}""")]
    [InlineData("null")]
    public async Task An_answer_to_no_command_of_ours_is_no_success(string line)
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.AnswerAsync(line);
        Assert.StartsWith(
            "QEMU broke its monitor's protocol before it had answered `cont`: a line that is no greeting, event, or answer to a command of ours.",
            await FailsAsync(resumed),
            StringComparison.Ordinal);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task An_end_in_the_middle_of_an_answer_is_an_end()
    {
        await ConnectAsync();
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.HearCommandAsync();
        await _qemu.SayAsync("""{"return": {""");
        _qemu.HangUp();
        Assert.Equal("QEMU ended before it had answered `cont`. Its last words:\nqemu: bye", await FailsAsync(resumed));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task After_an_end_every_command_says_so()
    {
        await ConnectAsync();
        _qemu.HangUp();
        Assert.StartsWith("QEMU ended before it had answered `cont`.", await FailsAsync(_client.ExecuteAsync("cont", Cancellation)), StringComparison.Ordinal);
        Assert.StartsWith("QEMU ended before it had answered `stop`.", await FailsAsync(_client.ExecuteAsync("stop", Cancellation)), StringComparison.Ordinal);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task An_endless_line_is_cut_off_in_bounded_memory()
    {
        byte[] piece = Encoding.ASCII.GetBytes(new string('x', 64 << 10));
        long before = GC.GetTotalAllocatedBytes(precise: true);
        var connected = _client.ConnectAsync(Cancellation);
        // Far more than the limit; what is not read any more stays in the socket, and this wait for room with it.
        var flood = Task.Run(async () =>
        {
            for (int i = 0; i < 1024; i++)
            {
                await _qemu.SayAsync(piece);
            }
        }, Cancellation);
        Assert.StartsWith("QEMU broke its monitor's protocol before it had answered `greeting`: a line of more than 1048576 bytes.", await FailsAsync(connected), StringComparison.Ordinal);
        Assert.False(flood.IsCompleted, "64 MiB were read");
        Assert.InRange(GC.GetTotalAllocatedBytes(precise: true) - before, 0, 8 << 20);
        _qemu.HangUp();
    }

    [Theory(Timeout = TestLimitMs)]
    [InlineData("""{"return": {}}""")]
    [InlineData("""{"event": "MIGRATION", "data": {"status": "active"}}""")]
    public async Task A_flood_of_lines_that_nobody_asked_for_is_refused(string line)
    {
        await ConnectAsync();
        await _qemu.SayAsync(string.Concat(Enumerable.Repeat(line + "\n", 1000)));
        await Task.Delay(50, Cancellation);
        var failure = line.Contains("return", StringComparison.Ordinal) ? FailUntilClosedAsync() : FailsAsync(_client.ExecuteAsync("cont", Cancellation));
        Assert.Contains("more than 64 lines that nobody has asked for.", await failure, StringComparison.Ordinal);
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task Any_number_of_events_that_nobody_waits_for_is_dropped()
    {
        await ConnectAsync();
        await _qemu.SayAsync(string.Concat(Enumerable.Repeat("{\"event\": \"RTC_CHANGE\"}\n", 1000)));
        var resumed = _client.ExecuteAsync("cont", Cancellation);
        await _qemu.AnswerAsync(FakeQmp.Done);
        await resumed;
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_migration_waits_for_its_own_event()
    {
        await ConnectAsync();
        var restored = _client.MigrateIncomingAsync(10, Cancellation);
        await _qemu.AnswerAsync(FakeQmp.Done);
        await _qemu.SayLineAsync("""{"event": "MIGRATION", "data": {"status": "setup"}}""");
        await _qemu.SayLineAsync("""{"event": "STOP"}""");
        await Task.Delay(20, Cancellation);
        Assert.False(restored.IsCompleted);
        await _qemu.SayLineAsync("""{"event": "MIGRATION", "data": {"status": "completed"}}""");
        await restored;
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_failed_migration_is_a_failure()
    {
        await ConnectAsync();
        var restored = _client.MigrateIncomingAsync(10, Cancellation);
        await _qemu.AnswerAsync(FakeQmp.Done);
        await _qemu.SayLineAsync("""{"event": "MIGRATION", "data": {"status": "failed"}}""");
        Assert.Equal("QEMU's `migrate-incoming` of the device state failed. Its last words:\nqemu: bye", await FailsAsync(restored));
    }

    [Fact(Timeout = TestLimitMs)]
    public async Task A_migration_that_never_ends_is_given_up()
    {
        await ConnectAsync();
        var restored = _client.MigrateIncomingAsync(10, Cancellation);
        await _qemu.AnswerAsync(FakeQmp.Done);
        Assert.StartsWith("QEMU did not answer `migrate-incoming` within", await FailsAsync(restored), StringComparison.Ordinal);
    }

    public void Dispose()
    {
        _client.Dispose();
        _qemu.Dispose();
    }

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    private static async Task<string> FailsAsync(Task task)
    {
        var failure = await Assert.ThrowsAsync<DhException>(() => task);
        Assert.Equal(DhErrorReason.Vmm, failure.Reason);
        return failure.Message;
    }

    private async Task ConnectAsync()
    {
        await _qemu.SayLineAsync(FakeQmp.Greeting);
        var connected = _client.ConnectAsync(Cancellation);
        await _qemu.AnswerAsync(FakeQmp.Done);
        await connected;
    }

    /// <summary>The answers that were there before the flood was noticed are taken first.</summary>
    private async Task<string> FailUntilClosedAsync()
    {
        for (int i = 0; i < 64; i++)
        {
            await _client.ExecuteAsync("cont", Cancellation);
        }

        return await FailsAsync(_client.ExecuteAsync("cont", Cancellation));
    }
}
