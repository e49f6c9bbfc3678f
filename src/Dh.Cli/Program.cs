using System.CommandLine;
using System.Diagnostics;
using System.Reflection;
using Dh.Guest;

namespace Dh.Cli;

internal static class Program
{
    private static string Version =>
        typeof(Program).Assembly.GetCustomAttribute<AssemblyInformationalVersionAttribute>()?.InformationalVersion.Split('+')[0] ?? "unknown";

    private static async Task<int> Main(string[] args)
    {
        long entered = Stopwatch.GetTimestamp();

        // Answered before the parser and the console's encodings are set up: scripts ask often.
        if (args is ["--version"])
        {
            var streams = new StandardStreams();
            try
            {
                streams.WriteLine(OutputStream.Output, $"dh {Version}");
                return (int)ExitCode.Success;
            }
            catch (IOException)
            {
                return (int)ExitCode.BrokenPipe;
            }
        }

        // An argument that starts with '@' is an argument, not a file of arguments.
        var parser = new ParserConfiguration { ResponseFileTokenReplacer = null };
        var exec = new ExecCommand(entered);
        string[]? options = args is ["exec", .. var rest] ? exec.TakeOperands(rest) : null;
        var parsed = options is null ? null : exec.Parse(options, parser);
        if (parsed is not { Errors.Count: 0 })
        {
            // Who runs code does not wait for what else there is: all of it, and help, comes after what is not just that.
            parsed = AllCommands(exec).Parse(options is null ? args : ["exec", .. options], parser);
        }

        if (parsed.Errors.Count > 0)
        {
            return (int)Failure.ReportParseErrors(parsed, exec);
        }

        try
        {
            // Signals are the commands' own business (Interruption).
            return await parsed.InvokeAsync(new InvocationConfiguration { EnableDefaultExceptionHandler = false, ProcessTerminationTimeout = null });
        }
        catch (Exception error)
        {
            return (int)Failure.Report(error);
        }
    }

    private static RootCommand AllCommands(ExecCommand exec) => new("Runs Python in a fresh microVM that is restored from a memory snapshot.")
    {
        exec,
        new Command("vm", "Prepares and manages snapshots.")
        {
            new PrepareCommand(),
            new StatusCommand(),
            new CleanCommand(),
            new VerifyCommand(),
            new RecordCommand(),
            new Command("pool", "Keeps sandboxes ready, so that dh exec answers in milliseconds.")
            {
                new PoolStartCommand(),
                new PoolStopCommand(),
                new PoolStatusCommand(),
                new PoolScaleCommand(),
                new PoolLogsCommand(),
            },
        },
        new DoctorCommand(),
        new PageServerCommand(),
    };
}
