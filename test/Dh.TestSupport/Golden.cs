using System.Runtime.CompilerServices;

namespace Dh.TestSupport;

/// <summary>
/// Golden files: the expected text lies in `golden/NAME` beside the test's source file and is reviewed like code.
/// `DH_UPDATE_GOLDEN=1` writes what the tests got.
/// </summary>
public static class Golden
{
    private const string UpdateVariable = "DH_UPDATE_GOLDEN";

    /// <summary>Compares a text with its golden file.</summary>
    /// <param name="actual">What the test got.</param>
    /// <param name="name">The golden file's name, with its extension.</param>
    /// <param name="sourceFile">The test's source file; the compiler gives it.</param>
    /// <exception cref="GoldenMismatchException">They differ, or there is no golden file.</exception>
    public static void Verify(string actual, string name, [CallerFilePath] string sourceFile = "")
    {
        ArgumentNullException.ThrowIfNull(actual);
        // The build maps the tree's path to /_/ (Directory.Build.props, PathMap).
        string source = sourceFile.StartsWith("/_/", StringComparison.Ordinal) ? Repository.PathOf(sourceFile[3..]) : sourceFile;
        string path = Path.Combine(Path.GetDirectoryName(source)!, "golden", name);
        string wanted = actual.EndsWith('\n') ? actual : actual + "\n";
        if (Environment.GetEnvironmentVariable(UpdateVariable) == "1")
        {
            Directory.CreateDirectory(Path.GetDirectoryName(path)!);
            File.WriteAllText(path, wanted);
            return;
        }

        if (!File.Exists(path))
        {
            throw new GoldenMismatchException($"There is no golden file {path}. Write it with {UpdateVariable}=1. The test got:\n{wanted}");
        }

        string expected = File.ReadAllText(path);
        if (expected != wanted)
        {
            throw new GoldenMismatchException($"{path} differs from line {FirstDifference(expected, wanted)} on. Accept with {UpdateVariable}=1. The test got:\n{wanted}");
        }
    }

    private static int FirstDifference(string first, string second)
    {
        string[] a = first.Split('\n'), b = second.Split('\n');
        int line = 0;
        while (line < a.Length && line < b.Length && a[line] == b[line])
        {
            line++;
        }

        return line + 1;
    }
}

/// <summary>A text differs from its golden file.</summary>
/// <param name="message">Which file, from which line on, and what to do.</param>
public sealed class GoldenMismatchException(string message) : Exception(message);
