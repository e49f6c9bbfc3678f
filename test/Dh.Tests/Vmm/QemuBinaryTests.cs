using Dh.TestSupport;
using Dh.Vmm.Qemu;

namespace Dh.Tests.Vmm;

/// <summary>QEMU is asked for its version once, and again when it was replaced.</summary>
public sealed class QemuBinaryTests
{
    [Fact]
    public async Task A_version_is_asked_for_once_until_the_program_changes()
    {
        using var directory = new TempDir();
        string program = Program(directory, "7.2.1");
        Assert.Equal(new Version(7, 2, 1), await FindAsync());
        Assert.Equal(new Version(7, 2, 1), await FindAsync());
        Assert.Single(await File.ReadAllLinesAsync(directory["asked"], TestContext.Current.CancellationToken));

        Program(directory, "10.0.2");
        Assert.Equal(new Version(10, 0, 2), await FindAsync());
        Assert.Equal(2, (await File.ReadAllLinesAsync(directory["asked"], TestContext.Current.CancellationToken)).Length);

        async Task<Version> FindAsync() => (await QemuBinary.FindCachedAsync(program, directory.Path, TestContext.Current.CancellationToken)).Version;
    }

    [Fact]
    public async Task A_version_that_is_too_old_is_never_taken()
    {
        using var directory = new TempDir();
        string program = Program(directory, "7.1.0");
        for (int i = 0; i < 2; i++)
        {
            var error = await Assert.ThrowsAsync<DhException>(() => QemuBinary.FindCachedAsync(program, directory.Path, TestContext.Current.CancellationToken));
            Assert.Contains("7.1.0", error.Message, StringComparison.Ordinal);
        }
    }

    private static string Program(TempDir directory, string version)
    {
        string path = directory.Write("qemu", $"#!/bin/sh\necho asked >> {directory["asked"]}\necho QEMU emulator version {version}\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }
}
