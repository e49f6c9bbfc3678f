using Dh.Guest;
using Dh.Images;
using Dh.Paging;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Preparation;

/// <summary>
/// Records which pages of a snapshot a run needs. Each piece of code runs twice: in a sandbox whose pages are served and noted one by one,
/// until the result is there, not longer: what a machine does while it ends is nobody's working set; and in one that maps the memory file,
/// where the kernel knows what was written. Compressed memory cannot be mapped: of such a snapshot only the first is recorded.
/// </summary>
public static class WorkingSetRecording
{
    private static readonly TimeSpan TemplateTimeLimit = TimeSpan.FromMinutes(5);

    /// <summary>
    /// What stands for the runs of a template's users: its code to record, once as code and once as a script. What only one of two has touched
    /// is half of them, and kept: also which page the guest's kernel takes next, and what follows from the CPU that a thread comes to run on.
    /// </summary>
    /// <param name="template">A template that has such code.</param>
    public static IReadOnlyList<ExecutionRequest> RunsOf(Template template)
    {
        ArgumentNullException.ThrowIfNull(template);
        var code = new ExecutionRequest { Source = template.RecordCode, Timeout = TemplateTimeLimit };
        return [code, code with { Mode = ExecutionMode.Script, Filename = "record.py" }];
    }

    /// <summary>Records, combines, and replaces the snapshot's working set in one step.</summary>
    /// <param name="snapshot">The snapshot.</param>
    /// <param name="runs">What to run, each in sandboxes of its own; at least one.</param>
    /// <param name="options">Where run directories are made, and how long a restore may take; null for the defaults.</param>
    /// <param name="progress">Gets each step; null for nobody.</param>
    /// <param name="cancellationToken">Gives up; the old working set stays.</param>
    /// <returns>The new working set.</returns>
    /// <exception cref="DhException">A run failed; the old working set stays.</exception>
    public static async Task<WorkingSet> RecordAsync(
        Snapshot snapshot, IReadOnlyList<ExecutionRequest> runs, SandboxOptions? options = null, IProgress<PreparationProgress>? progress = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(snapshot);
        ArgumentNullException.ThrowIfNull(runs);
        ArgumentOutOfRangeException.ThrowIfZero(runs.Count);
        options ??= new SandboxOptions();
        var touched = new List<IReadOnlyList<long>>();
        var written = new List<IReadOnlyCollection<long>>();
        for (int i = 0; i < runs.Count; i++)
        {
            progress?.Report(new PreparationProgress("recording", $"run {i + 1} of {runs.Count}", (double)i / runs.Count));
            touched.Add(await RunAsync(snapshot, runs[i], MemoryPolicy.Lazy, options, (sandbox, result) => [.. sandbox.StopRecording(result).Select(page => page.Offset)], cancellationToken).ConfigureAwait(false));
            if (!snapshot.IsCompressed)
            {
                written.Add(await RunAsync(snapshot, runs[i], MemoryPolicy.File, options, (sandbox, _) => WrittenPages.Of(sandbox.VmmProcessId, snapshot.MemoryPath), cancellationToken).ConfigureAwait(false));
            }
        }

        var set = WorkingSet.Combine(snapshot.Manifest.Id, snapshot.Machine.MemoryBytes, touched, written);
        Write(snapshot, set);
        progress?.Report(new PreparationProgress("recorded", $"{set.TouchedBytes >> 10} KiB in {set.Touched.Count} runs, of them {set.Written.Sum(run => run.Length) >> 10} KiB written", 1));
        return set;
    }

    private static void Write(Snapshot snapshot, WorkingSet set)
    {
        if (snapshot.IsCompressed)
        {
            using var source = Lz4Source.Open(snapshot.MemoryPath);
            using var reader = source.OpenReader();
            WorkingSetFile.Write(snapshot.WorkingSetPath, set, reader.CopyTo);
        }
        else
        {
            using var memory = File.OpenHandle(snapshot.MemoryPath);
            WorkingSetFile.Write(snapshot.WorkingSetPath, set, (offset, buffer) => RandomAccess.Read(memory, buffer, offset));
        }
    }

    private static async Task<List<long>> RunAsync(
        Snapshot snapshot, ExecutionRequest request, MemoryPolicy policy, SandboxOptions options, Func<Sandbox, ExecutionResult, List<long>> observe, CancellationToken cancellationToken)
    {
        var recording = new SandboxOptions
        {
            MemoryPolicy = policy,
            Record = policy == MemoryPolicy.Lazy,
            Home = options.Home,
            Installation = options.Installation,
            Programs = options.Programs,
            RestoreTimeLimit = options.RestoreTimeLimit,
        };
        var output = new CapturedText();
        await using var sandbox = await Sandbox.RestoreAsync(snapshot, recording, cancellationToken).ConfigureAwait(false);
        var result = await sandbox.ExecuteAsync(request, output, cancellationToken).ConfigureAwait(false);
        var pages = observe(sandbox, result);
        cancellationToken.ThrowIfCancellationRequested();
        return result.ExitCode == 0
            ? pages
            : throw new DhException(DhErrorReason.Guest, $"The code to record ended with exit code {result.ExitCode}; nothing was recorded. Its output:\n{output.Text}");
    }
}
