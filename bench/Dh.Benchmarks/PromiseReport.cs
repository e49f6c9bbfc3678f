using System.Globalization;
using System.Text;

namespace Dh.Benchmarks;

/// <summary>A table of measured values, and whether all promises in it were held.</summary>
internal sealed class PromiseReport
{
    private readonly StringBuilder _text;

    /// <summary>Begins a report.</summary>
    /// <param name="title">Its heading.</param>
    /// <param name="how">How its values were measured.</param>
    public PromiseReport(string title, FormattableString how) => _text = new StringBuilder()
        .AppendLine(CultureInfo.InvariantCulture, $"# {title}").AppendLine()
        .AppendLine(FormattableString.Invariant(how))
        .AppendLine(CultureInfo.InvariantCulture, $"Load average when it began: {File.ReadAllText("/proc/loadavg").Split(' ')[0]}; other work on the machine lengthens all of it, as `/bin/true` shows.")
        .AppendLine()
        .AppendLine("| what | measured | promise | |")
        .AppendLine("| --- | --- | --- | --- |");

    public bool Passed { get; private set; } = true;

    public void Row(string what, FormattableString measured) => Row(what, measured, $"-", null);

    public void Row(string what, FormattableString measured, FormattableString promise, bool? held)
    {
        Passed &= held != false;
        _text.AppendLine(CultureInfo.InvariantCulture, $"| {what} | {FormattableString.Invariant(measured)} | {FormattableString.Invariant(promise)} | {held switch { null => "", true => "PASS", false => "FAIL" }} |");
    }

    public override string ToString() => _text.ToString();
}
