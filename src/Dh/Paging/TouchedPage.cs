namespace Dh.Paging;

/// <summary>A page of the memory file that a guest touched.</summary>
/// <param name="Offset">Its offset in the memory file.</param>
/// <param name="IsWrite">Whether the first touch was a write.</param>
public readonly record struct TouchedPage(long Offset, bool IsWrite);
