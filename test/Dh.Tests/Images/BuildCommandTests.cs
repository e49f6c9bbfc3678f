using System.Diagnostics;
using System.Runtime.Versioning;
using Dh.Images;

namespace Dh.Tests.Images;

[SupportedOSPlatform("linux")]
public sealed class BuildCommandTests
{
    [Fact]
    public async Task The_output_is_given_back_and_every_line_is_told()
    {
        var lines = new List<string>();
        var command = BuildCommand.Of("sh", "-c", "echo one; echo two") with { OnLine = lines.Add };

        Assert.Equal("one\ntwo\n", await command.RunAsync(TestContext.Current.CancellationToken));
        Assert.Equal(["one", "two"], lines);
    }

    [Fact]
    public async Task A_failure_names_the_command_the_exit_code_and_the_last_lines()
    {
        var command = BuildCommand.Of("sh", "-c", "for i in $(seq 20); do echo line $i; done; exit 3");

        var error = await Assert.ThrowsAsync<BuildCommandException>(() => command.RunAsync(TestContext.Current.CancellationToken));

        string expected = string.Join('\n', Enumerable.Range(6, 15).Select(number => $"  line {number}"));
        Assert.Equal($"sh -c for i in $(seq 20); do echo line $i; done; exit 3 ended with exit code 3. Its last lines:\n{expected}", error.Message);
        Assert.Equal(DhErrorReason.Image, error.Reason);
    }

    [Fact]
    public async Task A_silent_failure_is_said_to_be_one()
    {
        var error = await Assert.ThrowsAsync<BuildCommandException>(() => BuildCommand.Of("false").RunAsync(TestContext.Current.CancellationToken));

        Assert.Equal("false ended with exit code 1, and said nothing.", error.Message);
    }

    [Theory]
    [InlineData("dh-no-such-program", "dh-no-such-program is not installed: run `make setup` or `apt-get install dh-no-such-program`.")]
    public async Task A_program_that_is_missing_is_named_with_its_package(string program, string message)
    {
        var error = await Assert.ThrowsAsync<DhException>(() => BuildCommand.Of(program).RunAsync(TestContext.Current.CancellationToken));

        Assert.Equal(message, error.Message);
        Assert.Equal(DhErrorReason.Host, error.Reason);
    }

    [Fact(Timeout = 30_000)]
    public async Task At_its_time_limit_it_is_killed_with_its_children()
    {
        var start = Stopwatch.StartNew();
        var command = BuildCommand.Of("sh", "-c", "echo begun; sleep 60 & wait") with { Timeout = TimeSpan.FromSeconds(0.5) };

        var error = await Assert.ThrowsAsync<BuildCommandException>(() => command.RunAsync(TestContext.Current.CancellationToken));

        Assert.StartsWith("sh -c echo begun; sleep 60 & wait was killed: it had not ended after 0 minutes", error.Message, StringComparison.Ordinal);
        Assert.Equal(["begun"], error.LastLines);
        Assert.InRange(start.Elapsed.TotalSeconds, 0, 20); // the pipes are closed: nobody is left who holds them
    }

    [Fact(Timeout = 30_000)]
    public async Task Cancelled_it_is_killed_with_its_children()
    {
        using var cancellation = CancellationTokenSource.CreateLinkedTokenSource(TestContext.Current.CancellationToken);
        cancellation.CancelAfter(TimeSpan.FromSeconds(0.3));

        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => BuildCommand.Of("sh", "-c", "sleep 60 & wait").RunAsync(cancellation.Token));
    }

    [Fact]
    public async Task It_gets_a_small_environment_of_its_own()
    {
        Environment.SetEnvironmentVariable("DH_TEST_SECRET", "x");
        var command = BuildCommand.Of("env").With("ADDED", "1");

        string small = await command.RunAsync(TestContext.Current.CancellationToken);
        string whole = await (command with { WithUserEnvironment = true }).RunAsync(TestContext.Current.CancellationToken);

        Assert.Contains("ADDED=1\n", small, StringComparison.Ordinal);
        Assert.Contains($"PATH={BuildCommand.SearchPath}\n", small, StringComparison.Ordinal);
        Assert.DoesNotContain("DH_TEST_SECRET", small, StringComparison.Ordinal);
        Assert.Contains("DH_TEST_SECRET=x\n", whole, StringComparison.Ordinal);
        Assert.Contains($"PATH={BuildCommand.SearchPath}\n", whole, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Of_two_things_at_once_the_first_failure_is_told_and_the_other_is_cancelled()
    {
        var error = await Assert.ThrowsAsync<InvalidOperationException>(() => ImageBuild.TogetherAsync(
            token => Task.Delay(Timeout.Infinite, token),
            _ => throw new InvalidOperationException("first"),
            TestContext.Current.CancellationToken));

        Assert.Equal("first", error.Message);
    }
}
