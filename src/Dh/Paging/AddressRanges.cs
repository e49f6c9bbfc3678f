namespace Dh.Paging;

/// <summary>A set of addresses, kept as sorted ranges that neither overlap nor touch: a million removals of one page after the other are one range.</summary>
internal sealed class AddressRanges
{
    private readonly List<(ulong Start, ulong End)> _ranges = [];

    /// <summary>How many separate ranges there are.</summary>
    public int Count => _ranges.Count;

    /// <summary>Adds a range.</summary>
    /// <param name="start">Its start.</param>
    /// <param name="end">Its end, exclusive.</param>
    public void Add(ulong start, ulong end)
    {
        if (end <= start)
        {
            return;
        }

        int first = IndexOfEndAtLeast(start);
        int last = first;
        for (; last < _ranges.Count && _ranges[last].Start <= end; last++)
        {
            start = Math.Min(start, _ranges[last].Start);
            end = Math.Max(end, _ranges[last].End);
        }

        _ranges.RemoveRange(first, last - first);
        _ranges.Insert(first, (start, end));
    }

    /// <summary>Whether an address is in the set.</summary>
    public bool Contains(ulong address)
    {
        ulong length = 1;
        return Covers(address, ref length);
    }

    /// <summary>Whether an address is in the set, and how far the answer holds.</summary>
    /// <param name="address">The address.</param>
    /// <param name="length">In: bytes of interest. Out: at most as many, all of which have the same answer.</param>
    public bool Covers(ulong address, ref ulong length)
    {
        int index = IndexOfEndAtLeast(address + 1);
        if (index == _ranges.Count)
        {
            return false;
        }

        var (start, end) = _ranges[index];
        if (start <= address)
        {
            length = Math.Min(length, end - address);
            return true;
        }

        length = Math.Min(length, start - address);
        return false;
    }

    /// <summary>The first range that ends at or behind a bound.</summary>
    private int IndexOfEndAtLeast(ulong bound)
    {
        int low = 0, high = _ranges.Count;
        while (low < high)
        {
            int middle = (low + high) >>> 1;
            if (_ranges[middle].End < bound)
            {
                low = middle + 1;
            }
            else
            {
                high = middle;
            }
        }

        return low;
    }
}
