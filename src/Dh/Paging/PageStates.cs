using System.Numerics;

namespace Dh.Paging;

/// <summary>
/// What is known of each page of a region: <em>present</em>, it was placed; <em>zero</em>, it reads as zeros (a hole of the memory file, or
/// given back by the guest), placed or not. A page that is neither is <em>missing</em>: its contents are still to come from the memory file.
/// Marking present may happen on several threads at once; marking zero excludes everybody else.
/// </summary>
/// <param name="pages">How many pages there are.</param>
internal sealed class PageStates(long pages)
{
    private readonly ulong[] _present = new ulong[(pages + 63) / 64];
    private readonly ulong[] _zero = new ulong[(pages + 63) / 64];

    /// <summary>How many pages there are.</summary>
    public long Pages => pages;

    /// <summary>Whether a page was placed.</summary>
    public bool IsPresent(long page) => Bit(_present, page);

    /// <summary>Whether a page reads as zeros.</summary>
    public bool IsZero(long page) => Bit(_zero, page);

    /// <summary>How many pages read as zeros.</summary>
    public long CountZero() => _zero.Sum(word => (long)BitOperations.PopCount(word));

    /// <summary>Notes pages that were placed: after they were, never before.</summary>
    public void MarkPresent(long first, long count)
    {
        for (long page = first, end = first + count; page < end;)
        {
            ulong mask = Mask(page, end, out long next);
            if (mask == ulong.MaxValue)
            {
                Volatile.Write(ref _present[page / 64], mask);
            }
            else
            {
                Interlocked.Or(ref _present[page / 64], mask);
            }

            page = next;
        }
    }

    /// <summary>The pages of a region of which none is in place yet.</summary>
    /// <param name="region">The region.</param>
    /// <param name="source">Its contents. Holes of it may be placed, too: what a guest takes for something new comes as zeros before it asks.</param>
    public static PageStates Of(GuestRegion region, IMemorySource source)
    {
        var pages = new PageStates((long)(region.Size / region.PageSize));
        pages.MarkZero(0, pages.Pages);
        foreach (var extent in source.DataExtents.Concat(source.PrefetchExtents))
        {
            ulong from = Math.Max((ulong)extent.Offset, region.Offset), to = Math.Min((ulong)extent.End, region.Offset + region.Size);
            if (from < to)
            {
                long first = (long)((from - region.Offset) / region.PageSize), behind = (long)((to - region.Offset + region.PageSize - 1) / region.PageSize);
                pages.MarkMissing(first, behind - first);
            }
        }

        return pages;
    }

    /// <summary>Notes pages that read as zeros from now on and are not there.</summary>
    public void MarkZero(long first, long count)
    {
        for (long page = first, end = first + count; page < end;)
        {
            ulong mask = Mask(page, end, out long next);
            _zero[page / 64] |= mask;
            _present[page / 64] &= ~mask;
            page = next;
        }
    }

    /// <summary>Notes pages whose contents are in the memory file.</summary>
    public void MarkMissing(long first, long count)
    {
        for (long page = first, end = first + count; page < end;)
        {
            _zero[page / 64] &= ~Mask(page, end, out long next);
            page = next;
        }
    }

    /// <summary>Finds the next run of missing pages.</summary>
    /// <param name="first">In: where to begin. Out: the run's first page.</param>
    /// <param name="end">Where to stop.</param>
    /// <returns>Its length; 0 when there is none.</returns>
    public long NextMissing(ref long first, long end) => NextRun(ref first, end, zero: false);

    /// <summary>Finds the next run of pages that read as zeros and were not placed.</summary>
    /// <param name="first">In: where to begin. Out: the run's first page.</param>
    /// <param name="end">Where to stop.</param>
    /// <returns>Its length; 0 when there is none.</returns>
    public long NextAbsentZero(ref long first, long end) => NextRun(ref first, end, zero: true);

    private static bool Bit(ulong[] words, long page) => (Volatile.Read(ref words[page / 64]) >> (int)(page % 64) & 1) != 0;

    /// <summary>The bits of one word that stand for pages from <paramref name="page"/> up to <paramref name="end"/>.</summary>
    private static ulong Mask(long page, long end, out long next)
    {
        next = Math.Min(end, (page / 64 * 64) + 64);
        ulong mask = ulong.MaxValue << (int)(page % 64);
        return next % 64 == 0 ? mask : mask & ((1UL << (int)(next % 64)) - 1);
    }

    private long NextRun(ref long first, long end, bool zero)
    {
        long behind;
        do
        {
            first = Next(first, end, zero, wanted: true);
            behind = Next(first, end, zero, wanted: false);
            // Both are the same before the end when another thread places the page that was found just then: the run that follows is still to be found.
        }
        while (behind == first && first < end);

        return behind - first;
    }

    /// <summary>The first page from <paramref name="page"/> on that is wanted, or is not.</summary>
    private long Next(long page, long end, bool zero, bool wanted)
    {
        while (page < end)
        {
            ulong present = Volatile.Read(ref _present[page / 64]), reads = Volatile.Read(ref _zero[page / 64]);
            ulong word = zero ? reads & ~present : ~(reads | present);
            word = (wanted ? word : ~word) >> (int)(page % 64);
            if (word != 0)
            {
                return Math.Min(end, page + BitOperations.TrailingZeroCount(word));
            }

            page = (page / 64 * 64) + 64;
        }

        return end;
    }
}
