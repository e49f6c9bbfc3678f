namespace Dh;

/// <summary>Text of a guest or a VMM, for a message.</summary>
internal static class Untrusted
{
    private const int MaxLength = 200;

    /// <summary>One line of bounded length, in which nothing steers the terminal that shows it.</summary>
    /// <param name="text">What the peer said; null for nothing.</param>
    public static string OneLine(string? text)
    {
        string line = new([.. (text ?? "").Take(MaxLength).Select(c => char.IsControl(c) ? ' ' : c)]);
        return text?.Length > MaxLength ? $"{line}..." : line;
    }
}
