using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>
/// Writes pieces of the memory file into guest memory that its VMM has not mapped yet (<see cref="PageServerOptions.Backing"/>), on a thread of
/// its own. One thread only: a VMM that starts needs a core, too. A VMM may read a page as soon as it is there, so a page must not be there
/// before its contents are: pwrite(2) from memory that is not mapped yet leaves zeros in the page until it has faulted that memory in
/// (mm/filemap.c, generic_perform_write, since Linux 6.16). Therefore what is written is mapped first.
/// </summary>
internal sealed class BackingFill
{
    /// <summary>What the end has to wait for at most: a tenth of a millisecond.</summary>
    private const ulong PieceLength = 128 << 10;

    private readonly IMemorySource _source;
    private readonly SafeFileHandle _backing;
    private readonly List<CopyPiece> _pieces;
    private readonly Thread _thread;
    private volatile bool _stop;
    private int _written;
    private string? _warning;

    /// <summary>Starts the thread.</summary>
    /// <param name="source">Where from.</param>
    /// <param name="extents">What, in this order.</param>
    /// <param name="backing">Where to.</param>
    public BackingFill(IMemorySource source, IReadOnlyList<FileExtent> extents, SafeFileHandle backing)
    {
        _source = source;
        _backing = backing;
        // The layout of the VMM's addresses is not known yet, and does not matter: offsets in the memory file are those in the backing.
        _pieces = PopulationPlan.Of([new GuestRegion(0, (ulong)source.Length, 0, GuestRegion.NormalPageSize)], extents, PieceLength);
        _thread = new Thread(Run) { IsBackground = true, Name = "dh page fill" };
        _thread.Start();
    }

    /// <summary>Why the working set could not be used; null when all is well. Good after <see cref="Stop"/>.</summary>
    public string? Warning => _warning;

    /// <summary>Ends the writing, and waits for its end.</summary>
    /// <returns>The pieces that are in place; their addresses say nothing.</returns>
    public IReadOnlyList<CopyPiece> Stop()
    {
        _stop = true;
        _thread.Join();
        return _pieces[.._written];
    }

    private void Run()
    {
        try
        {
            using var reader = _source.OpenReader();
            for (; _written < _pieces.Count && !_stop; _written++)
            {
                var piece = _pieces[_written];
                for (ulong done = 0, length; done < piece.Length; done += length)
                {
                    length = piece.Length - done;
                    nuint from = reader.ReadUndamaged(piece.Offset + (long)done, ref length, ref _warning);
                    if (!MemoryMapping.TryPopulate(from, length))
                    {
                        return; // as when it cannot be written, below
                    }

                    MemoryFile.Write(_backing, piece.Offset + (long)done, from, length);
                }
            }
        }
        catch (Exception e) when (e is PageServerException or LinuxException)
        {
            // What is not in place is copied after the handshake, and that says what is wrong.
        }
    }
}
