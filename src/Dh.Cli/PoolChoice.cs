using System.CommandLine;
using Dh.Pool;

namespace Dh.Cli;

/// <summary>The options that say which pool is meant.</summary>
internal sealed class PoolChoice
{
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "Only of this version." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "Only of this template." };

    /// <summary>Adds them to a command.</summary>
    public void AddTo(Command command)
    {
        command.Add(_version);
        command.Add(_template);
    }

    /// <summary>The pools that run and are meant.</summary>
    public IReadOnlyList<PoolControl> Find(ParseResult parsed) =>
    [
        .. PoolControl.List(DhHome.Default).Where(pool =>
            (parsed.GetValue(_template) is not { } template || pool.Status.Template == template)
            && (parsed.GetValue(_version) is not { } version || pool.Status.Version == version)),
    ];

    /// <summary>The one pool that is meant.</summary>
    /// <exception cref="DhException">There is none, or there are several.</exception>
    public PoolControl FindOne(ParseResult parsed) => Find(parsed) switch
    {
        [var one] => one,
        [] => throw new DhException(DhErrorReason.NotFound, "There is no such pool. Start one: dh vm pool start --detach"),
        var several => throw new DhException(
            DhErrorReason.Usage, $"There are {several.Count} pools: say which, with --template and --version. ({string.Join(", ", several.Select(pool => $"{pool.Status.Template} {pool.Status.Version}"))})"),
    };
}
