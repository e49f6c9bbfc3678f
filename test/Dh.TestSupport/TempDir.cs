namespace Dh.TestSupport;

/// <summary>A new directory with mode 0700 that is removed with everything in it.</summary>
public sealed class TempDir : IDisposable
{
    /// <summary>Its absolute path; short, so that a socket's path fits.</summary>
    public string Path { get; } = Directory.CreateTempSubdirectory("dh-test-").FullName;

    /// <summary>A path in it.</summary>
    public string this[string name] => System.IO.Path.Combine(Path, name);

    /// <summary>Writes a text file into it and returns its path.</summary>
    public string Write(string name, string text)
    {
        string path = this[name];
        Directory.CreateDirectory(System.IO.Path.GetDirectoryName(path)!);
        File.WriteAllText(path, text);
        return path;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (Directory.Exists(Path))
        {
            Directory.Delete(Path, recursive: true);
        }
    }
}
