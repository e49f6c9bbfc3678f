using System.Diagnostics;
using System.Text.Json;
using Dh.IntegrationTests.Guests;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Firecracker;

/// <summary><c>dh vm prepare</c> with a played Firecracker, of a real image.</summary>
public sealed class FirecrackerPrepareTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(5);

    private readonly FakeFirecracker _fake = new();
    private readonly TempDir _directory = new();
    private readonly DhProgram _dh;

    public FirecrackerPrepareTests(PreparedHome prepared)
    {
        _dh = new DhProgram(_directory.Path, new Dictionary<string, string> { ["DH_FIRECRACKER"] = _fake.ProgramPath });
        // A cache of its own: the verdict on KVM with this Firecracker is no other test's.
        Directory.CreateDirectory(Path.GetDirectoryName(new DhHome(_dh.Home).ImagesDirectory)!);
        Directory.CreateSymbolicLink(new DhHome(_dh.Home).ImagesDirectory, prepared.Home.ImagesDirectory);
        // What preparation runs to see whether a restored machine works.
        _fake.Guest.Otherwise = async run =>
        {
            await run.PrintAsync("42 True\n");
            return 0;
        };
    }

    [Fact(Timeout = 300_000)]
    public async Task It_boots_a_machine_saves_it_and_verifies_it_under_every_backend()
    {
        var result = await PrepareAsync();
        if (KvmProbe.DeviceRefusal() is { } refusal)
        {
            Assert.Equal(125, result.ExitCode);
            Assert.Contains(refusal, result.Error, StringComparison.Ordinal);
            return;
        }

        Assert.True(result.ExitCode == 0, result.Error);
        using var status = JsonDocument.Parse((await _dh.RunAsync(["vm", "status", "--json"])).Output);
        Assert.Equal("firecracker", status.RootElement.GetProperty("snapshots")[0].GetProperty("vmm").GetString());
        string[] notes = [.. _fake.Notes().Select(note => note.Text)];
        Assert.Contains("dh.probe", notes.First(note => note.StartsWith("boot ", StringComparison.Ordinal)), StringComparison.Ordinal);
        string[] boot = [.. notes.SkipWhile(note => !note.StartsWith("PUT /machine-config", StringComparison.Ordinal)).TakeWhile(note => !note.StartsWith("PUT /snapshot/load", StringComparison.Ordinal)).Where(note => note.StartsWith('P')).Select(note => note.Split(' ')[1])];
        Assert.Equal(["/machine-config", "/boot-source", "/drives/root", "/vsock", "/balloon", "/entropy", "/actions", "/vm", "/snapshot/create"], boot);
        Assert.Contains(notes, note => note.StartsWith("PUT /snapshot/load", StringComparison.Ordinal) && note.Contains("\"File\"", StringComparison.Ordinal));
        Assert.Contains(notes, note => note.StartsWith("PUT /snapshot/load", StringComparison.Ordinal) && note.Contains("\"Uffd\"", StringComparison.Ordinal));
        Assert.Equal("42 True\n", (await _dh.ExecAsync("whatever")).Output);
        await OwnHome.AssertNothingLeftAsync(_dh, "a preparation and a run");
    }

    [Theory(Timeout = 300_000)]
    [InlineData("no-boot Kernel panic - not syncing: no KVM to speak of", "Kernel panic - not syncing: no KVM to speak of")]
    [InlineData("fail /boot-source Boot source error: no", "Boot source error: no")]
    [InlineData("fail /actions Start microvm error: no", "Start microvm error: no")]
    [InlineData("fail /snapshot/create Create snapshot error: no", "Create snapshot error: no")]
    [InlineData("die resumed 3", "the script ends this at: resumed")]
    public async Task What_goes_wrong_is_told_and_nothing_is_published(string script, string what)
    {
        _fake.Play(script);
        var result = await PrepareAsync();
        Assert.Equal(125, result.ExitCode);
        Assert.Contains(KvmProbe.DeviceRefusal() ?? what, result.Error, StringComparison.Ordinal);
        Assert.Equal(4, (await _dh.ExecAsync("1")).ExitCode);
        await OwnHome.AssertNothingLeftAsync(_dh, "a preparation that failed");
    }

    [Fact(Timeout = 300_000)]
    public async Task Without_access_to_KVM_it_says_which_group_to_join_and_takes_QEMU()
    {
        Assert.SkipUnless(Environment.IsPrivilegedProcess, "A mount namespace needs root.");
        bool there = File.Exists("/dev/kvm");
        string setup = there ? "mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm" : "true";
        string expected = there ? "this user may not open /dev/kvm: join its group (`kvm`)" : "/dev/kvm does not exist";
        var doctor = await RunAsync("doctor");
        Assert.Contains(expected, doctor.Output, StringComparison.Ordinal);
        var refused = await RunAsync("vm", "prepare", "--vmm", "firecracker");
        Assert.Equal(125, refused.ExitCode);
        Assert.Contains($"Firecracker was asked for and cannot be used here: {expected}", refused.Error, StringComparison.Ordinal);
        var prepared = await RunAsync("vm", "prepare");
        Assert.True(prepared.ExitCode == 0, prepared.Error);
        using var status = JsonDocument.Parse((await _dh.RunAsync(["vm", "status", "--json"])).Output);
        Assert.Equal("qemu", status.RootElement.GetProperty("snapshots")[0].GetProperty("vmm").GetString());

        Task<ProgramResult> RunAsync(params string[] arguments) =>
            _dh.RunAsync(new ProcessStartInfo("unshare", ["--mount", "sh", "-c", $"{setup} && exec \"$0\" \"$@\"", Repository.PathOf("bin/dh"), .. arguments]), Limit);
    }

    public void Dispose()
    {
        _fake.Dispose();
        _directory.Dispose();
    }

    private Task<ProgramResult> PrepareAsync() => _dh.RunAsync(["vm", "prepare", "--vmm", "firecracker", "--memory", "128"], timeLimit: Limit);
}
