using System.Diagnostics;

namespace Dh.TestSupport;

/// <summary>Copies of programs that are run where they are copied to.</summary>
public static class ProgramFile
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(30);

    /// <summary>
    /// Copies a program. Not in this process: a child that is forked by another test while the copy is written has it open for writing, too,
    /// until it has become its own program, and whoever runs the copy meanwhile is told ETXTBSY (execve(2)).
    /// </summary>
    /// <param name="from">The program.</param>
    /// <param name="to">The copy, which is not there yet.</param>
    public static void Copy(string from, string to)
    {
        using var copy = Process.Start("cp", [from, to]);
        if (!copy.WaitForExit(Limit))
        {
            copy.Kill();
            throw new TimeoutException($"`cp {from} {to}` took more than {Limit.TotalSeconds:0} s");
        }

        if (copy.ExitCode != 0)
        {
            throw new IOException($"`cp {from} {to}` ended with {copy.ExitCode}");
        }
    }
}
