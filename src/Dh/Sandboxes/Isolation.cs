using Dh.Vmm;

namespace Dh.Sandboxes;

/// <summary>What stands between the guest's code and the host, weakest first (docs/design.md, "Isolation").</summary>
public enum IsolationClass
{
    /// <summary>QEMU emulates, and its cage is not complete: no security boundary.</summary>
    Emulated,

    /// <summary>Hardware virtualization, and the VMM's cage is not complete.</summary>
    Hardware,

    /// <summary>QEMU emulates inside a complete cage.</summary>
    EmulatedCage,

    /// <summary>Hardware virtualization, the VMM inside a complete cage.</summary>
    HardwareCage,

    /// <summary>Firecracker under its jailer.</summary>
    HardwareJail,
}

/// <summary>Names of the classes, as results and options have them.</summary>
public static class Isolation
{
    private static readonly string[] Names = ["emulated", "hardware", "emulated+cage", "hardware+cage", "hardware+jail"];

    /// <summary>The names of all classes, weakest first.</summary>
    public static IReadOnlyList<string> AllNames => Names;

    /// <summary>The name of a class.</summary>
    /// <param name="isolation">The class.</param>
    public static string Name(IsolationClass isolation) => Names[(int)isolation];

    /// <summary>The class of a name.</summary>
    /// <param name="name">The name.</param>
    /// <param name="isolation">The class.</param>
    public static bool TryParse(string name, out IsolationClass isolation)
    {
        int index = Array.IndexOf(Names, name);
        isolation = (IsolationClass)Math.Max(index, 0);
        return index >= 0;
    }

    /// <summary>What a machine runs in.</summary>
    /// <param name="accelerator">How its code is executed.</param>
    /// <param name="jailed">Whether its VMM is Firecracker under its jailer.</param>
    /// <param name="caged">Whether its VMM is in a complete cage.</param>
    public static IsolationClass Of(Accelerator accelerator, bool jailed = false, bool caged = false) => accelerator == Accelerator.Kvm
        ? jailed ? IsolationClass.HardwareJail : caged ? IsolationClass.HardwareCage : IsolationClass.Hardware
        : caged ? IsolationClass.EmulatedCage : IsolationClass.Emulated;

    /// <summary>Whether a cage has all that it must have.</summary>
    /// <param name="layers">Its layers; none where there is no cage.</param>
    public static bool IsCaged(IReadOnlyList<CageLayer> layers)
    {
        ArgumentNullException.ThrowIfNull(layers);
        return layers.Count > 0 && layers.All(layer => layer.IsOn || !layer.IsRequired);
    }
}
