using System.Diagnostics;
using Dh.Linux;

namespace Dh.Tests.Linux;

public sealed class PollTests
{
    [Fact]
    public void A_wait_ends_with_its_time()
    {
        using var wake = new WakeEvent();
        long start = Stopwatch.GetTimestamp();

        Assert.False(Poll.Wait(wake.Handle, TimeSpan.FromMilliseconds(50)));
        Assert.InRange(Stopwatch.GetElapsedTime(start), TimeSpan.FromMilliseconds(50), TimeSpan.FromSeconds(10));
        Assert.False(Poll.Wait(wake.Handle, TimeSpan.Zero));
        Assert.False(Poll.Wait(wake.Handle, TimeSpan.FromMilliseconds(-5)));
    }

    [Fact(Timeout = 20_000)]
    public async Task A_set_event_ends_an_endless_wait_and_stays_set()
    {
        using var wake = new WakeEvent();
        var waiting = Task.Run(() => Poll.Wait(wake.Handle, Timeout.InfiniteTimeSpan), TestContext.Current.CancellationToken);
        wake.Set();
        wake.Set();

        Assert.True(await waiting);
        Assert.True(Poll.Wait(wake.Handle, TimeSpan.Zero));
    }

    [Fact]
    public void The_mask_names_what_is_ready()
    {
        using var first = new WakeEvent();
        using var second = new WakeEvent();
        using var third = new WakeEvent();
        second.Set();
        Assert.Equal(0b010, Poll.WaitAny(TimeSpan.FromSeconds(5), first.Handle, second.Handle, third.Handle));
        third.Set();
        Assert.Equal(0b110, Poll.WaitAny(TimeSpan.FromSeconds(5), first.Handle, second.Handle, third.Handle));
    }

    [Fact]
    public void End_of_file_counts_as_ready()
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.SequencedPacket);
        using (ours)
        {
            theirs.Dispose();
            Assert.True(Poll.Wait(ours, TimeSpan.FromSeconds(5)));
        }
    }

    [Fact]
    public void A_closed_descriptor_is_refused()
    {
        var wake = new WakeEvent();
        wake.Dispose();
        Assert.Throws<ObjectDisposedException>(() => Poll.Wait(wake.Handle, TimeSpan.Zero));
    }

    [Fact]
    public void Unknown_error_numbers_keep_their_number() => Assert.Equal("errno 4095", ((Errno)4095).Describe());

    [Fact]
    public void Error_numbers_have_the_kernels_names_and_words() => Assert.Equal("EAGAIN (Resource temporarily unavailable)", Errno.EAGAIN.Describe());
}
