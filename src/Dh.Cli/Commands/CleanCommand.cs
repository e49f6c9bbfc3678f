using System.CommandLine;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh vm clean</c>: removes snapshots that nothing uses.</summary>
internal sealed class CleanCommand : Command
{
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "Only this version." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "Only this template." };

    public CleanCommand()
        : base("clean", "Removes snapshots, except those that a sandbox uses.")
    {
        Add(_version);
        Add(_template);
        SetAction(Run);
    }

    private int Run(ParseResult parsed)
    {
        var removed = new SnapshotStore(DhHome.Default).Clean(parsed.GetValue(_template), parsed.GetValue(_version));
        foreach (string directory in removed)
        {
            Console.Out.WriteLine($"removed {directory}");
        }

        if (removed.Count == 0)
        {
            Console.Error.WriteLine("dh: There was nothing to remove. What there is: dh vm status");
        }

        return (int)ExitCode.Success;
    }
}
