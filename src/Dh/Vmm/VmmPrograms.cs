namespace Dh.Vmm;

/// <summary>Which programs machines are run with, where that is chosen; what is not set is looked for.</summary>
public sealed record VmmPrograms
{
    /// <summary>The variable that names the jailer.</summary>
    public const string JailerVariable = "DH_JAILER";

    /// <summary>What the environment says.</summary>
    public static VmmPrograms Default { get; } = new();

    /// <summary>Firecracker. Default: what <c>DH_FIRECRACKER</c> names, else the first <c>firecracker</c> in <c>PATH</c>.</summary>
    public string? Firecracker { get; init; }

    /// <summary>
    /// Firecracker's jailer, of the same version; every Firecracker is run by it then, which takes root and cgroup v2. Default: what
    /// <c>DH_JAILER</c> names, else none.
    /// </summary>
    public string? Jailer { get; init; }
}
