using System.Globalization;
using System.Text;

namespace Dh.Snapshots;

/// <summary>A restore that has been.</summary>
/// <param name="At">When it was complete.</param>
/// <param name="Policy">How memory came back.</param>
/// <param name="Time">How long it took until the guest answered.</param>
public sealed record PastRestore(DateTimeOffset At, string Policy, TimeSpan Time);

/// <summary>
/// The last restores of each snapshot, a line for each in a file of the cache: a finished snapshot never changes. Lines are appended whole, so
/// several processes may do so at once. It is for people who look; a run does not fail for it.
/// </summary>
public static class RestoreLog
{
    private const int MaxLength = 16 << 10;
    private const int KeptLines = 100;

    /// <summary>The last restores of a snapshot, the newest first.</summary>
    /// <param name="home">Where the cache is.</param>
    /// <param name="snapshotId">The snapshot.</param>
    /// <param name="count">How many at most.</param>
    public static IReadOnlyList<PastRestore> Read(DhHome home, string snapshotId, int count)
    {
        ArgumentNullException.ThrowIfNull(home);
        ArgumentNullException.ThrowIfNull(snapshotId);
        try
        {
            return [.. File.ReadAllLines(PathOf(home, snapshotId)).Reverse().Select(Parse).OfType<PastRestore>().Take(count)];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return []; // never restored, or not readable
        }
    }

    /// <summary>Adds a restore.</summary>
    /// <param name="home">Where the cache is.</param>
    /// <param name="snapshotId">The snapshot.</param>
    /// <param name="restore">The restore.</param>
    internal static void Append(DhHome home, string snapshotId, PastRestore restore)
    {
        string path = PathOf(home, snapshotId), line = string.Create(CultureInfo.InvariantCulture, $"{restore.At:O} {restore.Policy} {restore.Time.TotalMilliseconds:0.0}\n");
        try
        {
            using (var file = Open(path))
            {
                file.Write(Encoding.ASCII.GetBytes(line));
                if (file.Position <= MaxLength)
                {
                    return;
                }
            }

            // Whoever appends meanwhile loses a line.
            string shorter = $"{path}.{Guid.NewGuid():N}";
            File.WriteAllLines(shorter, File.ReadAllLines(path).TakeLast(KeptLines));
            File.Move(shorter, path, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException or DhException)
        {
            // A full disk is no reason to lose the run.
        }
    }

    /// <summary>Forgets a snapshot.</summary>
    /// <param name="home">Where the cache is.</param>
    /// <param name="snapshotId">The snapshot.</param>
    internal static void Remove(DhHome home, string snapshotId)
    {
        string path = PathOf(home, snapshotId);
        if (File.Exists(path))
        {
            File.Delete(path);
        }
    }

    private static FileStream Open(string path)
    {
        try
        {
            return new FileStream(path, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
        }
        catch (DirectoryNotFoundException)
        {
            _ = DhHome.EnsurePrivate(Path.GetDirectoryName(path)!);
            return new FileStream(path, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
        }
    }

    private static PastRestore? Parse(string line) =>
        line.Split(' ') is [var at, var policy, var milliseconds]
        && DateTimeOffset.TryParseExact(at, "O", CultureInfo.InvariantCulture, DateTimeStyles.AssumeUniversal, out var time)
        && double.TryParse(milliseconds, NumberStyles.Float, CultureInfo.InvariantCulture, out double took)
            ? new PastRestore(time, policy, TimeSpan.FromMilliseconds(took))
            : null;

    private static string PathOf(DhHome home, string snapshotId) => Path.Combine(home.CacheDirectory, "restores", Path.GetFileName(snapshotId));
}
