using System.CommandLine;
using System.CommandLine.Invocation;
using System.Text.Json;
using Dh.Linux;

namespace Dh.Cli;

/// <summary>What an error is to the user: one line on stderr, an exit code, a reason for programs.</summary>
internal static class Failure
{
    // What the parser adds to every mistyped command.
    private const string MissingCommand = "Required command was not provided.";

    public static ExitCode CodeOf(Exception error) => (error as DhException)?.Reason switch
    {
        DhErrorReason.Usage => ExitCode.Usage,
        DhErrorReason.NotFound => ExitCode.NotFound,
        _ => ExitCode.Failed,
    };

    /// <summary><c>not_found</c>, <c>page_server</c>, ...; what has no reason of its own is the host's.</summary>
    public static string ReasonOf(Exception error) =>
        JsonNamingPolicy.SnakeCaseLower.ConvertName(((error as DhException)?.Reason ?? DhErrorReason.Host).ToString());

    /// <summary>The error; of a part of the runtime that could not be set up (its sockets, its signals), what that needs.</summary>
    public static Exception CauseOf(Exception error) => error is TypeInitializationException { InnerException: { } inner }
        ? inner is TypeInitializationException ? CauseOf(inner) : new DhException(
            DhErrorReason.Host, $"A part of the runtime could not be set up: {OneLine(inner.Message)} Look at the limits of descriptors, processes and memory (ulimit -a, the cgroup).", inner)
        // An exception that the runtime keeps to itself: epoll refused a socket.
        : error.GetType().FullName == "System.Net.InternalException" ? new DhException(
            DhErrorReason.Host, $"The runtime could not wait for a socket: {OneLine(error.Message)} Look at the limits of descriptors, watches and memory (ulimit -a, fs.epoll.max_user_watches, the cgroup).", error)
        : error;

    /// <summary>The message, and its cause where that fits on the line and is not told yet.</summary>
    public static string MessageOf(Exception error) =>
        error is DhException or UnauthorizedAccessException && error.InnerException?.Message is { } cause && !error.Message.Contains(cause, StringComparison.Ordinal) && !error.Message.Contains('\n', StringComparison.Ordinal)
            ? $"{error.Message} ({cause})"
            : error is OutOfMemoryException
                ? $"Memory, or a thread, was not to be had: {error.Message} Look at the limits of memory and processes (ulimit -a, the cgroup)."
                : error.Message;

    public static ExitCode Report(Exception error)
    {
        error = CauseOf(error);
        Console.Error.WriteLine(IsExpected(error) ? $"dh: {MessageOf(error)}" : $"dh: internal error: {error}");
        return CodeOf(error);
    }

    /// <summary>The parser's errors, with its suggestions, as any other error of this program.</summary>
    public static ExitCode ReportParseErrors(ParseResult parsed, ExecCommand exec)
    {
        string[] errors = [.. parsed.Errors.Select(error => OneLine(error.Message)).Where(message => parsed.Errors.Count == 1 || message != MissingCommand)];
        using var text = new StringWriter();
        if (parsed.Action is ParseErrorAction action)
        {
            action.ShowHelp = false;
            parsed.Invoke(new InvocationConfiguration { Error = text, Output = text });
        }

        string suggestions = parsed.Errors.Aggregate(text.ToString(), (rest, error) => rest.Replace(error.Message, "", StringComparison.Ordinal));
        var failure = new DhException(DhErrorReason.Usage, $"{OneLine($"{string.Join(' ', errors)} {suggestions}")} See: {CommandName(parsed)} --help");
        if (exec.WantsJson(parsed))
        {
            ExecOutput.Of(failure, TimeSpan.Zero).WriteTo(Console.OpenStandardOutput());
            return ExitCode.Usage;
        }

        return Report(failure);
    }

    /// <summary>Whether the message says it all; otherwise it is a mistake in this program.</summary>
    private static bool IsExpected(Exception error) =>
        error is DhException or LinuxException or IOException or UnauthorizedAccessException or PlatformNotSupportedException or OutOfMemoryException;

    private static string OneLine(string text) => string.Join(' ', text.Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries));

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
