using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>A VMM that is missing, too old, or ends when it should not: exit code 125, its last words, and nothing left.</summary>
public sealed class VmmFailureTests(PreparedHome prepared) : IDisposable
{
    private readonly OwnHome _own = new(prepared);

    [Fact]
    public async Task A_QEMU_that_is_not_there_is_named()
    {
        Assert.Equal(new ProgramResult(125, "", "dh: DH_QEMU names /no/such/qemu, which does not exist.\n"), await ExecAsync("/no/such/qemu"));
    }

    [Fact]
    public async Task Without_QEMU_in_PATH_it_says_what_to_install()
    {
        var result = await _own.Dh.RunAsync(["exec", "-c", "1"], environment: new Dictionary<string, string> { ["PATH"] = "/no/such/directory", ["DH_QEMU"] = "" });
        Assert.Equal(
            new ProgramResult(125, "", "dh: QEMU is not installed: qemu-system-x86_64 is not in PATH. Run `make setup`, or `apt-get install qemu-system-x86`.\n"), result);
        await _own.AssertNothingLeftAsync("a run without QEMU");
    }

    [Fact]
    public async Task A_QEMU_that_cannot_be_executed_is_named()
    {
        string qemu = _own.Write("qemu", "no program");
        var result = await ExecAsync(qemu);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith($"dh: QEMU {qemu} cannot be run. Set DH_QEMU to one that can.", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_QEMU_that_ends_at_once_has_its_last_words_shown()
    {
        var result = await ExecAsync(Script($"[ \"$1\" = --version ] && exec qemu-system-x86_64 --version; echo 'qemu: \u001b[2Jno such machine' >&2; exit 1"));
        Assert.Equal(new ProgramResult(125, "", "dh: QEMU ended before it had answered `greeting`. Its last words:\nqemu: [2Jno such machine\n"), result);
    }

    [Fact]
    public async Task A_QEMU_that_is_too_old_prepares_nothing()
    {
        string qemu = Script("echo 'QEMU emulator version 4.2.0'");
        var result = await _own.Dh.RunAsync(["vm", "prepare", "--force"], environment: Environment(qemu));
        Assert.Equal(new ProgramResult(125, "", $"dh: QEMU 4.2.0 ({qemu}) is too old: 7.2 or newer is needed. Install it, or set DH_QEMU to it.\n"), result);
    }

    [Theory]
    [InlineData("no program", "cannot be run")]
    [InlineData("#!/bin/sh\necho no QEMU", "says no version: \"no QEMU\"")]
    public async Task What_is_no_QEMU_prepares_nothing(string contents, string what)
    {
        string qemu = Executable(contents);
        var result = await _own.Dh.RunAsync(["vm", "prepare", "--force"], environment: Environment(qemu));
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.Contains(qemu, result.Error, StringComparison.Ordinal);
        Assert.Contains(what, result.Error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(30)]
    [InlineData(60)]
    [InlineData(100)]
    [InlineData(150)]
    [InlineData(250)]
    public async Task A_QEMU_that_is_killed_while_it_restores_is_a_failure(int delayMs)
    {
        using var process = _own.Dh.Start(["exec", "-c", "import time; time.sleep(30)"]);
        int qemu = await Processes.WaitForDescendantAsync(process.Id, "qemu-system", TestContext.Current.CancellationToken);
        await Task.Delay(delayMs, TestContext.Current.CancellationToken);
        await Processes.SignalAsync(qemu, "KILL");
        string error = await process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(125, process.ExitCode);
        Assert.Matches("^dh: (QEMU ended before it had answered `|The microVM ended (before it answered|while code ran) \\(killed by signal 9\\)\\.)", error);
        await _own.AssertNothingLeftAsync("the death of QEMU");
    }

    [Fact]
    public async Task A_QEMU_that_is_killed_while_code_runs_is_a_failure()
    {
        using var process = _own.Dh.Start(["exec", "-c", "print('started', flush=True)\nimport time; time.sleep(30)"]);
        Assert.Equal("started", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        await Processes.SignalAsync(await Processes.WaitForDescendantAsync(process.Id, "qemu-system", TestContext.Current.CancellationToken), "KILL");
        string error = await process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(125, process.ExitCode);
        Assert.StartsWith("dh: The microVM ended while code ran (killed by signal 9).", error, StringComparison.Ordinal);
        await _own.AssertNothingLeftAndUsableAsync("the death of QEMU");
    }

    public void Dispose() => _own.Dispose();

    private static Dictionary<string, string> Environment(string qemu) => new() { ["DH_QEMU"] = qemu };

    private async Task<ProgramResult> ExecAsync(string qemu)
    {
        var result = await _own.Dh.RunAsync(["exec", "-c", "1"], environment: Environment(qemu));
        await _own.AssertNothingLeftAsync($"a run with {qemu}");
        return result;
    }

    private string Script(string line) => Executable($"#!/bin/sh\n{line}\n");

    private string Executable(string contents)
    {
        string path = _own.Write("qemu", contents);
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }
}
