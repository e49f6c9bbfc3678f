namespace Dh.Paging;

/// <summary>One region of guest memory, as a VMM announces it in the handshake (Firecracker, docs/snapshotting/handling-page-faults-on-snapshot-resume.md).</summary>
/// <param name="BaseHostVirtAddr">Where it starts in the VMM's address space.</param>
/// <param name="Size">Its length in bytes.</param>
/// <param name="Offset">Where its contents start in the memory file, in bytes.</param>
/// <param name="PageSize">The size of its pages in bytes: 4,096, or 2 MiB for hugetlbfs.</param>
public readonly record struct GuestRegion(ulong BaseHostVirtAddr, ulong Size, ulong Offset, ulong PageSize)
{
    /// <summary>Pages that the kernel backs with hugetlbfs.</summary>
    public const ulong HugePageSize = 2 << 20;

    /// <summary>Ordinary pages of x86-64.</summary>
    public const ulong NormalPageSize = 4096;

    /// <summary>Checks a handshake's regions against the memory file, before a single page is placed.</summary>
    /// <param name="regions">The regions.</param>
    /// <param name="sourceLength">The memory file's length in bytes.</param>
    /// <exception cref="PageServerException">There is none, or one is empty, misaligned, beyond the address space or the file, or overlaps another.</exception>
    public static void Validate(IReadOnlyList<GuestRegion> regions, long sourceLength)
    {
        ArgumentNullException.ThrowIfNull(regions);
        if (regions.Count == 0)
        {
            throw new PageServerException("The handshake names no memory region.");
        }

        for (int i = 0; i < regions.Count; i++)
        {
            var region = regions[i];
            if (region.PageSize is not (NormalPageSize or HugePageSize))
            {
                throw Refused(i, $"its page_size {region.PageSize} is neither {NormalPageSize} nor {HugePageSize}");
            }

            if (region.Size == 0)
            {
                throw Refused(i, "it is empty");
            }

            if ((region.BaseHostVirtAddr | region.Size | region.Offset) % region.PageSize != 0)
            {
                throw Refused(i, $"its address {region.BaseHostVirtAddr:x}, size {region.Size} or offset {region.Offset} is not a multiple of its page size {region.PageSize}");
            }

            if (region.BaseHostVirtAddr + region.Size < region.BaseHostVirtAddr || region.Offset + region.Size < region.Offset)
            {
                throw Refused(i, $"its address {region.BaseHostVirtAddr:x} or offset {region.Offset} overflows with size {region.Size}");
            }

            if (region.Offset + region.Size > (ulong)sourceLength)
            {
                throw Refused(i, $"it ends at byte {region.Offset + region.Size} of a memory file of {sourceLength} bytes");
            }

            for (int j = 0; j < i; j++)
            {
                if (Overlap(region.BaseHostVirtAddr, regions[j].BaseHostVirtAddr, region.Size, regions[j].Size)
                    || Overlap(region.Offset, regions[j].Offset, region.Size, regions[j].Size))
                {
                    throw Refused(i, $"it overlaps region {j}");
                }
            }
        }
    }

    private static bool Overlap(ulong first, ulong second, ulong firstSize, ulong secondSize) => first < second + secondSize && second < first + firstSize;

    private static PageServerException Refused(int index, string why) => new($"The handshake's memory region {index} is refused: {why}.");
}
