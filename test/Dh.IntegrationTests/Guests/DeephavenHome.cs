using System.Diagnostics;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>Tests with a Deephaven engine: its preparation alone takes all that two cores give, so that nothing else runs meanwhile.</summary>
[CollectionDefinition(Name, DisableParallelization = true)]
public sealed class DeephavenCollection : ICollectionFixture<DeephavenHome>
{
    public const string Name = "deephaven";
}

/// <summary>
/// A DH_HOME with a snapshot of a real Deephaven engine, prepared once for all tests of a run. Its wheels come from DH_TEST_WHEELHOUSE: a
/// directory of wheels, or one with a `.tar.xz` of them.
/// </summary>
public sealed class DeephavenHome : IAsyncLifetime
{
    public const string Version = "41.1";

    private readonly TempDir _wheels = new();

    /// <summary>Why there is none; null when there is one.</summary>
    public string? Missing { get; private set; }

    public DhProgram Dh { get; } = new(Repository.PathOf("artifacts/test-home-deephaven"));

    /// <summary>The directory of wheels.</summary>
    public string Wheelhouse { get; private set; } = "";

    public async ValueTask InitializeAsync()
    {
        string? given = Environment.GetEnvironmentVariable("DH_TEST_WHEELHOUSE");
        if (string.IsNullOrEmpty(given))
        {
            Missing = "DH_TEST_WHEELHOUSE names no directory with Deephaven's wheels";
            return;
        }

        Wheelhouse = Directory.EnumerateFiles(given, "*.whl").Any() ? given : await UnpackAsync(Directory.EnumerateFiles(given, "*.tar.xz").Single());
        Directory.CreateDirectory(Dh.Home);
        var result = await Dh.RunAsync(
            ["vm", "prepare", "--version", Version, "--wheelhouse", Wheelhouse, "--accel", "tcg", "--force"], timeLimit: TimeSpan.FromMinutes(20));
        Assert.True(result.ExitCode == 0, $"dh vm prepare ended with {result.ExitCode}:\n{result.Output}\n{result.Error}");
    }

    public ValueTask DisposeAsync()
    {
        _wheels.Dispose();
        return ValueTask.CompletedTask;
    }

    private async Task<string> UnpackAsync(string archive)
    {
        using var tar = Process.Start("tar", ["--extract", "--xz", "--file", archive, "--directory", _wheels.Path]);
        using var limit = new CancellationTokenSource(TimeSpan.FromMinutes(5));
        await tar.WaitForExitAsync(limit.Token);
        Assert.Equal(0, tar.ExitCode);
        return Path.GetDirectoryName(Directory.EnumerateFiles(_wheels.Path, "*.whl", SearchOption.AllDirectories).First())!;
    }
}
