using System.ComponentModel;
using System.Diagnostics;
using System.Globalization;
using System.IO.Hashing;
using System.Text;

namespace Dh.Vmm;

/// <summary>A VMM's program on this host: where it is, what it says of itself, and how to tell that it was replaced.</summary>
internal static class HostProgram
{
    private static readonly TimeSpan TimeLimit = TimeSpan.FromSeconds(10);

    /// <summary>Finds a program: a chosen one, else the first in <c>PATH</c>.</summary>
    /// <param name="chosen">A path; null or empty for none.</param>
    /// <param name="chosenBy">Who names it, for the message: an option or a variable.</param>
    /// <param name="name">Its name in <c>PATH</c>.</param>
    /// <returns>Its absolute path; null when none is chosen and none is in <c>PATH</c>.</returns>
    /// <exception cref="DhException">The chosen one does not exist.</exception>
    public static string? Find(string? chosen, string chosenBy, string name)
    {
        if (chosen is { Length: > 0 })
        {
            return File.Exists(chosen) ? Path.GetFullPath(chosen) : throw new DhException(DhErrorReason.Host, $"{chosenBy} names {chosen}, which does not exist.");
        }

        return (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries)
            .Select(directory => Path.GetFullPath(name, Path.GetFullPath(directory)))
            .FirstOrDefault(File.Exists);
    }

    /// <summary>A hash of path, length and time of change: another one when the program was replaced.</summary>
    /// <param name="path">The program.</param>
    public static string Identity(string path)
    {
        // By descriptor: the program, and not a link to it, is what changes.
        using var program = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
        string identity = string.Create(CultureInfo.InvariantCulture, $"{path}\n{RandomAccess.GetLength(program)}\n{File.GetLastWriteTimeUtc(program).Ticks}");
        return Convert.ToHexStringLower(XxHash128.Hash(Encoding.UTF8.GetBytes(identity)));
    }

    /// <summary>Runs a program for what it prints.</summary>
    /// <param name="name">Its name, for the message.</param>
    /// <param name="path">The program.</param>
    /// <param name="argument">Its argument.</param>
    /// <param name="advice">What to do when it cannot be run.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>Standard output, then standard error.</returns>
    /// <exception cref="DhException">It cannot be run, or does not end within 10 s.</exception>
    public static async Task<string> AskAsync(string name, string path, string argument, string advice, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(TimeLimit);
        Process? process = null;
        try
        {
            process = Process.Start(new ProcessStartInfo(path, [argument]) { RedirectStandardOutput = true, RedirectStandardError = true })!;
            var error = process.StandardError.ReadToEndAsync(limit.Token);
            string output = await process.StandardOutput.ReadToEndAsync(limit.Token).ConfigureAwait(false) + await error.ConfigureAwait(false);
            await process.WaitForExitAsync(limit.Token).ConfigureAwait(false);
            return output;
        }
        catch (Win32Exception e)
        {
            throw new DhException(DhErrorReason.Host, $"{name} {path} cannot be run. {advice}", e);
        }
        catch (OperationCanceledException e) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.Host, $"`{path} {argument}` did not end within {TimeLimit.TotalSeconds:0} s. {advice}", e);
        }
        finally
        {
            if (process is { HasExited: false })
            {
                process.Kill();
            }

            process?.Dispose();
        }
    }
}
