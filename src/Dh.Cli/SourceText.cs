using System.Text;
using Dh.Guest;

namespace Dh.Cli;

/// <summary>Where the code comes from that is sent to a guest.</summary>
internal static class SourceText
{
    /// <summary>Code from standard input.</summary>
    /// <exception cref="DhException">It is too large, or not UTF-8.</exception>
    public static string OfStandardInput()
    {
        using var input = Console.OpenStandardInput();
        return Read(input, "The code on standard input");
    }

    /// <summary>A script's text.</summary>
    /// <exception cref="DhException">It is missing, unreadable, too large, or not UTF-8.</exception>
    public static string OfScript(string path)
    {
        try
        {
            using var file = File.OpenRead(path);
            return Read(file, $"The script {path}");
        }
        catch (Exception error) when (error is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new DhException(DhErrorReason.NotFound, $"There is no script {path} (in {Environment.CurrentDirectory}). To run code: dh exec -c CODE");
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new DhException(DhErrorReason.NotFound, Directory.Exists(path) ? $"{path} is a directory, not a script." : $"The script {path} cannot be read.", error);
        }
    }

    private static string Read(Stream stream, string what)
    {
        using var bytes = new MemoryStream();
        var buffer = new byte[64 << 10];
        for (int read; (read = stream.Read(buffer)) > 0;)
        {
            bytes.Write(buffer, 0, read);
            if (bytes.Length > ExecutionRequest.MaxSourceBytes)
            {
                throw new DhException(DhErrorReason.Usage, $"{what} is larger than {ExecutionRequest.MaxSourceBytes >> 20} MiB.");
            }
        }

        ReadOnlySpan<byte> text = bytes.GetBuffer().AsSpan(0, (int)bytes.Length);
        try
        {
            return new UTF8Encoding(false, throwOnInvalidBytes: true).GetString(text.StartsWith(Encoding.UTF8.Preamble) ? text[Encoding.UTF8.Preamble.Length..] : text);
        }
        catch (DecoderFallbackException)
        {
            throw new DhException(DhErrorReason.Usage, $"{what} is not UTF-8.");
        }
    }
}
