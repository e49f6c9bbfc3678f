using System.Globalization;
using System.Security;
using System.Text;

namespace Dh.Benchmarks;

/// <summary>A pair of values with a name.</summary>
internal sealed record Bar(string Name, double First, double Second);

/// <summary>A chart of horizontal bars as SVG, which can be read on a light and on a dark page.</summary>
internal static class BarChart
{
    private const int LabelWidth = 340;
    private const int BarWidth = 380;
    private const int ValueWidth = 60;
    private const int RowHeight = 34;
    private const int BarHeight = 12;
    private const int Top = 64;

    private const string Style = """
        text { font: 13px sans-serif; fill: #1f2328 }
        .title { font-weight: bold }
        .value { font-size: 11px }
        .first { fill: #0969da }
        .second { fill: #9a6700 }
        @media (prefers-color-scheme: dark) {
          text { fill: #e6edf3 }
          .first { fill: #58a6ff }
          .second { fill: #d29922 }
        }
        """;

    /// <summary>Draws it.</summary>
    /// <param name="title">What the values are.</param>
    /// <param name="series">What the first and the second values are.</param>
    /// <param name="bars">The values, all positive.</param>
    public static string Draw(string title, (string First, string Second) series, IReadOnlyList<Bar> bars)
    {
        double scale = BarWidth / bars.Max(bar => Math.Max(bar.First, bar.Second));
        var svg = new StringBuilder();
        Line($"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LabelWidth + BarWidth + ValueWidth} {Top + (RowHeight * bars.Count)}" role="img">""");
        Line($"<title>{Escape(title)}</title>");
        Line($"<style>\n{Style}\n</style>");
        Line($"""<text class="title" x="8" y="20">{Escape(title)}</text>""");
        Key("first", 8, series.First);
        Key("second", 8 + (LabelWidth / 2), series.Second);
        for (int i = 0; i < bars.Count; i++)
        {
            int y = Top + (RowHeight * i);
            Line($"""<text x="{LabelWidth - 8}" y="{y + BarHeight + 4}" text-anchor="end">{Escape(bars[i].Name)}</text>""");
            Rectangle("first", y, bars[i].First);
            Rectangle("second", y + BarHeight + 1, bars[i].Second);
        }

        Line($"</svg>");
        return svg.ToString();

        void Line(FormattableString line) => svg.Append(line.ToString(CultureInfo.InvariantCulture)).Append('\n');

        void Key(string name, int x, string text)
        {
            Line($"""<rect class="{name}" x="{x}" y="34" width="{BarHeight}" height="{BarHeight}"/>""");
            Line($"""<text x="{x + BarHeight + 6}" y="45">{Escape(text)}</text>""");
        }

        void Rectangle(string name, int y, double value)
        {
            Line($"""<rect class="{name}" x="{LabelWidth}" y="{y}" width="{value * scale:0.0}" height="{BarHeight}"/>""");
            Line($"""<text class="value" x="{LabelWidth + (value * scale) + 4:0.0}" y="{y + BarHeight - 2}">{value:0.0}</text>""");
        }
    }

    private static string Escape(string text) => SecurityElement.Escape(text);
}
