using System.Text;

namespace Dh.Vmm;

/// <summary>The end of a text that may be endless: a guest may flood its console, and only its last words matter.</summary>
internal sealed class TailBuffer
{
    private const int Capacity = 64 * 1024;
    private readonly byte[] _ring = new byte[Capacity];
    private readonly Lock _lock = new();
    private long _written;

    /// <summary>Appends; what is older than the last 64 KiB is forgotten.</summary>
    public void Append(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            foreach (byte b in bytes[Math.Max(0, bytes.Length - Capacity)..])
            {
                _ring[_written++ % Capacity] = b;
            }
        }
    }

    /// <summary>The last lines, without control characters.</summary>
    public string LastLines(int count)
    {
        byte[] text;
        lock (_lock)
        {
            int length = (int)Math.Min(_written, Capacity);
            text = new byte[length];
            for (int i = 0; i < length; i++)
            {
                text[i] = _ring[(_written - length + i) % Capacity];
            }
        }

        return LastLines(Encoding.UTF8.GetString(text), count);
    }

    /// <summary>
    /// The last lines of a text that is not trusted: nothing in it may steer the terminal that shows it. After a kernel's panic they end with
    /// its reason, which would be lost before its registers and stack.
    /// </summary>
    public static string LastLines(string text, int count)
    {
        string[] lines = [.. text
            .Split('\n')
            .Select(line => new string([.. line.Where(c => !char.IsControl(c) || c == '\t')]).TrimEnd())
            .Where(line => line.Length > 0)];
        int panic = Array.FindLastIndex(lines, line => line.Contains("Kernel panic - not syncing", StringComparison.Ordinal));
        return string.Join('\n', lines.Take(panic >= 0 ? panic + 1 : lines.Length).TakeLast(count));
    }
}
