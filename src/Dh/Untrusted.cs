namespace Dh;

/// <summary>Text of a guest or a VMM, for a message.</summary>
internal static class Untrusted
{
    private const int MaxLength = 200;

    /// <summary>One line of bounded length, in which nothing steers the terminal that shows it.</summary>
    /// <param name="text">What the peer said; null for nothing.</param>
    /// <param name="maxLength">What is shown of it, in characters.</param>
    public static string OneLine(string? text, int maxLength = MaxLength)
    {
        string line = new([.. (text ?? "").Take(maxLength).Select(c => char.IsControl(c) ? ' ' : c)]);
        return text?.Length > maxLength ? $"{line}..." : line;
    }
}
