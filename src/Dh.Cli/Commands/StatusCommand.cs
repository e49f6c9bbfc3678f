using System.CommandLine;
using System.Globalization;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh vm status</c>: the snapshots that there are.</summary>
internal sealed class StatusCommand : Command
{
    private static readonly string[] Headings = ["TEMPLATE", "VERSION", "VMM", "ACCEL", "MEMORY", "DATA", "WORKING SET", "ON DISK", "BOOT", "PREPARED (UTC)", "LAST RESTORES"];

    /// <summary>How many of the last restores a line shows.</summary>
    private const int ShownRestores = 3;

    private readonly Option<bool> _json = new("--json") { Description = "Print one JSON object on stdout. (Also: DH_JSON=1)" };

    public StatusCommand()
        : base("status", "Lists the snapshots, the newest first.")
    {
        Add(_json);
        SetAction(Run);
    }

    private int Run(ParseResult parsed)
    {
        var home = DhHome.Default;
        var store = new SnapshotStore(home);
        var status = new StatusOutput([.. store.List(out var damaged).Select(snapshot => SnapshotOutput.Of(home, snapshot))], damaged);
        if (parsed.GetValue(_json) || Environment.GetEnvironmentVariable("DH_JSON") == "1")
        {
            JsonOutput.Write(Console.OpenStandardOutput(), status, JsonOutput.Default.StatusOutput);
            return (int)ExitCode.Success;
        }

        if (status.Snapshots.Count == 0)
        {
            Console.Out.WriteLine($"There is no snapshot in {home.SnapshotsDirectory}. Prepare one: dh vm prepare");
        }
        else
        {
            WriteColumns([Headings, .. status.Snapshots.Select(Row)]);
        }

        foreach (string line in status.Damaged)
        {
            Console.Error.WriteLine($"dh: {line}");
        }

        return (int)ExitCode.Success;
    }

    private static string[] Row(SnapshotOutput snapshot) =>
    [
        snapshot.Template, snapshot.Version, $"{snapshot.Vmm} {snapshot.VmmVersion}", snapshot.Accelerator, $"{snapshot.MemoryMib} MiB", $"{snapshot.DataMib} MiB",
        snapshot.WorkingSetMib is { } mib ? string.Create(CultureInfo.InvariantCulture, $"{mib:0.0} MiB") : "-",
        $"{snapshot.DiskMib} MiB",
        string.Create(CultureInfo.InvariantCulture, $"{snapshot.BootSeconds:0.0} s"),
        snapshot.PreparedAt.UtcDateTime.ToString("yyyy-MM-dd HH:mm", CultureInfo.InvariantCulture),
        snapshot.Restores.Count == 0 ? "-" : string.Join(", ", snapshot.Restores.Take(ShownRestores).Select(restore => string.Create(CultureInfo.InvariantCulture, $"{restore.Seconds * 1000:0} ms ({restore.Policy})"))),
    ];

    private static void WriteColumns(IReadOnlyList<string[]> rows)
    {
        int[] widths = [.. Headings.Select((_, column) => rows.Max(row => row[column].Length))];
        foreach (string[] row in rows)
        {
            Console.Out.WriteLine(string.Join("  ", row.Select((cell, column) => cell.PadRight(widths[column]))).TrimEnd());
        }
    }
}
