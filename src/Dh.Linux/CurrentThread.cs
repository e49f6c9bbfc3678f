using Dh.Linux.Abi;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>The calling thread, as the kernel's scheduler sees it.</summary>
public static class CurrentThread
{
    private const int LowPriority = 10;

    /// <summary>
    /// Lets others run first, for work in the background (setpriority(2): on Linux a nice value belongs to a thread, and 0 means the calling
    /// one). An aid only.
    /// </summary>
    public static void LowerPriority() => _ = Libc.SetPriority(PRIO_PROCESS, 0, LowPriority);
}
