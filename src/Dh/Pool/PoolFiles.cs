using Dh.Linux;

namespace Dh.Pool;

/// <summary>
/// Where a user's pools are found: sockets, locks and logs in <c>$XDG_RUNTIME_DIR/dh</c>, or in <c>$DH_HOME/pool</c> where there is none.
/// Only the user can enter either.
/// </summary>
internal static class PoolFiles
{
    private const string SocketSuffix = ".sock";
    private const string LogSuffix = ".log";
    private const string LockSuffix = ".lock";

    /// <summary>The directory; it may not be there yet.</summary>
    /// <param name="home">The home.</param>
    public static string DirectoryOf(DhHome home) => Environment.GetEnvironmentVariable("XDG_RUNTIME_DIR") is { Length: > 0 } runtime && Directory.Exists(runtime)
        ? Path.Combine(runtime, "dh")
        : Path.Combine(home.Path, "pool");

    /// <summary>The socket that a pool listens on.</summary>
    /// <param name="kind">The pool's.</param>
    public static string SocketOf(PoolKind kind) => PathOf(kind, SocketSuffix);

    /// <summary>What a pool's daemon has to say.</summary>
    /// <param name="kind">The pool's.</param>
    public static string LogOf(PoolKind kind) => PathOf(kind, LogSuffix);

    /// <summary>The file that a pool's daemon holds locked as long as it lives; it stays, or two daemons could lock two files of this name.</summary>
    /// <param name="kind">The pool's.</param>
    public static string LockOf(PoolKind kind) => PathOf(kind, LockSuffix);

    /// <summary>The sockets of a home's pools, whether somebody still listens or not.</summary>
    /// <param name="home">The home.</param>
    public static IReadOnlyList<string> Sockets(DhHome home) => Find(home, SocketSuffix);

    /// <summary>The logs of a home's pools, also of those that have ended.</summary>
    /// <param name="home">The home.</param>
    public static IReadOnlyList<string> Logs(DhHome home) => Find(home, LogSuffix);

    /// <summary>The lock of the daemon that listens on a socket.</summary>
    /// <param name="socketPath">The socket.</param>
    public static string LockBeside(string socketPath) => socketPath[..^SocketSuffix.Length] + LockSuffix;

    /// <summary>Uses a path that is as short as a socket's must be, however deep the directory is.</summary>
    /// <param name="path">The path.</param>
    /// <param name="use">Takes it.</param>
    public static void WithShortPath(string path, Action<string> use)
    {
        if (System.Text.Encoding.UTF8.GetByteCount(path) <= UnixSockets.MaxPathLength)
        {
            use(path);
            return;
        }

        using var directory = Files.OpenDirectory(Path.GetDirectoryName(path)!);
        use($"/proc/self/fd/{directory.DangerousGetHandle()}/{Path.GetFileName(path)}");
    }

    private static string[] Find(DhHome home, string suffix)
    {
        string directory = DirectoryOf(home);
        return Directory.Exists(directory) ? [.. Directory.EnumerateFileSystemEntries(directory, $"{PoolKind.HashOfHome(home)}-*{suffix}").Order(StringComparer.Ordinal)] : [];
    }

    private static string PathOf(PoolKind kind, string suffix) => Path.Combine(DirectoryOf(kind.Home), kind.Name + suffix);
}
