using System.Diagnostics;
using System.Globalization;

namespace Dh.TestSupport;

/// <summary>A line that a fake Firecracker has noted.</summary>
/// <param name="ProcessId">Which process.</param>
/// <param name="Time">When, in <see cref="Stopwatch"/> ticks: on Linux both are the nanoseconds of CLOCK_MONOTONIC.</param>
/// <param name="Text">What: `METHOD PATH BODY` of each request as it was taken, and more (test/fake-firecracker/main.c).</param>
public sealed record FakeFirecrackerNote(int ProcessId, long Time, string Text);

/// <summary>
/// A program that plays Firecracker (test/fake-firecracker/main.c), in a directory of its own with its script, its notes, and its guest,
/// which is played here.
/// </summary>
public sealed class FakeFirecracker : IDisposable
{
    private readonly TempDir _directory = new();

    /// <summary>Puts the program in place.</summary>
    /// <param name="script">What to play; nothing for 1.16.1 without faults.</param>
    public FakeFirecracker(params string[] script)
    {
        ProgramPath = _directory["firecracker"];
        ProgramFile.Copy(Path.Combine(AppContext.BaseDirectory, "fake-firecracker"), ProgramPath);
        Guest = new FakeFirecrackerGuest(_directory["guest.sock"]);
        Play(script);
    }

    /// <summary>What goes to <c>--firecracker</c> or <c>DH_FIRECRACKER</c>.</summary>
    public string ProgramPath { get; }

    /// <summary>Who answers on vsock.</summary>
    public FakeFirecrackerGuest Guest { get; }

    /// <summary>Replaces the script, for the processes that start from now on.</summary>
    public void Play(params string[] script) => _directory.Write("script", string.Join('\n', script));

    /// <summary>What its processes have noted so far, in the order of time.</summary>
    public IReadOnlyList<FakeFirecrackerNote> Notes() => !File.Exists(_directory["notes"]) ? [] :
        [.. File.ReadAllLines(_directory["notes"]).Select(line => line.Split(' ', 3)).Select(words => new FakeFirecrackerNote(
            int.Parse(words[0], CultureInfo.InvariantCulture), long.Parse(words[1], CultureInfo.InvariantCulture), words[2]))];

    /// <summary>Starts a process that is spoken to by hand, without the program that is tested.</summary>
    public Task<FakeFirecrackerProcess> StartAsync() => FakeFirecrackerProcess.StartAsync(ProgramPath);

    /// <summary>Boots a machine, pauses it, and takes a snapshot of it: the files <c>state</c> and <c>memory</c>.</summary>
    /// <param name="directory">Where the two files go.</param>
    /// <param name="mib">Guest memory, of which about a quarter is data.</param>
    public async Task MakeSnapshotAsync(string directory, int mib = 64)
    {
        using var process = await StartAsync();
        string kernel = Path.Combine(process.Directory, "vmlinux");
        await File.WriteAllBytesAsync(kernel, [0x7f, (byte)'E', (byte)'L', (byte)'F']);
        using var api = process.Connect();
        foreach (var (method, path, body) in ((string, string, string)[])
            [
                ("PUT", "/machine-config", $$"""{"vcpu_count":1,"mem_size_mib":{{mib}}}"""),
                ("PUT", "/boot-source", """{"kernel_image_path":"vmlinux"}"""),
                ("PUT", "/vsock", """{"guest_cid":3,"uds_path":"v.sock"}"""),
                ("PUT", "/actions", """{"action_type":"InstanceStart"}"""),
                ("PATCH", "/vm", """{"state":"Paused"}"""),
                ("PUT", "/snapshot/create", $$"""{"snapshot_type":"Diff","snapshot_path":"{{directory}}/state","mem_file_path":"{{directory}}/memory"}"""),
            ])
        {
            var answer = await api.AskAsync(method, path, body);
            if (answer.Status != 204)
            {
                throw new InvalidOperationException($"{method} {path}: {answer.Body}");
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Guest.Dispose();
        _directory.Dispose();
    }
}
