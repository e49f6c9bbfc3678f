using System.Diagnostics;
using Dh.Linux;

namespace Dh.Paging;

/// <summary>
/// For how long the kernel has refused to place pages (EAGAIN), and what to do about it. It refuses while a thread of the VMM is inside
/// madvise, and goes on refusing after the event was read, until that thread has run on. So: read what waits, then try again at once.
/// Waiting for the next event would be waiting for the next refusal, for ever when a guest gives back one range after the other; only when
/// no event comes for a while is that thread not running, and sleeping right.
/// </summary>
internal struct Refusal
{
    /// <summary>How long a placement may be refused before the server gives up.</summary>
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(5);

    private static readonly TimeSpan Pause = TimeSpan.FromMilliseconds(1);

    /// <summary>Attempts at once after an event: the thread that it wakes runs on within some ten microseconds, and may soon be inside again.</summary>
    private const int MaxEagerRounds = 100;

    /// <summary>Attempts without an event before a refused placement sleeps; those that are not at once come with a yield.</summary>
    private const int MaxQuietRounds = 500;

    private long _since;
    private int _quietRounds;

    /// <summary>Lets the thread inside madvise run on; the caller tries again afterwards.</summary>
    /// <param name="sawEvents">Whether events were read since the last attempt.</param>
    /// <param name="uffd">Where events come from.</param>
    /// <exception cref="PageServerException">It has been refused for too long.</exception>
    public void Wait(bool sawEvents, Userfaultfd uffd)
    {
        _since = _since == 0 ? Stopwatch.GetTimestamp() : _since;
        if (Stopwatch.GetElapsedTime(_since) > Limit)
        {
            throw new PageServerException($"The kernel refused to place pages for {Limit.TotalSeconds:0} s (EAGAIN): the VMM's memory keeps changing.");
        }

        _quietRounds = sawEvents ? 0 : _quietRounds + 1;
        if (_quietRounds < MaxEagerRounds)
        {
            return;
        }

        if (_quietRounds < MaxQuietRounds)
        {
            _ = Thread.Yield();
        }
        else
        {
            _ = Poll.Wait(uffd.Handle, Pause);
        }
    }
}
