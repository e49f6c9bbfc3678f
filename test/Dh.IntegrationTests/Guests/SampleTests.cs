using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>The samples do what they say.</summary>
public sealed class SampleTests(PreparedHome prepared)
{
    [Fact]
    public async Task RunOnce_builds_and_runs_code()
    {
        var build = await RunAsync("dotnet", "build", Repository.PathOf("samples/RunOnce"), "--nologo", "--verbosity", "quiet");
        Assert.True(build.ExitCode == 0, build.Output);

        string program = Repository.PathOf("samples/RunOnce/bin/Debug/net10.0/RunOnce");
        var result = await RunAsync(program, "print('hello'); 6 * 7");
        Assert.Equal((0, ""), (result.ExitCode, result.Error));
        Assert.Matches("^hello\nvalue 42, exit code 0, restored in [0-9]+ ms\n$", result.Output);
        Assert.Equal(7, (await RunAsync(program, "import sys; sys.exit(7)")).ExitCode);
    }

    private async Task<ProgramResult> RunAsync(string program, params string[] arguments)
    {
        var start = new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true, RedirectStandardError = true };
        start.Environment["DH_HOME"] = prepared.Home.Path;
        using var process = Process.Start(start)!;
        var error = process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        string output = await process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        return new ProgramResult(process.ExitCode, output, await error);
    }
}
