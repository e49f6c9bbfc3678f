using System.CommandLine;
using Dh.Vmm;

namespace Dh.Cli;

/// <summary>The options that name the programs which machines are run with.</summary>
internal sealed class ProgramOptions
{
    /// <summary>Firecracker.</summary>
    public Option<string?> Firecracker { get; } = new("--firecracker") { HelpName = "PATH", Description = "The Firecracker to use. (Also: DH_FIRECRACKER; default: the first in PATH)" };

    /// <summary>Firecracker's jailer.</summary>
    public Option<string?> Jailer { get; } = new("--jailer") { HelpName = "PATH", Description = "Firecracker's jailer, to run Firecracker in: takes root. (Also: DH_JAILER)" };

    /// <summary>What was chosen.</summary>
    public VmmPrograms Read(ParseResult parsed) => new() { Firecracker = parsed.GetValue(Firecracker), Jailer = parsed.GetValue(Jailer) };
}
