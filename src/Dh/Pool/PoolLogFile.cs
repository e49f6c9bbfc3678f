using System.Text;

namespace Dh.Pool;

/// <summary>A pool's log file, which is begun anew when it has grown long; each line goes elsewhere, too.</summary>
/// <param name="path">The file.</param>
/// <param name="say">Where lines go besides.</param>
internal sealed class PoolLogFile(string path, Action<string> say)
{
    private const long MaxBytes = 4 << 20;

    /// <summary>Adds a line.</summary>
    /// <param name="line">The line, without its end.</param>
    public void Write(string line)
    {
        say(line);
        try
        {
            using var file = new FileStream(path, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
            if (file.Length > MaxBytes)
            {
                file.SetLength(0);
            }

            file.Write(Encoding.UTF8.GetBytes(line + "\n"));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // A full disk is no reason to end the pool.
        }
    }
}
