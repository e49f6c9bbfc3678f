using System.Diagnostics;
using System.Globalization;

namespace Dh.IntegrationTests.Guests;

/// <summary>What /proc knows of processes; of one that has just ended, nothing.</summary>
internal static class Processes
{
    private static readonly TimeSpan EndTimeLimit = TimeSpan.FromSeconds(60);

    public static IEnumerable<int> All() => Directory.EnumerateDirectories("/proc")
        .Select(directory => int.TryParse(Path.GetFileName(directory), CultureInfo.InvariantCulture, out int pid) ? pid : 0)
        .Where(pid => pid > 0);

    public static string CommandLine(int pid) => Read(pid, "cmdline");

    public static string WorkingDirectory(int pid)
    {
        try
        {
            return new FileInfo($"/proc/{pid}/cwd").LinkTarget ?? "";
        }
        catch (IOException)
        {
            return "";
        }
    }

    /// <summary>Memory that is the process's alone, in KiB: what it maps of files is not.</summary>
    public static long AnonymousKib(int pid) => Read(pid, "status").Split('\n').FirstOrDefault(line => line.StartsWith("RssAnon:", StringComparison.Ordinal)) is { } line
        ? long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture)
        : 0;

    /// <summary>Waits for a descendant whose program's name begins so.</summary>
    public static async Task<int> WaitForDescendantAsync(int ancestor, string name, CancellationToken cancellationToken)
    {
        while (true)
        {
            if (All().FirstOrDefault(pid => Name(pid).StartsWith(name, StringComparison.Ordinal) && IsDescendant(pid, ancestor)) is > 0 and var found)
            {
                return found;
            }

            await Task.Delay(2, cancellationToken);
        }
    }

    public static async Task SignalAsync(int pid, string signal)
    {
        using var kill = Process.Start("/bin/kill", [$"-{signal}", pid.ToString(CultureInfo.InvariantCulture)]);
        await kill.WaitForExitAsync();
    }

    /// <summary>Sends a signal that is to end a process, and waits for its end; one that goes on (it was started with the signal ignored) is killed.</summary>
    /// <returns>Its exit code.</returns>
    /// <exception cref="TimeoutException">It went on.</exception>
    public static async Task<int> EndAsync(Process process, string signal)
    {
        await SignalAsync(process.Id, signal);
        using var limit = new CancellationTokenSource(EndTimeLimit);
        try
        {
            await process.WaitForExitAsync(limit.Token);
            return process.ExitCode;
        }
        catch (OperationCanceledException e)
        {
            process.Kill();
            throw new TimeoutException($"Process {process.Id} went on for {EndTimeLimit.TotalSeconds:0} s after SIG{signal}.", e);
        }
    }

    private static bool IsDescendant(int pid, int ancestor)
    {
        for (int at = pid; at > 1; at = Parent(at))
        {
            if (at == ancestor)
            {
                return true;
            }
        }

        return false;
    }

    // proc_pid_stat(5): the name stands in parentheses, and may hold any.
    private static string Name(int pid) => Read(pid, "stat") is { Length: > 0 } stat ? stat[(stat.IndexOf('(', StringComparison.Ordinal) + 1)..stat.LastIndexOf(')')] : "";

    private static int Parent(int pid) =>
        Read(pid, "stat") is { Length: > 0 } stat ? int.Parse(stat[(stat.LastIndexOf(')') + 2)..].Split(' ')[1], CultureInfo.InvariantCulture) : 0;

    private static string Read(int pid, string name)
    {
        try
        {
            return File.ReadAllText($"/proc/{pid}/{name}");
        }
        catch (IOException)
        {
            return "";
        }
    }
}
