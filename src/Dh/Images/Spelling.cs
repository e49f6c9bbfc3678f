namespace Dh.Images;

/// <summary>Finds what somebody meant who mistyped a name.</summary>
internal static class Spelling
{
    /// <summary><c> (did you mean 'x'?)</c>, or nothing when no candidate is near.</summary>
    public static string DidYouMean(string word, IEnumerable<string> candidates)
    {
        var (nearest, distance) = candidates.Select(candidate => (candidate, Distance(word, candidate))).DefaultIfEmpty(("", int.MaxValue)).MinBy(pair => pair.Item2);
        return distance < word.Length && distance <= Math.Max(2, word.Length / 3) ? $" (did you mean '{nearest}'?)" : "";
    }

    /// <summary>Levenshtein's distance: insertions, deletions and replacements that make one word the other.</summary>
    internal static int Distance(string from, string to)
    {
        int[] row = [.. Enumerable.Range(0, to.Length + 1)];
        for (int i = 1; i <= from.Length; i++)
        {
            (int diagonal, row[0]) = (row[0], i);
            for (int j = 1; j <= to.Length; j++)
            {
                int replaced = diagonal + (from[i - 1] == to[j - 1] ? 0 : 1);
                (diagonal, row[j]) = (row[j], Math.Min(replaced, Math.Min(row[j], row[j - 1]) + 1));
            }
        }

        return row[to.Length];
    }
}
