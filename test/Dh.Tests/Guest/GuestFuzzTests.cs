using System.Text;
using Dh.Guest;
using Dh.Preparation;
using Dh.TestSupport;

namespace Dh.Tests.Guest;

/// <summary>
/// Whatever a guest says, the host reads it or refuses it with a <see cref="DhException"/>, and stores no more than a frame. `make fuzz` says
/// ten million frames (some batches end early, so more are meant); a batch of seed s is batch 0 of the seed that a failure tells.
/// </summary>
#pragma warning disable CA5394 // The same input for the same seed.
public sealed class GuestFuzzTests
{
    private const int FramesPerInput = 16, FramesPerBatch = 100;

    /// <summary>A batch stays in the socket until it is read: far below the kernel's buffer.</summary>
    private const int MaxBatchBytes = 100_000;

    /// <summary>What a batch may allocate: far above what is needed, far below what forged lengths ask for.</summary>
    private const long MaxAllocated = 8 << 20;

    private static readonly TimeSpan AnswerLimit = TimeSpan.FromSeconds(5);

    private static readonly string[] Headers =
    [
        FakeGuest.Ready, FakeGuest.Hello, FakeGuest.Result(),
        """{"type": "stdout", "id": 1}""",
        """{"type": "stdin-credit", "id": 1, "bytes": 100}""",
        """{"type": "error", "id": 1, "message": "no"}""",
        """{"type": "result", "id": 1, "outcome": "signaled", "exit_code": 137, "signal": 9, "out_of_memory": true, "run_ms": 2e-3}""",
        """{"type": "result", "id": 1, "outcome": "exited", "exit_code": 1, "result_repr": "\u00e9", "error": {"type": "E", "message": "m", "traceback": "t"}, "tables": [{"name": "t", "row_count": 3, "is_refreshing": false, "columns": [{"name": "x", "type": "long"}], "preview": "x", "error": null}]}""",
    ];

    [Fact(Timeout = 600_000)]
    public async Task A_frame_is_read_or_refused_whatever_it_is()
    {
        var (count, seed) = Fuzz.Ask();
        long read = 0, refused = 0;
        for (int batch = 0; batch < Math.Max(1, (long)count * FramesPerInput / FramesPerBatch); batch++)
        {
            int at = unchecked(seed + batch);
            long before = GC.GetTotalAllocatedBytes();
            try
            {
                var (batchRead, batchRefused) = await ReadBatchAsync(new Random(at));
                (read, refused) = (read + batchRead, refused + batchRefused);
            }
            catch (Exception e)
            {
                Assert.Fail($"FUZZ_SEED={at} FUZZ_COUNT=1: {e}");
            }

            // Other tests allocate too: only a single batch is held to it.
            Assert.True(count > 1 || GC.GetTotalAllocatedBytes() - before <= MaxAllocated, $"FUZZ_SEED={at} FUZZ_COUNT=1 allocates too much.");
        }

        TestContext.Current.TestOutputHelper?.WriteLine($"{read} frames read, {refused} refused");
        Assert.True(count < 1000 || (read > 0 && refused > 0 && read + refused >= 10L * count));
    }

    [Fact(Timeout = 600_000)]
    public async Task A_conversation_ends_with_a_result_or_a_refusal_whatever_the_guest_says()
    {
        var (count, seed) = Fuzz.Ask();
        int finished = 0, conversations = Math.Max(1, count / 10);
        for (int i = 0; i < conversations; i++)
        {
            int at = unchecked(seed + i);
            try
            {
                finished += await ConverseAsync(Conversation(new Random(at))) ? 1 : 0;
            }
            catch (Exception e)
            {
                Assert.Fail($"FUZZ_SEED={at} FUZZ_COUNT=1: {e}");
            }
        }

        TestContext.Current.TestOutputHelper?.WriteLine($"{finished} of {conversations} conversations came to their end");
        Assert.True(count < 1000 || (finished > 0 && finished < conversations));
    }

