using System.CommandLine;
using System.Globalization;
using System.Runtime.InteropServices;
using Dh.Linux;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.Cli;

/// <summary><c>dh doctor</c>: what of this host <c>dh</c> needs, what it found, and what to do about it.</summary>
internal sealed class DoctorCommand : Command
{
    private const long NeededMemoryMib = 1024;
    private const long NeededDiskMib = 4096;

    private readonly ProgramOptions _programs = new();
    private readonly Option<bool> _json = new("--json") { Description = "Print one JSON object on stdout. (Also: DH_JSON=1)" };

    public DoctorCommand()
        : base("doctor", "Looks at this host and says what is missing.")
    {
        Add(_programs.Firecracker);
        Add(_programs.Jailer);
        Add(_json);
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var home = DhHome.Default;
        var candidates = await VmmCandidate.FindAllAsync(_programs.Read(parsed), home);
        CheckOutput[] checks =
        [
            Platform(),
            .. Vmms(candidates),
            PageFaults(),
            Program("mmdebstrap", "mmdebstrap"),
            Program("mke2fs", "e2fsprogs"),
            Memory(),
            Disk(home),
            .. await IsolationAsync(home),
            Snapshots(home),
        ];
        bool ok = checks.All(check => check.Ok || !check.Required);
        if (parsed.GetValue(_json) || Environment.GetEnvironmentVariable("DH_JSON") == "1")
        {
            JsonOutput.Write(Console.OpenStandardOutput(), new DoctorOutput(ok, checks), JsonOutput.Default.DoctorOutput);
        }
        else
        {
            foreach (var check in checks)
            {
                Console.Out.WriteLine($"{(check.Ok ? "ok" : "no")}  {check.Name}: {check.Detail}{(check.Advice is { } advice ? $" -> {advice}" : "")}");
            }
        }

        return (int)(ok ? ExitCode.Success : ExitCode.Failed);
    }

    private static CheckOutput Platform()
    {
        bool fits = OperatingSystem.IsLinux() && RuntimeInformation.OSArchitecture == Architecture.X64;
        return new("platform", fits, Required: true, RuntimeInformation.OSDescription, fits ? null : "dh runs microVMs on x86-64 Linux only");
    }

    /// <summary>What <c>dh vm prepare</c> looks at, the best first: one check for each way to run machines, then the one that it takes.</summary>
    private static IEnumerable<CheckOutput> Vmms(IReadOnlyList<VmmCandidate> candidates)
    {
        var taken = candidates.FirstOrDefault(candidate => candidate.Refusal is null);
        foreach (var candidate in candidates)
        {
            bool needed = taken is null || candidates.TakeWhile(other => other != taken).Contains(candidate);
            yield return candidate.Refusal is null
                ? new(Way(candidate), true, Required: false, $"{candidate.Program}{(candidate.IsProved ? "" : "; not tried yet: dh vm prepare boots a kernel with it")}", null)
                : new(Way(candidate), false, Required: false, $"{(candidate.Program is { } program ? $"{program}: " : "")}{candidate.Refusal}", needed ? candidate.Advice : null);
        }

        yield return taken is null
            ? new("VMM", false, Required: true, "there is none that can run machines", candidates[^1].Advice)
            : new("VMM", true, Required: true, $"dh vm prepare takes {Way(taken)}{(taken.IsProved ? "" : ", if it boots a kernel")}; a snapshot that is there keeps its own", null);
    }

    private static string Way(VmmCandidate candidate) => (candidate.Vmm, candidate.Accelerator) switch
    {
        ("firecracker", _) => "Firecracker with KVM",
        (_, Accelerator.Kvm) => "QEMU with KVM",
        _ => "QEMU, emulating",
    };

    private static CheckOutput PageFaults()
    {
        const string name = "userfaultfd";
        try
        {
            using var device = Userfaultfd.OpenDevice();
            return new(name, true, Required: false, $"{Userfaultfd.DevicePath} opens", null);
        }
        catch (LinuxException error)
        {
            return new(
                name, false, Required: false, error.Message,
                $"memory comes back through the File backend; for the page server: chmod or chgrp {Userfaultfd.DevicePath} so that you may open it (Linux 6.1 or later)");
        }
    }

