using Dh.TestSupport;
using Dh.Vmm.Firecracker;

namespace Dh.Tests.Vmm.Firecracker;

/// <summary>Firecracker is asked for its two versions once, and again when it was replaced.</summary>
public sealed class FirecrackerBinaryTests
{
    // What real ones print: log lines follow, on the same stream.
    private const string Log = "2026-01-01T00:00:00.000000000 [anonymous-instance:main] Firecracker 9.9.9 exiting successfully. exit_code=0";

    [Fact]
    public async Task Versions_are_asked_for_once_until_the_program_changes()
    {
        using var directory = new TempDir();
        string program = Program(directory, "Firecracker v1.16.1", "v10.0.0");
        Assert.Equal(new FirecrackerBinary(program, new Version(1, 16, 1), new Version(10, 0, 0)), await AskAsync(directory, program));
        Assert.Equal(new FirecrackerBinary(program, new Version(1, 16, 1), new Version(10, 0, 0)), await AskAsync(directory, program));
        Assert.Equal(["--version", "--snapshot-version"], await File.ReadAllLinesAsync(directory["asked"], TestContext.Current.CancellationToken));

        Program(directory, "Firecracker v1.17.0-dev", "v11.0.0");
        Assert.Equal(new FirecrackerBinary(program, new Version(1, 17, 0), new Version(11, 0, 0)), await AskAsync(directory, program));
        Assert.Equal(4, (await File.ReadAllLinesAsync(directory["asked"], TestContext.Current.CancellationToken)).Length);
    }

    [Fact]
    public async Task One_that_does_not_say_what_snapshots_it_reads_is_taken()
    {
        using var directory = new TempDir();
        string program = Program(directory, "Firecracker v1.0.2", "Arguments parsing error: Found argument 'snapshot-version'");
        Assert.Equal(new FirecrackerBinary(program, new Version(1, 0, 2), null), await AskAsync(directory, program));
    }

    [Fact]
    public async Task What_is_no_Firecracker_is_named()
    {
        using var directory = new TempDir();
        string program = Program(directory, "no version here", "");
        var error = await Assert.ThrowsAsync<DhException>(() => AskAsync(directory, program));
        Assert.Equal(
            $"`{program} --version` says no version: \"no version here\". Name another Firecracker with --firecracker or DH_FIRECRACKER.", error.Message);
    }

    [Fact]
    public async Task One_that_cannot_be_run_is_named()
    {
        using var directory = new TempDir();
        string program = directory.Write("firecracker", "no program");
        var error = await Assert.ThrowsAsync<DhException>(() => AskAsync(directory, program));
        Assert.Equal($"Firecracker {program} cannot be run. Name one that can with --firecracker or DH_FIRECRACKER.", error.Message);
    }

    [Fact]
    public void One_that_is_named_and_not_there_is_no_reason_to_look_elsewhere()
    {
        var error = Assert.Throws<DhException>(() => FirecrackerBinary.FindPath("/no/such/firecracker"));
        Assert.Equal("--firecracker names /no/such/firecracker, which does not exist.", error.Message);
    }

    private static Task<FirecrackerBinary> AskAsync(TempDir directory, string program) =>
        FirecrackerBinary.OfAsync(program, directory.Path, TestContext.Current.CancellationToken);

    private static string Program(TempDir directory, string version, string snapshotVersion)
    {
        string path = directory.Write(
            "firecracker",
            $"#!/bin/sh\necho $1 >> {directory["asked"]}\n[ $1 = --version ] && echo '{version}' || echo '{snapshotVersion.Replace("'", "", StringComparison.Ordinal)}'\necho '{Log}'\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }
}
