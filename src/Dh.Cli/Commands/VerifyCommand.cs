using System.CommandLine;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh vm verify</c>: compares every byte of snapshots with their manifests.</summary>
internal sealed class VerifyCommand : Command
{
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "Only this version." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "Only this template." };

    public VerifyCommand()
        : base("verify", "Reads snapshots in full and compares their hashes.")
    {
        Add(_version);
        Add(_template);
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var (template, version) = (parsed.GetValue(_template), parsed.GetValue(_version));
        var home = DhHome.Default;
        var store = new SnapshotStore(home);
        Snapshot[] chosen =
        [
            .. store.List(out var unusable).Where(snapshot => (template ?? snapshot.Manifest.Template) == snapshot.Manifest.Template && (version ?? snapshot.Manifest.Version) == snapshot.Manifest.Version),
        ];
        if (chosen.Length == 0)
        {
            // Says what there is instead, or what is damaged.
            chosen = [new VersionChoice(template, version, "--version").Open(store, home)];
        }

        using var interruption = new Interruption();
        var code = ExitCode.Success;
        foreach (var snapshot in chosen)
        {
            string name = $"{snapshot.Manifest.Template} {snapshot.Manifest.Version} ({snapshot.Manifest.Id})";
            try
            {
                await snapshot.VerifyAsync(interruption.Token);
                Console.Out.WriteLine($"ok  {name}");
            }
            catch (DhException error)
            {
                Console.Out.WriteLine($"no  {name}");
                code = Failure.Report(error);
            }
            catch (OperationCanceledException) when (interruption.Code is { } signal)
            {
                return (int)signal;
            }
        }

        foreach (string damaged in unusable)
        {
            Console.Error.WriteLine($"dh: {damaged}");
            code = ExitCode.Failed;
        }

        return (int)code;
    }
}
