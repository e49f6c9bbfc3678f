using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using Dh.Guest;
using Dh.Pool;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh exec</c>: restores a snapshot, runs code in it, ends with the code's exit code.</summary>
internal sealed class ExecCommand : Command
{
    private readonly Option<string?> _code = new("-c") { HelpName = "CODE", Description = "Code to run; the value of a last expression is printed." };
    private readonly Option<bool> _vm = new("--vm") { Description = "Run in a microVM: the only mode, may be left out." };
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "The snapshot's version (see: dh vm status)." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "The snapshot's template." };
    private readonly Option<double?> _timeout = new("--timeout") { HelpName = "S", Description = "Interrupt the code after S seconds: exit code 3." };
    private readonly Option<double?> _restoreTimeout = new("--restore-timeout") { HelpName = "S", Description = "Give up when a step of the restore takes longer than S seconds: exit code 125. (Default: 30)" };
    private readonly MemoryOptions _memory = new();
    private readonly Option<bool> _noPool = new("--no-pool") { Description = "Restore a sandbox of this run's own, also where a pool has one ready. (Also: DH_NO_POOL=1)" };
    private readonly Option<string[]> _environment = new("--env")
    {
        HelpName = "NAME=VALUE",
        Description = "Set a variable for the code; may be repeated.",
        Arity = ArgumentArity.OneOrMore,
    };

    private readonly Option<string?> _requireIsolation = new("--require-isolation")
    {
        HelpName = "CLASS",
        Description = "Do not run with less: emulated, hardware, emulated+cage, hardware+cage, hardware+jail.",
    };

    private readonly ProgramOptions _programs = new();
    private readonly Option<bool> _json = new("--json") { Description = "Print one JSON object on stdout. (Also: DH_JSON=1)" };
    private readonly Option<bool> _verbose = new("--verbose", "-v") { Description = "Say on stderr what is done and how long it takes." };
    private readonly Option<bool> _quiet = new("--quiet", "-q") { Description = "No remarks on stderr, only errors." };
    private readonly Option<bool> _noShowTables = new("--no-show-tables") { Description = "Do not show the tables that the code has assigned." };
    private readonly Option<bool> _noTableMeta = new("--no-table-meta") { Description = "Show tables without their rows' number and their columns." };

    private readonly long _entered;
    private string[] _operands = [];

    public ExecCommand(long entered)
        : base("exec", "Runs Python in a fresh microVM: dh exec [options] [-c CODE | SCRIPT [ARG...] | -]. What follows SCRIPT, or - for stdin, goes to the code.")
    {
        _entered = entered;
        Option[] options =
        [
            _code, _vm, _version, _template, _timeout, _restoreTimeout, _memory.Policy, _memory.Fill, _noPool, _environment, _requireIsolation, _programs.Firecracker, _programs.Jailer,
            _json, _verbose, _quiet, _noShowTables, _noTableMeta,
        ];
        foreach (var option in options)
        {
            Add(option);
        }

        SetAction((parsed, _) => RunAsync(parsed));
    }

    /// <summary>
    /// Takes SCRIPT and everything behind it out of the command line, as python does: the script's arguments are not ours to understand. An
    /// option and its value are joined, so that a value may look like an option.
    /// </summary>
    /// <param name="args">What follows <c>exec</c>.</param>
    /// <returns>What is left for the parser.</returns>
    public string[] TakeOperands(string[] args)
    {
        var left = new List<string>();
        for (int i = 0; i < args.Length; i++)
        {
            string arg = args[i];
            if (arg == "--" || arg == "-" || !arg.StartsWith('-'))
            {
                _operands = args[(arg == "--" ? i + 1 : i)..];
                break;
            }

            string? value = TakesValue(arg) && i + 1 < args.Length ? args[++i] : null;
            left.AddRange(value switch { null => [arg], "" => [arg, ""], _ => [$"{arg}={value}"] });
        }

        return [.. left];
    }

    public bool WantsJson(ParseResult parsed) =>
        parsed.CommandResult.Command == this && (parsed.GetValue(_json) || Environment.GetEnvironmentVariable("DH_JSON") == "1");

    private bool TakesValue(string arg) =>
        Options.Any(option => option.ValueType != typeof(bool) && (option.Name == arg || option.Aliases.Contains(arg)));

    private async Task<int> RunAsync(ParseResult parsed)
    {
        long started = Stopwatch.GetTimestamp();
        var trace = Trace.Of(_entered);
        var streams = new StandardStreams();
        using var interruption = new Interruption();
        bool json = WantsJson(parsed);
        try
        {
            return await RunAsync(parsed, json, streams, interruption, started, trace);
        }
        catch (Exception) when (streams.Broken)
        {
            return (int)ExitCode.BrokenPipe;
        }
        catch (OperationCanceledException) when (interruption.Code is { } code)
        {
            if (json)
            {
                new ExecOutput { Outcome = "interrupted", ExitCode = (int)code, ElapsedSeconds = Elapsed(started) }.WriteTo(Console.OpenStandardOutput());
            }

            return (int)code;
        }
        catch (Exception error) when (json)
        {
            var output = ExecOutput.Of(Failure.CauseOf(error), Stopwatch.GetElapsedTime(started));
            output.WriteTo(Console.OpenStandardOutput());
            return output.ExitCode;
        }
        finally
        {
            trace?.WriteTo(streams);
        }
    }

    private async Task<int> RunAsync(ParseResult parsed, bool json, StandardStreams streams, Interruption interruption, long started, Trace? trace)
    {
        bool verbose = parsed.GetValue(_verbose);
        void Say(string line)
        {
            if (verbose)
            {
                streams.WriteLine(OutputStream.Error, line);
            }
        }

        var request = ReadRequest(parsed);
        var (memoryPolicy, fill) = _memory.Read(parsed);
        var home = DhHome.Default;
        var options = new SandboxOptions
        {
            Home = home,
            MemoryPolicy = memoryPolicy,
            Fill = fill,
            Programs = _programs.Read(parsed),
            RequireIsolation = ReadIsolation(parsed.GetValue(_requireIsolation)),
            RestoreTimeLimit = parsed.GetValue(_restoreTimeout) switch
            {
                null => TimeSpan.FromSeconds(30),
                > 0 and <= 3600 and var seconds => TimeSpan.FromSeconds(seconds),
                _ => throw new DhException(DhErrorReason.Usage, "--restore-timeout takes seconds: more than 0, at most 3600 (an hour)."),
            },
        };
        var choice = VersionChoice.Of(parsed.GetValue(_template), parsed.GetValue(_version), home);
        var snapshot = choice.Open(new SnapshotStore(home), home);
        var manifest = snapshot.Manifest;
        Say($"Snapshot: {manifest.Template} {manifest.Version} ({choice.Reason})");

        bool usePool = !parsed.GetValue(_noPool) && Environment.GetEnvironmentVariable("DH_NO_POOL") != "1";
        var pooled = usePool ? PooledSandbox.TryTake(snapshot, options, Say, interruption.Token) : null;
        await using ISandbox sandbox = pooled ?? (ISandbox)await Sandbox.RestoreAsync(snapshot, options, interruption.Token);
        pooled?.WaitsOnCallingThread = true;
        if (sandbox is Sandbox own)
        {
            own.LeaveTeardown(); // the user waits for the result, and not for that
            trace?.Mark("vmm-start", own.VmmStartedAt);
            Say(own.Population?.ToString() ?? $"File: mapped {manifest.MemoryMib} MiB ({manifest.DataBytes >> 20} MiB data)");
        }
        else
        {
            Say($"Pool: took a sandbox that was ready ({JsonOutput.Name(sandbox.MemoryPolicy)})");
        }

        trace?.Mark("restored");
        if (sandbox.Notice is { } notice && !parsed.GetValue(_quiet))
        {
            streams.WriteLine(OutputStream.Error, $"dh: {notice}");
        }

        var captured = json ? new CapturedOutput() : null;
        var result = await sandbox.ExecuteAsync(request, captured ?? (IOutputSink)streams, interruption.Token);
        trace?.Mark("result", result.ReceivedAt);
        int exitCode = result.Outcome switch
        {
            ExecutionOutcome.Timeout => (int)ExitCode.Timeout,
            ExecutionOutcome.Interrupted => (int)(interruption.Code ?? ExitCode.Interrupted),
            _ => result.ExitCode,
        };

        if (captured is not null)
        {
            new ExecOutput
            {
                Outcome = JsonOutput.Name(result.Outcome),
                ExitCode = exitCode,
                Stdout = captured.Output,
                StdoutTruncated = captured.OutputTruncated,
                Stderr = captured.Error,
                StderrTruncated = captured.ErrorTruncated,
                ResultRepr = result.ResultRepr,
                Tables = [.. result.Tables.Select(table => TableOutput.Of(table, !parsed.GetValue(_noTableMeta)))],
                Error = result.Error is { } error ? new ErrorOutput(error.Type, error.Message, error.Traceback) : null,
                Version = manifest.Version,
                Isolation = Isolation.Name(sandbox.Isolation),
                ElapsedSeconds = Elapsed(started),
                Timing = new TimingOutput(
                    JsonOutput.Seconds(sandbox.RestoreTime), JsonOutput.Seconds(result.Elapsed), Math.Round(result.GuestRunMilliseconds / 1000, 6)),
            }.WriteTo(Console.OpenStandardOutput());
        }
        else
        {
            if (result.ResultRepr is { } repr)
            {
                streams.WriteLine(OutputStream.Output, repr);
            }

            foreach (var table in result.Tables)
            {
                streams.WriteLine(OutputStream.Output, TableText.Of(table, !parsed.GetValue(_noTableMeta)));
            }

            if (Ending(result, request) is { } ending)
            {
                streams.WriteLine(OutputStream.Error, $"dh: {ending}");
            }
        }

        trace?.Mark("printed");
        Say(string.Create(
            CultureInfo.InvariantCulture,
            $"Time: restored in {sandbox.RestoreTime.TotalMilliseconds:0} ms, ran in {result.Elapsed.TotalMilliseconds:0} ms (the code {result.GuestRunMilliseconds:0} ms), {Elapsed(started) * 1000:0} ms in all; isolation: {Isolation.Name(sandbox.Isolation)}"));
        return exitCode;
    }

    // What the code's own output does not tell.
    private static string? Ending(ExecutionResult result, ExecutionRequest request) => result switch
    {
        { Outcome: ExecutionOutcome.Timeout } => string.Create(CultureInfo.InvariantCulture, $"The code did not end within {request.Timeout?.TotalSeconds} s."),
        { OutOfMemory: true } => "The guest ran out of memory and killed the code. More: dh vm prepare --memory MIB --force",
        { Outcome: ExecutionOutcome.Signaled } => $"Signal {result.Signal} ended the code.",
        _ => null,
    };

    private ExecutionRequest ReadRequest(ParseResult parsed)
    {
        string? code = parsed.GetValue(_code);
        if (code is null && _operands.Length == 0)
        {
            throw new DhException(DhErrorReason.Usage, "There is nothing to run: give -c CODE, a script, or - for code from standard input. See: dh exec --help");
        }

        var request = code is not null
            ? new ExecutionRequest { Source = code, Mode = ExecutionMode.Code, Arguments = _operands, Input = Console.OpenStandardInput() }
            : _operands[0] == "-"
                ? new ExecutionRequest { Source = SourceText.OfStandardInput(), Mode = ExecutionMode.Code, Filename = "<stdin>", ShowResult = false, Arguments = _operands[1..] }
                : new ExecutionRequest
                {
                    Source = SourceText.OfScript(_operands[0]),
                    Mode = ExecutionMode.Script,
                    Filename = _operands[0],
                    ShowResult = false,
                    Arguments = _operands[1..],
                    Input = Console.OpenStandardInput(),
                };
        return request with { IsLast = true, ShowTables = !parsed.GetValue(_noShowTables), Environment = ReadEnvironment(parsed.GetValue(_environment) ?? []), Timeout = ReadTimeout(parsed.GetValue(_timeout)) };
    }

    private static Dictionary<string, string> ReadEnvironment(string[] settings)
    {
        var variables = new Dictionary<string, string>(StringComparer.Ordinal);
        foreach (string setting in settings)
        {
            int equals = setting.IndexOf('=', StringComparison.Ordinal);
            if (equals <= 0 || setting.Contains('\0', StringComparison.Ordinal))
            {
                throw new DhException(DhErrorReason.Usage, $"--env takes NAME=VALUE, not '{setting}'.");
            }

            variables[setting[..equals]] = setting[(equals + 1)..];
        }

        return variables;
    }

    private static TimeSpan? ReadTimeout(double? seconds) => seconds switch
    {
        null => null,
        > 0 and <= 2_592_000 => TimeSpan.FromSeconds(seconds.Value),
        _ => throw new DhException(DhErrorReason.Usage, "--timeout takes seconds: more than 0, at most 2592000 (30 days)."),
    };

    private static IsolationClass? ReadIsolation(string? name) =>
        name is null ? null
        : Isolation.TryParse(name, out var isolation) ? isolation
        : throw new DhException(
            DhErrorReason.Usage, $"There is no isolation class '{name}': {string.Join(", ", Isolation.AllNames)}.");

    private static double Elapsed(long started) => JsonOutput.Seconds(Stopwatch.GetElapsedTime(started));
}
