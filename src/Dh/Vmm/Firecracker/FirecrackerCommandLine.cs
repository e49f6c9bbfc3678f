namespace Dh.Vmm.Firecracker;

/// <summary>Firecracker's arguments. What a machine is made of goes through the API.</summary>
internal static class FirecrackerCommandLine
{
    /// <summary>The arguments for a machine that is driven through the API, without the program.</summary>
    /// <param name="id">The instance's name in its log lines; null under the jailer, which gives it.</param>
    public static IReadOnlyList<string> Build(string? id) =>
        [.. id is null ? (string[])[] : ["--id", id], "--api-sock", FirecrackerFiles.ApiSocket];

    /// <summary>The arguments for a machine that boots from a file and ends: the probe.</summary>
    /// <param name="configurationPath">The file.</param>
    public static IReadOnlyList<string> BuildWithoutApi(string configurationPath) => ["--no-api", "--config-file", configurationPath];
}