    /// <summary>Says a batch of frames, of which only the last may have wrong lengths, so that each of the others is read for itself.</summary>
    private static async Task<(int Read, int Refused)> ReadBatchAsync(Random random)
    {
        using var guest = new FakeGuest();
        using var channel = new GuestChannel(new SocketTransport(guest.Near));
        var bytes = new List<byte>();
        var bodies = new List<byte[]>();
        bool ends = false;
        for (int i = 0; i < FramesPerBatch && bytes.Count < MaxBatchBytes && !ends; i++)
        {
            byte[] header = random.Next(16) == 0 ? Fuzz.Noise(random) : Encoding.UTF8.GetBytes(Headers[random.Next(Headers.Length)]);
            header = random.Next(2) == 0 ? Fuzz.Mutate(random, header) : header;
            byte[] body = random.Next(2) == 0 ? [] : Fuzz.Noise(random);
            ends = header.Length < 2 || (i == FramesPerBatch - 1 && random.Next(4) == 0);
            bodies.Add(body);
            byte[] prefix = FakeGuest.Prefix((uint)header.Length, (uint)body.Length);
            bytes.AddRange([.. ends && header.Length >= 2 ? Fuzz.Flip(prefix, random.Next(8), 1 << random.Next(8)) : prefix, .. header, .. body]);
        }

        await guest.SayAsync(bytes.ToArray());
        guest.FallSilent();
        int read = 0, refused = 0;
        foreach (byte[] sent in bodies)
        {
            try
            {
                var (header, body) = await channel.ReadAsync(TestContext.Current.CancellationToken);
                Assert.NotNull(header.Type);
                Assert.True(sent.AsSpan().SequenceEqual(body.Span) || (ends && read + refused == bodies.Count - 1), "a body is another one than was sent");
                read++;
            }
            catch (DhException e) when (e.Reason == DhErrorReason.Guest)
            {
                Assert.InRange(e.Message.Length, 1, 1000);
                refused++;
            }
        }

        return (read, refused);
    }

    /// <summary>A session in which the guest says these bytes, whatever it hears, and then no more.</summary>
    /// <returns>Whether the host took it for a run that has ended, twice.</returns>
    private static async Task<bool> ConverseAsync(byte[] bytes)
    {
        using var guest = new FakeGuest();
        using var session = new GuestSession(new SocketTransport(guest.Near));
        await guest.SayAsync(bytes);
        guest.FallSilent();
        try
        {
            await session.GreetAsync(AnswerLimit, TestContext.Current.CancellationToken);
            for (int run = 0; run < 2; run++)
            {
                var result = await session.ExecuteAsync(
                    new ExecutionRequest { Source = "1", Input = Stream.Null }, new CapturedText(), TestContext.Current.CancellationToken);
                Assert.InRange(result.ExitCode, 0, 255);
                Assert.True(double.IsFinite(result.GuestRunMilliseconds));
                Assert.All(result.Tables, table => Assert.All(table.Columns, column => Assert.NotNull(column.Name)));
            }

            return true;
        }
        catch (DhException e) when (e.Reason == DhErrorReason.Guest)
        {
            Assert.InRange(e.Message.Length, 1, 1000);
            return false;
        }
    }

    /// <summary>Two right runs, of which frames are left out, doubled, exchanged or changed, and bytes flipped or cut off.</summary>
    private static byte[] Conversation(Random random)
    {
        List<byte[]> frames = [FakeGuest.Frame(FakeGuest.Hello)];
        for (int id = 1; id <= 2; id++)
        {
            for (int outputs = random.Next(6); outputs > 0; outputs--)
            {
                frames.Add(random.Next(3) == 0
                    ? FakeGuest.Frame($$"""{"type": "stdin-credit", "id": {{id}}, "bytes": {{random.Next(1, 65537)}}}""")
                    : FakeGuest.Frame($$"""{"type": "{{(random.Next(2) == 0 ? "stdout" : "stderr")}}", "id": {{id}}}""", Fuzz.Noise(random)));
            }

            frames.Add(FakeGuest.Frame(FakeGuest.Result(id)));
        }

        for (int changes = random.Next(4); changes > 0; changes--)
        {
            int at = random.Next(frames.Count), other = random.Next(frames.Count);
            switch (random.Next(6))
            {
                case 0 when frames.Count > 1:
                    frames.RemoveAt(at);
                    break;
                case 1:
                    frames.Insert(other, frames[at]);
                    break;
                case 2:
                    (frames[at], frames[other]) = (frames[other], frames[at]);
                    break;
                case 3:
                    frames[at] = FakeGuest.Frame(Encoding.Latin1.GetString(Fuzz.Mutate(random, Encoding.UTF8.GetBytes(Headers[random.Next(Headers.Length)]))), Fuzz.Noise(random));
                    break;
                case 4:
                    frames[at] = Fuzz.Flip([.. frames[at]], random.Next(frames[at].Length), 1 << random.Next(8));
                    break;
                default:
                    frames[at] = frames[at][..random.Next(frames[at].Length)];
                    break;
            }
        }

        return [.. frames.SelectMany(frame => frame)];
    }
}
#pragma warning restore CA5394
