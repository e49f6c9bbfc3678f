using Dh.Linux;
using Dh.Sandboxes;
using Dh.TestSupport;
using PublicApiGenerator;

namespace Dh.Tests;

/// <summary>The libraries' public API is reviewed in the diff of a golden file.</summary>
public sealed class PublicApiTests
{
    [Fact]
    public void The_public_API_of_Dh_is_the_golden_files() => Golden.Verify(typeof(Sandbox).Assembly.GeneratePublicApi(Options), "Dh.txt");

    [Fact]
    public void The_public_API_of_Dh_Linux_is_the_golden_files() => Golden.Verify(typeof(Userfaultfd).Assembly.GeneratePublicApi(Options), "Dh.Linux.txt");

    private static ApiGeneratorOptions Options => new() { IncludeAssemblyAttributes = false };
}
