using Dh.Linux;

namespace Dh.Vmm;

/// <summary>
/// Run directories whose launcher is dead, after a power cut or when the launcher itself was killed: nobody holds their lock. An age
/// proves nothing; the lock does.
/// </summary>
internal static class StaleRunDirectories
{
    private const string LockName = ".lock";

    /// <summary>Removes them. Launchers hold the parent's lock shared while they make a directory and lock it.</summary>
    /// <param name="parent">The directory that holds the run directories.</param>
    /// <returns>Whether all that could be removed was; not, for example, while a machine whose launcher was killed just now is still ending.</returns>
    public static bool Remove(string parent)
    {
        var directories = Directory.GetDirectories(parent);
        if (directories.Length == 0)
        {
            return true;
        }

        using var sweep = FileLock.TryAcquire(Path.Combine(parent, LockName));
        if (sweep is null)
        {
            return false; // a launcher is at work, or another sweep
        }

        bool complete = true;
        foreach (string directory in directories)
        {
            try
            {
                using var dead = FileLock.TryAcquireDirectory(directory);
                if (dead is not null)
                {
                    Cgroups.Host.EndAbandoned(Path.GetFileName(directory));
                    Directory.Delete(directory, recursive: true);
                }
            }
            catch (Exception e) when (e is LinuxException or IOException)
            {
                // Its launcher removed it in between, or its machine is still ending.
                complete = false;
            }
        }

        return complete;
    }
}
