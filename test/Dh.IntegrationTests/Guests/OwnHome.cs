using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>A DH_HOME with the prepared snapshots and a run directory of its own, so that other tests' machines are not seen.</summary>
internal sealed class OwnHome : IDisposable
{
    private static readonly TimeSpan CleanUpLimit = TimeSpan.FromSeconds(1);

    private readonly TempDir _directory = new();

    public OwnHome(PreparedHome prepared)
    {
        Directory.CreateSymbolicLink(_directory["vm"], Path.Combine(prepared.Home.Path, "vm"));
        string cache = Path.GetRelativePath(prepared.Home.Path, prepared.Home.CacheDirectory);
        if (!Path.Exists(_directory[cache]))
        {
            Directory.CreateSymbolicLink(_directory[cache], prepared.Home.CacheDirectory); // with QEMU's version in it, nobody asks QEMU for it
        }

        Dh = new DhProgram(_directory.Path);
    }

    public DhProgram Dh { get; }

    /// <summary>A file beside the snapshots.</summary>
    public string Write(string name, string text) => _directory.Write(name, text);

    public Task AssertNothingLeftAsync(string after) => AssertNothingLeftAsync(Dh, after);

    /// <summary>After it, the next run is as good as any.</summary>
    public async Task AssertNothingLeftAndUsableAsync(string after)
    {
        await AssertNothingLeftAsync(after);
        Assert.Equal(new ProgramResult(0, "2\n", ""), await Dh.ExecAsync("1 + 1"));
        await AssertNothingLeftAsync($"the run after {after}");
    }

    /// <summary>No process and no run directory of a DH_HOME.</summary>
    public static async Task AssertNothingLeftAsync(DhProgram dh, string after)
    {
        long start = Stopwatch.GetTimestamp();
        string left;
        while ((left = Left(new DhHome(dh.Home).RunDirectory)).Length > 0 && Stopwatch.GetElapsedTime(start) < CleanUpLimit)
        {
            await Task.Delay(10);
        }

        Assert.True(left.Length == 0, $"After {after}: {left}");
    }

    public void Dispose() => _directory.Dispose();

    private static string Left(string run)
    {
        var directories = Directory.Exists(run) ? Directory.EnumerateDirectories(run) : [];
        // The launcher's command line names the run directory, and the VMM's is where it works; so nothing that runs may name it.
        var processes = Processes.All().Where(process => Processes.CommandLine(process).Contains(run, StringComparison.Ordinal)
            || Processes.WorkingDirectory(process).StartsWith(run, StringComparison.Ordinal));
        return string.Join(", ", directories.Concat(processes.Select(process => $"process {process}")));
    }
}
