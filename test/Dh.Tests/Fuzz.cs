using System.Globalization;
using System.Text;

namespace Dh.Tests;

/// <summary>Hostile inputs: FUZZ_COUNT sets their number, FUZZ_SEED where they begin.</summary>
#pragma warning disable CA5394 // The same input for the same seed.
internal static class Fuzz
{
    private const int DefaultCount = 20_000;

    private static readonly string[] Words = ["[", "]", "{", "}", ",", ":", "\"", "\\", "\\u", "\\ud800", "-", "1e9", "1e999", "0", "18446744073709551616", "true", "null", "//", "/*", "size", "type", "\n", "\0", "\u00ff"];

    private static readonly long[] Numbers = [0, 1, -1, 2, 4095, 4096, -4096, 1 << 20, (1 << 20) + 1, int.MaxValue, int.MinValue, uint.MaxValue, long.MaxValue, long.MinValue];

    /// <summary>How many inputs are asked for, and the first one's seed, which the test tells.</summary>
    public static (int Count, int Seed) Ask()
    {
        int count = FromEnvironment("FUZZ_COUNT", DefaultCount), seed = FromEnvironment("FUZZ_SEED", Random.Shared.Next());
        TestContext.Current.TestOutputHelper?.WriteLine($"FUZZ_SEED={seed} FUZZ_COUNT={count}");
        return (count, seed);
    }

    /// <summary>Bytes that mean nothing.</summary>
    public static byte[] Noise(Random random)
    {
        byte[] bytes = new byte[random.Next(300)];
        random.NextBytes(bytes);
        return bytes;
    }

    /// <summary>Text with up to five parts cut out, doubled, replaced, cut off, or a bit flipped.</summary>
    public static byte[] Mutate(Random random, byte[] bytes)
    {
        for (int rounds = random.Next(6); rounds > 0; rounds--)
        {
            int at = random.Next(bytes.Length + 1), end = at + random.Next(Math.Min(40, bytes.Length - at) + 1);
            bytes = random.Next(6) switch
            {
                0 => [.. bytes[..at], .. bytes[end..]],
                1 => [.. bytes[..end], .. bytes[at..]],
                2 => [.. bytes[..at], .. Encoding.UTF8.GetBytes(Words[random.Next(Words.Length)]), .. bytes[end..]],
                3 => [.. bytes[..at], .. Encoding.UTF8.GetBytes(Numbers[random.Next(Numbers.Length)].ToString(CultureInfo.InvariantCulture)), .. bytes[end..]],
                4 => bytes[..at],
                _ => Flip(bytes, at, 1 << random.Next(8)),
            };
        }

        return bytes;
    }

    /// <summary>Flips bits of one byte, where there is one.</summary>
    public static byte[] Flip(byte[] bytes, int at, int mask)
    {
        if (at < bytes.Length)
        {
            bytes[at] ^= (byte)mask;
        }

        return bytes;
    }

    private static int FromEnvironment(string name, int otherwise) =>
        Environment.GetEnvironmentVariable(name) is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : otherwise;
}
#pragma warning restore CA5394
