using System.CommandLine;
using Dh.Pool;

namespace Dh.Cli;

/// <summary><c>dh vm pool logs</c>: what the pools' daemons have told, also those that have ended.</summary>
internal sealed class PoolLogsCommand : Command
{
    public PoolLogsCommand()
        : base("logs", "Prints the events of the pools, one line each: time, number and name of the event, what it is about.") => SetAction(Run);

    private static int Run(ParseResult parsed)
    {
        foreach (string path in PoolControl.Logs(DhHome.Default))
        {
            using var log = new StreamReader(new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete));
            while (log.ReadLine() is { } line)
            {
                Console.Out.WriteLine(line);
            }
        }

        return (int)ExitCode.Success;
    }
}
