using Dh.Linux.Abi;
using Microsoft.Win32.SafeHandles;
using static Dh.Linux.Abi.Constants;

namespace Dh.Linux;

/// <summary>
/// An advisory lock on a file or directory (flock(2)). It belongs to the open file description: it ends when the last descriptor of it is
/// closed, in any way of dying, so a lock that can be taken is proof that nobody alive holds it.
/// </summary>
public sealed class FileLock : IDisposable
{
    private readonly SafeFileHandle _handle;

    private FileLock(SafeFileHandle handle) => _handle = handle;

    /// <summary>Takes the lock on a file, which is made (mode 0600) when it is missing.</summary>
    /// <param name="path">The file.</param>
    /// <param name="shared">Whether others may hold it shared at the same time.</param>
    /// <returns>Null when somebody else holds it.</returns>
    /// <exception cref="LinuxException">The file cannot be opened.</exception>
    public static FileLock? TryAcquire(string path, bool shared = false) => TryAcquire(path, O_RDWR | O_CREAT, shared);

    /// <summary>Takes the lock on a directory. Nothing is made: it may be removed at any time.</summary>
    /// <param name="path">The directory.</param>
    /// <param name="shared">Whether others may hold it shared at the same time.</param>
    /// <returns>Null when somebody else holds it.</returns>
    /// <exception cref="LinuxException">The directory cannot be opened; ENOENT: it is gone.</exception>
    public static FileLock? TryAcquireDirectory(string path, bool shared = false) => TryAcquire(path, O_RDONLY | O_DIRECTORY, shared);

    private static FileLock? TryAcquire(string path, int flags, bool shared)
    {
        var handle = Libc.Open(path, flags | O_CLOEXEC | O_NOFOLLOW, 0b110_000_000);
        if (handle.IsInvalid)
        {
            var error = LinuxException.Last($"open {path}");
            handle.Dispose();
            throw error;
        }

        if (Libc.Flock(handle, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB) == 0)
        {
            return new FileLock(handle);
        }

        var errno = LinuxException.LastErrno;
        handle.Dispose();
        return errno == Errno.EAGAIN ? null : throw new LinuxException($"flock {path}", errno);
    }

    /// <summary>Takes the lock on a file, waiting for it.</summary>
    /// <param name="path">The file, which is made when it is missing.</param>
    /// <param name="shared">Whether others may hold it shared at the same time.</param>
    /// <param name="timeout">At most this long.</param>
    /// <param name="waiting">Called once when somebody else holds it.</param>
    /// <param name="cancellationToken">Ends the wait.</param>
    /// <exception cref="TimeoutException">It was not free in time.</exception>
    /// <exception cref="LinuxException">The file cannot be opened.</exception>
    public static async Task<FileLock> AcquireAsync(string path, bool shared, TimeSpan timeout, Action? waiting, CancellationToken cancellationToken)
    {
        long start = Environment.TickCount64;
        while (true)
        {
            if (TryAcquire(path, shared) is { } acquired)
            {
                return acquired;
            }

            waiting?.Invoke();
            waiting = null;
            if (Environment.TickCount64 - start > timeout.TotalMilliseconds)
            {
                throw new TimeoutException($"{path} is locked by another process and was not free within {timeout.TotalSeconds:0} s.");
            }

            await Task.Delay(50, cancellationToken).ConfigureAwait(false);
        }
    }

    /// <summary>Gives the lock back.</summary>
    public void Dispose() => _handle.Dispose();
}
