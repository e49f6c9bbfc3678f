using System.Globalization;

namespace Dh.Vmm.Firecracker;

/// <summary>
/// Firecracker's own system-call filters. It installs them before guest code runs, one for each kind of thread (firecracker: docs/seccomp.md), unless it was
/// started with <c>--no-seccomp</c> or built with a filter of nothing: neither shows in its answers, so the kernel is asked.
/// </summary>
internal static class FirecrackerFilters
{
    private const string Mode = "Seccomp:";
    private const string Filtered = "2"; // SECCOMP_MODE_FILTER

    /// <summary>Looks at every thread (proc_pid_status(5), <c>Seccomp</c>).</summary>
    /// <param name="processId">A Firecracker that has loaded its snapshot: all its threads are there.</param>
    public static CageLayer Look(int processId)
    {
        string tasks = string.Create(CultureInfo.InvariantCulture, $"/proc/{processId}/task");
        try
        {
            string[] threads = Directory.GetDirectories(tasks);
            string[] open = [.. threads.Where(thread => !IsFiltered(thread)).Select(thread => Untrusted.OneLine(File.ReadAllText(Path.Combine(thread, "comm")).Trim()))];
            return open.Length == 0 && threads.Length > 0
                ? new CageLayer(CageLayer.SystemCalls, true, null)
                : new CageLayer(CageLayer.SystemCalls, false, $"Firecracker's threads without a filter: {string.Join(", ", open)}; it was built without filters, or started with --no-seccomp");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return new CageLayer(CageLayer.SystemCalls, false, $"{tasks} cannot be read: {e.Message}");
        }
    }

    private static bool IsFiltered(string thread) =>
        File.ReadLines(Path.Combine(thread, "status")).FirstOrDefault(line => line.StartsWith(Mode, StringComparison.Ordinal))?[Mode.Length..].Trim() == Filtered;
}
