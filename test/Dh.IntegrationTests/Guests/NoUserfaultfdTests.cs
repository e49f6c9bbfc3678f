using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>On a host that grants no userfaultfd, whatever the reason, the File backend does the same work; asked for explicitly, eager is refused.</summary>
public sealed class NoUserfaultfdTests(PreparedHome prepared)
{
    // What a namespace of the program's own sees in place of the device.
    private const string NotPermitted = "mount --bind /dev/userfaultfd /dev/userfaultfd && mount -o remount,bind,nodev /dev/userfaultfd";
    private const string AnotherDevice = "mount --bind /dev/null /dev/userfaultfd";
    private const string Missing =
        "dev=$(mktemp -d) && mount -t tmpfs tmpfs $dev && for node in null zero random urandom; do touch $dev/$node && mount --bind /dev/$node $dev/$node || exit; done"
        + " && mount --move $dev /dev && rmdir $dev";

    [Theory]
    [InlineData(NotPermitted, "open /dev/userfaultfd: EACCES (Permission denied)")]
    [InlineData(AnotherDevice, "USERFAULTFD_IOC_NEW of /dev/userfaultfd: ENOTTY (Inappropriate ioctl for device)")]
    [InlineData(Missing, "open /dev/userfaultfd: ENOENT (No such file or directory)")]
    public async Task The_file_is_mapped_instead_and_one_line_says_so(string setup, string reason)
    {
        var result = await ExecAsync(setup, "-c", "1 + 1");
        Assert.Equal(new ProgramResult(0, "2\n", $"dh: no userfaultfd here ({reason}): the VMM maps the memory file instead\n"), result);
    }

    [Fact]
    public async Task Quiet_leaves_the_line_out()
    {
        Assert.Equal(new ProgramResult(0, "2\n", ""), await ExecAsync(NotPermitted, "--quiet", "-c", "1 + 1"));
    }

    [Theory]
    [InlineData(NotPermitted, "EACCES (Permission denied)")]
    [InlineData(AnotherDevice, "ENOTTY (Inappropriate ioctl for device)")]
    [InlineData(Missing, "ENOENT (No such file or directory)")]
    public async Task Eager_is_an_error_when_it_was_asked_for(string setup, string reason)
    {
        var result = await ExecAsync(setup, "--memory-policy", "eager", "-c", "1 + 1");
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.Matches($"^dh: Memory policy eager needs a userfaultfd: .*{System.Text.RegularExpressions.Regex.Escape(reason)}.*--memory-policy file\\.\n$", result.Error);
    }

    private async Task<ProgramResult> ExecAsync(string setup, params string[] arguments)
    {
        Assert.SkipUnless(Environment.IsPrivilegedProcess, "A mount namespace needs root.");
        using var own = new OwnHome(prepared);
        string script = $"{setup} && exec \"$0\" exec \"$@\"";
        var start = new ProcessStartInfo("unshare", ["--mount", "sh", "-c", script, Repository.PathOf("bin/dh"), .. arguments]);
        var result = await own.Dh.RunAsync(start);
        await own.AssertNothingLeftAsync("a run without userfaultfd");
        return result;
    }
}
