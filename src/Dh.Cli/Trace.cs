using System.Diagnostics;
using System.Globalization;
using System.Text;
using Dh.Guest;

namespace Dh.Cli;

/// <summary>
/// When a run passed its stages (<c>DH_TRACE=1</c>), in nanoseconds of CLOCK_MONOTONIC: whoever starts this program can compare them with
/// its own clock, and so see what this program itself costs. Kept until the end, so that telling them delays no stage.
/// </summary>
internal sealed class Trace
{
    private readonly List<(string Name, long Timestamp)> _marks = [];

    private Trace(long entered) => Mark("main", entered);

    /// <summary>A trace, when the user asks for one.</summary>
    /// <param name="entered">When the program was entered, in <see cref="Stopwatch"/> ticks.</param>
    public static Trace? Of(long entered) => Environment.GetEnvironmentVariable("DH_TRACE") == "1" ? new Trace(entered) : null;

    /// <summary>A stage is passed now.</summary>
    public void Mark(string name) => Mark(name, Stopwatch.GetTimestamp());

    /// <summary>A stage was passed.</summary>
    public void Mark(string name, long timestamp) => _marks.Add((name, timestamp));

    /// <summary>Tells all of it, a line for each stage, in one write.</summary>
    public void WriteTo(StandardStreams streams)
    {
        var text = new StringBuilder();
        foreach (var (name, timestamp) in _marks)
        {
            // Stopwatch is CLOCK_MONOTONIC here, and its frequency a divisor of 10^9.
            text.Append(CultureInfo.InvariantCulture, $"trace: {name} {timestamp * (1_000_000_000 / Stopwatch.Frequency)}\n");
        }

        try
        {
            streams.Write(OutputStream.Error, Encoding.UTF8.GetBytes(text.ToString()));
        }
        catch (IOException)
        {
            // Nobody reads it.
        }
    }
}
