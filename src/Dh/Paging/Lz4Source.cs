using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>A snapshot's memory in LZ4 blocks: each reader decodes what it is asked for, and checks it before.</summary>
public sealed class Lz4Source : IMemorySource
{
    private const int ReadAheadPiece = 1 << 20;

    private readonly SafeFileHandle _file;
    private readonly Lz4MemoryFile _tables;

    private Lz4Source(string path, SafeFileHandle file, Lz4MemoryFile tables)
    {
        Path = path;
        _file = file;
        _tables = tables;
    }

    /// <inheritdoc/>
    public string Path { get; }

    /// <inheritdoc/>
    public long Length => _tables.MemoryLength;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> DataExtents => _tables.DataExtents;

    /// <inheritdoc/>
    public IReadOnlyList<FileExtent> PrefetchExtents => [];

    /// <summary>Opens a compressed memory file and checks its tables.</summary>
    /// <param name="path">The file.</param>
    /// <exception cref="PageServerException">It is missing, cut, damaged, or no compressed memory.</exception>
    public static Lz4Source Open(string path)
    {
        SafeFileHandle? file = null;
        try
        {
            file = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.Read | FileShare.Delete);
            return new Lz4Source(path, file, Lz4MemoryFile.Read(path, file));
        }
        catch (Exception e)
        {
            file?.Dispose();
            throw e is IOException or UnauthorizedAccessException ? Lz4MemoryFile.Damaged(path, e.Message.TrimEnd('.'), e) : e;
        }
    }

    /// <inheritdoc/>
    IMemoryReader IMemorySource.OpenReader() => OpenReader();

    /// <summary>Reads the file in sequence, which brings it into the page cache.</summary>
    /// <param name="enough">Asked before every piece.</param>
    public void ReadAhead(Func<bool> enough)
    {
        ArgumentNullException.ThrowIfNull(enough);
        byte[] buffer = new byte[ReadAheadPiece];
        try
        {
            for (long at = 0; !enough() && RandomAccess.Read(_file, buffer, at) is > 0 and int read;)
            {
                at += read;
            }
        }
        catch (IOException)
        {
            // The worker that needs what could not be read says so.
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _file.Dispose();

    /// <summary>Opens a way to the contents for one thread.</summary>
    internal Lz4Reader OpenReader() => new(Path, _file, _tables);
}