    private static CheckOutput Program(string program, string package) => Find(program) is { } path
        ? new(program, true, Required: false, path, null)
        : new(program, false, Required: false, $"there is no {program}, which dh vm prepare needs", $"apt-get install {package}");

    private static CheckOutput Memory()
    {
        long available = OperatingSystem.IsLinux()
            ? File.ReadLines("/proc/meminfo")
                .Where(line => line.StartsWith("MemAvailable:", StringComparison.Ordinal))
                .Select(line => long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) >> 10)
                .FirstOrDefault()
            : 0;
        bool enough = available >= NeededMemoryMib;
        return new("memory", enough, Required: false, $"{available} MiB available", enough ? null : $"a run of the python template may need {NeededMemoryMib} MiB");
    }

    private static CheckOutput Disk(DhHome home)
    {
        string directory = home.Path;
        while (!Directory.Exists(directory) && Path.GetDirectoryName(directory) is { } parent)
        {
            directory = parent;
        }

        long free = new DriveInfo(directory).AvailableFreeSpace >> 20;
        bool enough = free >= NeededDiskMib;
        return new(
            "disk", enough, Required: false, $"{free} MiB free for {home.Path}",
            enough ? null : $"dh vm prepare may need {NeededDiskMib} MiB: make room (dh vm clean), or set DH_HOME");
    }

    /// <summary>One check for each layer of the cage, then the classes that follow.</summary>
    private static async Task<IReadOnlyList<CheckOutput>> IsolationAsync(DhHome home)
    {
        IReadOnlyList<CageLayer> layers;
        try
        {
            layers = await CageProbe.RunAsync(home);
        }
        catch (DhException error)
        {
            return [new("isolation", false, Required: false, error.Message, null)];
        }

        bool caged = Sandboxes.Isolation.IsCaged(layers);
        return
        [
            .. layers.Select(layer => new CheckOutput(
                $"cage, {layer.Name}", layer.IsOn, Required: false,
                layer.IsOn ? layer.Purpose : $"off ({layer.Reason}): {layer.Purpose}{(layer.IsRequired ? "" : "; the cage is complete without it")}", layer.Advice)),
            new("isolation", caged, Required: false,
                $"{Class(Accelerator.Tcg, caged: caged)}, or {Class(Accelerator.Kvm, caged: caged)} for a snapshot that was prepared with KVM and QEMU, or {Class(Accelerator.Kvm, jailed: true)} for Firecracker under its jailer",
                caged ? null : "do not run code that you would not run as yourself; demand a class with --require-isolation"),
        ];
    }

    private static string Class(Accelerator accelerator, bool jailed = false, bool caged = false) => Sandboxes.Isolation.Name(Sandboxes.Isolation.Of(accelerator, jailed, caged));

    private static CheckOutput Snapshots(DhHome home)
    {
        var store = new SnapshotStore(home);
        var snapshots = store.List(out var damaged);
        string found = snapshots.Count == 0
            ? $"none in {home.SnapshotsDirectory}"
            : string.Join(", ", snapshots.Select(snapshot => $"{snapshot.Manifest.Template} {snapshot.Manifest.Version}").Distinct());
        return damaged.Count > 0 ? new("snapshots", false, Required: false, $"{found}; {string.Join(' ', damaged)}", null)
            : snapshots.Count == 0 ? new("snapshots", false, Required: false, found, "dh vm prepare")
            : new("snapshots", true, Required: false, found, null);
    }

    private static string? Find(string program) =>
        $"{Environment.GetEnvironmentVariable("PATH")}:/usr/sbin:/sbin"
            .Split(':', StringSplitOptions.RemoveEmptyEntries)
            .Select(directory => Path.Combine(directory, program))
            .FirstOrDefault(File.Exists);
}
