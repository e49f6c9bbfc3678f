namespace Dh;

/// <summary>Where snapshots, images and run directories are kept.</summary>
/// <param name="path">The directory; made when something is kept in it.</param>
public sealed class DhHome(string path)
{
    /// <summary>What <c>DH_HOME</c> names; <c>~/.dh</c> without it.</summary>
    public static DhHome Default { get; } = new(
        Environment.GetEnvironmentVariable("DH_HOME") is { Length: > 0 } home
            ? home
            : System.IO.Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".dh"));

    /// <summary>The directory, absolute.</summary>
    public string Path { get; } = System.IO.Path.GetFullPath(path);

    /// <summary>Snapshots, by template and version.</summary>
    public string SnapshotsDirectory => System.IO.Path.Combine(Path, "vm", "snapshots");

    /// <summary>Images, by template and hash.</summary>
    public string ImagesDirectory => System.IO.Path.Combine(Path, "vm", "images");

    /// <summary>One directory for each machine that lives.</summary>
    public string RunDirectory => System.IO.Path.Combine(Path, "run");

    /// <summary>What can be found out again: verdicts on this host, by boot.</summary>
    public string CacheDirectory => System.IO.Path.Combine(Path, "cache");

    /// <summary>The user's settings.</summary>
    public string ConfigPath => System.IO.Path.Combine(Path, "config.toml");

    /// <summary>Makes a directory that only this user can enter, and what is missing above it likewise.</summary>
    /// <param name="directory">One of the directories above.</param>
    /// <exception cref="DhException">It cannot be made.</exception>
    public static string EnsurePrivate(string directory)
    {
        try
        {
            if (!OperatingSystem.IsWindows())
            {
                // Those above it that are missing would get the usual mode, which lets others list them.
                if (System.IO.Path.GetDirectoryName(directory) is { } parent && !Directory.Exists(parent))
                {
                    EnsurePrivate(parent);
                }

                Directory.CreateDirectory(directory, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
            }

            return directory;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new DhException(DhErrorReason.Host, $"Directory {directory} cannot be made: {e.Message}. Set DH_HOME to a directory that you can write to.", e);
        }
    }
}
