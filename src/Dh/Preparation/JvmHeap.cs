using System.Globalization;

namespace Dh.Preparation;

/// <summary>
/// What a template's JVM may take for its heap, against what its machine has. A guest with less memory than that does not fail when it boots:
/// with 256 MiB for a heap of 1 GiB, a machine was seen to go on for five minutes, without an end or a word.
/// </summary>
internal static class JvmHeap
{
    // java(1): the second is what the first stands for; the last of them counts.
    private static readonly string[] Options = ["-Xmx", "-XX:MaxHeapSize="];

    /// <summary>Refuses a machine whose memory the heap alone would fill.</summary>
    /// <param name="jvmArguments">The JVM's arguments.</param>
    /// <param name="memoryMib">What the machine has, in MiB.</param>
    /// <exception cref="DhException">It is too little.</exception>
    public static void Require(IReadOnlyList<string> jvmArguments, int memoryMib)
    {
        if (jvmArguments.LastOrDefault(argument => Options.Any(option => argument.StartsWith(option, StringComparison.Ordinal))) is not { } limit)
        {
            return; // a quarter of the memory
        }

        if (Bytes(limit) is { } heap && heap >= (long)memoryMib << 20)
        {
            throw new DhException(
                DhErrorReason.Usage,
                $"The JVM's heap may take {heap >> 20} MiB ({limit}), and the machine would have {memoryMib} MiB for all: give it more (--memory {(heap >> 20) * 2}), or the JVM less (--jvm-args=-Xmx{Math.Max(1, memoryMib / 2)}m).");
        }
    }

    /// <summary>The size in an argument, in bytes; null when it is none: the JVM says so itself.</summary>
    private static long? Bytes(string argument)
    {
        string size = Options.Where(option => argument.StartsWith(option, StringComparison.Ordinal)).Select(option => argument[option.Length..]).First();
        int shift = size.Length == 0 ? 0 : char.ToLowerInvariant(size[^1]) switch { 'k' => 10, 'm' => 20, 'g' => 30, 't' => 40, _ => 0 };
        string digits = shift == 0 ? size : size[..^1];
        return long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out long number) && number <= long.MaxValue >> shift ? number << shift : null;
    }
}
