using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using Dh.Images;
using Dh.Preparation;
using Dh.Snapshots;
using Spectre.Console;

namespace Dh.Cli;

/// <summary><c>dh vm prepare</c>: image, warm microVM, snapshot.</summary>
internal sealed class PrepareCommand : Command
{
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "The version to prepare; without --template: of deephaven." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME|FILE", Description = "What to prepare: a name, or a TOML file. (Default: python)" };
    private readonly Option<string> _vmm = new("--vmm") { HelpName = "auto|firecracker|qemu", DefaultValueFactory = _ => "auto", Description = "The VMM; auto takes the best that works here (see: dh doctor)." };
    private readonly ProgramOptions _programs = new();
    private readonly Option<AcceleratorChoice> _accelerator = new("--accel") { HelpName = "auto|kvm|tcg", Description = "Hardware virtualization or emulation." };
    private readonly Option<int?> _memory = new("--memory") { HelpName = "MIB", Description = "The guest's memory. (Default: the template's)" };
    private readonly Option<int> _cpus = new("--cpus") { HelpName = "N", DefaultValueFactory = _ => 2, Description = "The guest's virtual CPUs." };
    private readonly Option<string[]> _packages = new("--package", "--pip") { HelpName = "REQUIREMENT", Description = "A Python package beside the template's; may be repeated." };
    private readonly Option<string?> _jvmArguments = new("--jvm-args") { HelpName = "ARGS", Description = "Arguments for the JVM beside the template's, with spaces between them." };
    private readonly Option<string?> _wheelhouse = new("--wheelhouse") { HelpName = "DIR", Description = "Take Python packages from this directory only." };
    private readonly Option<string?> _mirror = new("--mirror") { HelpName = "URL", Description = "The Debian mirror. (Default: the ones of this host)" };
    private readonly Option<string?> _compress = new("--compress") { HelpName = "lz4", Description = "Keep the memory compressed; restores then need a userfaultfd. (Default: not compressed)" };
    private readonly Option<bool> _force = new("--force") { Description = "Make a new snapshot even when there is one." };

    public PrepareCommand()
        : base("prepare", "Builds an image, boots it, and keeps a snapshot of its memory.")
    {
        Option[] options = [_version, _template, _vmm, _programs.Firecracker, _programs.Jailer, _accelerator, _memory, _cpus, _packages, _jvmArguments, _wheelhouse, _mirror, _compress, _force];
        foreach (var option in options)
        {
            Add(option);
        }

        _vmm.AcceptOnlyFromAmong("auto", "qemu", "firecracker");
        _accelerator.AcceptOnlyFromAmong("auto", "kvm", "tcg");
        _compress.AcceptOnlyFromAmong("lz4");
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        long started = Stopwatch.GetTimestamp();
        var options = new PreparationOptions
        {
            Template = FindTemplate(parsed.GetValue(_template), parsed.GetValue(_version), parsed.GetValue(_jvmArguments)),
            MemoryMib = parsed.GetValue(_memory),
            Cpus = parsed.GetValue(_cpus),
            Wheelhouse = parsed.GetValue(_wheelhouse),
            PipPackages = parsed.GetValue(_packages) ?? [],
            Vmm = parsed.GetValue(_vmm) switch { "firecracker" => VmmChoice.Firecracker, "qemu" => VmmChoice.Qemu, _ => VmmChoice.Auto },
            Programs = _programs.Read(parsed),
            Accelerator = parsed.GetValue(_accelerator),
            Compress = parsed.GetValue(_compress) is not null,
            Force = parsed.GetValue(_force),
            Home = DhHome.Default,
            Mirror = parsed.GetValue(_mirror),
        };

        using var interruption = new Interruption();
        Snapshot snapshot;
        try
        {
            snapshot = await PrepareAsync(options, interruption.Token);
        }
        catch (OperationCanceledException) when (interruption.Code is { } code)
        {
            Console.Error.WriteLine("dh: interrupted; what was prepared before is still in use.");
            return (int)code;
        }

        var manifest = snapshot.Manifest;
        Console.Out.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{manifest.Template} {manifest.Version} is ready: {manifest.MemoryMib} MiB memory, {manifest.DataBytes >> 20} MiB data, {manifest.Vmm} {manifest.VmmVersion} ({JsonOutput.Name(manifest.Accelerator)}), booted in {manifest.BootSeconds:0.0} s; {Stopwatch.GetElapsedTime(started).TotalSeconds:0} s in all"));
        return (int)ExitCode.Success;
    }

    private static Template FindTemplate(string? template, string? version, string? jvmArguments)
    {
        var found = Template.Find(template ?? (version is null ? "python" : "deephaven"), Installation.Current.TemplatesDirectory);
        found = version is null ? found : found.WithVersion(version);
        string[] added = jvmArguments?.Split(' ', StringSplitOptions.RemoveEmptyEntries) ?? [];
        return added.Length == 0 ? found
            : found.Engine == "deephaven" ? found with { JvmArguments = [.. found.JvmArguments, .. added] }
            : throw new DhException(DhErrorReason.Usage, $"--jvm-args is for templates with the engine deephaven; that of '{found.Name}' is {found.Engine}.");
    }

    private static async Task<Snapshot> PrepareAsync(PreparationOptions options, CancellationToken cancellationToken)
    {
        if (Console.IsErrorRedirected)
        {
            return await SnapshotPreparation.PrepareAsync(options, new PlainProgress(), cancellationToken);
        }

        var console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        return await console.Progress()
            .AutoClear(true)
            .Columns(new SpinnerColumn(), new ProgressBarColumn(), new ElapsedTimeColumn(), new TaskDescriptionColumn { Alignment = Justify.Left })
            .StartAsync(context => SnapshotPreparation.PrepareAsync(options, new BarProgress(context.AddTask("starting", maxValue: 1)), cancellationToken));
    }

    /// <summary>One bar: for people.</summary>
    private sealed class BarProgress(ProgressTask task) : IProgress<PreparationProgress>
    {
        private const int ShownLength = 70;

        public void Report(PreparationProgress value)
        {
            string line = value.Detail is null ? value.Step : $"{value.Step}: {value.Detail}";
            task.Description = Markup.Escape(line.Length > ShownLength ? line[..ShownLength] : line);
            task.IsIndeterminate = value.Fraction is null;
            task.Value = value.Fraction ?? 0;
        }
    }
}
