using System.CommandLine;
using System.CommandLine.Invocation;
using System.Text.Json;
using Dh.Linux;

namespace Dh.Cli;

/// <summary>What an error is to the user: one line on stderr, an exit code, a reason for programs.</summary>
internal static class Failure
{
    public static bool IsExpected(Exception error) =>
        error is DhException or LinuxException or IOException or UnauthorizedAccessException or PlatformNotSupportedException;

    public static ExitCode CodeOf(Exception error) => (error as DhException)?.Reason switch
    {
        DhErrorReason.Usage => ExitCode.Usage,
        DhErrorReason.NotFound => ExitCode.NotFound,
        _ => ExitCode.Failed,
    };

    /// <summary><c>not_found</c>, <c>page_server</c>, ...; what has no reason of its own is the host's.</summary>
    public static string ReasonOf(Exception error) =>
        JsonNamingPolicy.SnakeCaseLower.ConvertName(((error as DhException)?.Reason ?? DhErrorReason.Host).ToString());

    /// <summary>The message, and its cause where that fits on the line and is not told yet.</summary>
    public static string MessageOf(Exception error) =>
        error is DhException { InnerException.Message: var cause } && !error.Message.Contains(cause, StringComparison.Ordinal) && !error.Message.Contains('\n', StringComparison.Ordinal)
            ? $"{error.Message} ({cause})"
            : error.Message;

    public static ExitCode Report(Exception error)
    {
        Console.Error.WriteLine($"dh: {MessageOf(error)}");
        return CodeOf(error);
    }

    /// <summary>The parser's errors, with its suggestions, as any other error of this program.</summary>
    public static ExitCode ReportParseErrors(ParseResult parsed, ExecCommand exec)
    {
        using var text = new StringWriter();
        if (parsed.Action is ParseErrorAction action)
        {
            action.ShowHelp = false;
            parsed.Invoke(new InvocationConfiguration { Error = text, Output = text });
        }
        else
        {
            text.WriteLine(string.Join('\n', parsed.Errors.Select(error => error.Message)));
        }

        string line = string.Join(' ', text.ToString().Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries));
        var failure = new DhException(DhErrorReason.Usage, $"{line} See: {CommandName(parsed)} --help");
        if (exec.WantsJson(parsed))
        {
            ExecOutput.Of(failure, TimeSpan.Zero).WriteTo(Console.OpenStandardOutput());
            return ExitCode.Usage;
        }

        return Report(failure);
    }

    private static string CommandName(ParseResult parsed)
    {
        var names = new List<string>();
        for (var result = parsed.CommandResult; result is not null; result = result.Parent as System.CommandLine.Parsing.CommandResult)
        {
            names.Insert(0, result.Command is RootCommand ? "dh" : result.Command.Name);
        }

        return string.Join(' ', names);
    }
}
