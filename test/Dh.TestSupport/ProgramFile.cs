using System.Diagnostics;

namespace Dh.TestSupport;

/// <summary>Copies of programs that are run where they are copied to.</summary>
public static class ProgramFile
{
    /// <summary>
    /// Copies a program. Not in this process: a child that is forked by another test while the copy is written has it open for writing, too,
    /// until it has become its own program, and whoever runs the copy meanwhile is told ETXTBSY (execve(2)).
    /// </summary>
    /// <param name="from">The program.</param>
    /// <param name="to">The copy, which is not there yet.</param>
    public static void Copy(string from, string to)
    {
        using var copy = Process.Start("cp", [from, to]);
        copy.WaitForExit();
        if (copy.ExitCode != 0)
        {
            throw new IOException($"`cp {from} {to}` ended with {copy.ExitCode}");
        }
    }
}
