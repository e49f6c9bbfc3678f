using System.CommandLine;
using System.Globalization;
using Dh.Guest;
using Dh.Images;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh vm record</c>: records which pages of a snapshot code needs, so that they are there before it runs.</summary>
internal sealed class RecordCommand : Command
{
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "The snapshot's version (see: dh vm status)." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "The snapshot's template." };
    private readonly ProgramOptions _programs = new();
    private readonly Option<string[]> _code = new("-c") { HelpName = "CODE", Arity = ArgumentArity.OneOrMore, Description = "Code to record; may be repeated." };
    private readonly Argument<string[]> _scripts = new("SCRIPT") { Arity = ArgumentArity.ZeroOrMore, Description = "Scripts to record." };

    public RecordCommand()
        : base("record", "Records the pages that code needs: dh vm record [-c CODE | SCRIPT]... Without code: the template's. Pages that at least half of the runs touched are kept.")
    {
        Add(_version);
        Add(_template);
        Add(_programs.Firecracker);
        Add(_programs.Jailer);
        Add(_code);
        Add(_scripts);
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var home = DhHome.Default;
        var snapshot = VersionChoice.Of(parsed.GetValue(_template), parsed.GetValue(_version), home).Open(new SnapshotStore(home), home);
        ExecutionRequest[] runs =
        [
            .. (parsed.GetValue(_code) ?? []).Select(code => new ExecutionRequest { Source = code }),
            .. (parsed.GetValue(_scripts) ?? []).Select(path => new ExecutionRequest { Source = SourceText.OfScript(path), Mode = ExecutionMode.Script, Filename = path, ShowResult = false }),
        ];
        if (runs.Length == 0)
        {
            var template = Template.Find(snapshot.Manifest.Template, Installation.Current.TemplatesDirectory);
            runs = template.RecordCode.Length > 0
                ? [.. WorkingSetRecording.RunsOf(template)]
                : throw new DhException(DhErrorReason.Usage, $"The template {snapshot.Manifest.Template} has no code to record: give -c CODE or a script.");
        }

        using var interruption = new Interruption();
        try
        {
            var set = await WorkingSetRecording.RecordAsync(snapshot, runs, new SandboxOptions { Programs = _programs.Read(parsed) }, new PlainProgress(), interruption.Token);
            Console.Out.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{snapshot.Manifest.Template} {snapshot.Manifest.Version}: the working set is {set.TouchedBytes / 1048576.0:0.0} MiB in {set.Touched.Count} runs"));
            return (int)ExitCode.Success;
        }
        catch (OperationCanceledException) when (interruption.Code is { } code)
        {
            Console.Error.WriteLine("dh: interrupted; the working set is what it was.");
            return (int)code;
        }
    }
}
