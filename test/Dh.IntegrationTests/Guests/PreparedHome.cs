using Dh.IntegrationTests.Guests;
using Dh.TestSupport;

[assembly: AssemblyFixture(typeof(PreparedHome))]

namespace Dh.IntegrationTests.Guests;

/// <summary>A DH_HOME with a snapshot of the python template, prepared once for all tests of a run by the program itself.</summary>
public sealed class PreparedHome : IAsyncLifetime
{
    /// <summary>Images stay from run to run; the snapshot is made anew.</summary>
    public DhProgram Dh { get; } = new(Repository.PathOf("artifacts/test-home"));

    public DhHome Home => new(Dh.Home);

    public async ValueTask InitializeAsync()
    {
        Directory.CreateDirectory(Dh.Home);
        var result = await Dh.RunAsync(["vm", "prepare", "--force", "--vmm", "qemu"], timeLimit: TimeSpan.FromMinutes(10));
        Assert.True(result.ExitCode == 0, $"dh vm prepare ended with {result.ExitCode}:\n{result.Output}\n{result.Error}");
    }

    public ValueTask DisposeAsync() => ValueTask.CompletedTask;
}
