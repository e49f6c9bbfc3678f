using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Pool;

/// <summary>
/// What the sandboxes of one pool have in common: the home, template and version, and how they are restored. Its hash names the pool's
/// files, so that who wants something else does not even find the pool. Which snapshot it is of that version is settled with each sandbox.
/// </summary>
internal sealed record PoolKind
{
    /// <summary>What daemon and client say to each other; part of the hash, so that two that would not understand each other do not meet.</summary>
    private const int ProtocolVersion = 1;

    /// <summary>Where the snapshot, the run directories, and perhaps the socket are.</summary>
    public required DhHome Home { get; init; }

    /// <summary>The template.</summary>
    public required string Template { get; init; }

    /// <summary>The engine's version.</summary>
    public required string Version { get; init; }

    /// <summary>How its sandboxes are restored.</summary>
    public required SandboxOptions Options { get; init; }

    /// <summary>The kind of sandbox that a restore with these options makes.</summary>
    /// <param name="snapshot">From what.</param>
    /// <param name="options">How. What isolation is required does not count: it is compared when a sandbox is there.</param>
    public static PoolKind Of(Snapshot snapshot, SandboxOptions options) => new()
    {
        Home = options.Home,
        Template = snapshot.Manifest.Template,
        Version = snapshot.Manifest.Version,
        Options = options,
    };

    /// <summary>The name of the pool's files, without what says which of them it is.</summary>
    public string Name => $"{HashOfHome(Home)}-{Hash(
        $"{ProtocolVersion}", BuildVersion.Text, Template, Version, $"{Options.MemoryPolicy}", $"{Options.Fill}",
        Options.Programs.Firecracker ?? Environment.GetEnvironmentVariable("DH_FIRECRACKER") ?? "", Options.Programs.Jailer ?? Environment.GetEnvironmentVariable("DH_JAILER") ?? "")}";

    /// <summary>What the names of a home's pools begin with.</summary>
    /// <param name="home">The home.</param>
    public static string HashOfHome(DhHome home) => Hash(home.Path);

    private static string Hash(params ReadOnlySpan<string> parts)
    {
        byte[] hash = new byte[sizeof(ulong)];
        BinaryPrimitives.WriteUInt64BigEndian(hash, XxHash3.HashToUInt64(Encoding.UTF8.GetBytes(string.Join('\0', parts))));
        return Convert.ToHexStringLower(hash);
    }
}
