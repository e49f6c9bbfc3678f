using CsCheck;
using Dh.Linux;
using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class PopulationPlanTests
{
    private const ulong Page = 4096;

    /// <summary>Runs of data and holes, in bytes: a file system's blocks may be smaller than a page.</summary>
    private static readonly Gen<(FileExtent[] Extents, long Length)> File =
        Gen.Select(Gen.Bool, Gen.Long[1, 600].Array[1, 24]).Select((dataFirst, runs) =>
        {
            var extents = new List<FileExtent>();
            long at = 0;
            bool data = dataFirst;
            foreach (long run in runs)
            {
                if (data)
                {
                    extents.Add(new FileExtent(at, run * 1024));
                }

                at += run * 1024;
                data = !data;
            }

            return (extents.ToArray(), (at + (long)Page - 1) / (long)Page * (long)Page);
        });

    [Fact]
    public void Pieces_cover_exactly_the_data_pages_of_the_regions_once()
    {
        Gen.Select(File, Gen.Double[0, 1], Gen.Double[0, 1]).Sample((file, first, second) =>
        {
            ulong pages = (ulong)file.Length / Page;
            ulong from = (ulong)(first * pages), middle = from + (ulong)(second * (pages - from));
            // Two regions that leave out what lies before `from`; the second half of the file has the lower address.
            GuestRegion[] regions =
            [
                .. Region(0x7000_0000, from, middle),
                .. Region(0x1000_0000, middle, pages),
            ];

            var covered = new HashSet<ulong>();
            foreach (var piece in PopulationPlan.Of(regions, file.Extents))
            {
                Assert.InRange(piece.Length, Page, PopulationPlan.PieceLength);
                Assert.Equal(0ul, (piece.Address | (ulong)piece.Offset | piece.Length) % Page);
                var region = Assert.Single(regions, region => region.Offset <= (ulong)piece.Offset && (ulong)piece.Offset + piece.Length <= region.Offset + region.Size);
                Assert.Equal(region.BaseHostVirtAddr + ((ulong)piece.Offset - region.Offset), piece.Address);
                for (ulong at = 0; at < piece.Length; at += Page)
                {
                    Assert.True(covered.Add((ulong)piece.Offset + at), "a page is copied twice");
                }
            }

            Assert.Equal(DataPages(file.Extents).Where(offset => regions.Any(region => offset >= region.Offset && offset < region.Offset + region.Size)), covered.Order());
        });
    }

    [Fact]
    public void Huge_pages_are_copied_whole()
    {
        const ulong Huge = GuestRegion.HugePageSize;
        var pieces = PopulationPlan.Of([new(8 * Huge, 4 * Huge, 0, Huge)], [new(4096, 4096), new(12288, 4096), new((2 * (long)Huge) + 8192, 4096)]);

        Assert.Equal([new(8 * Huge, 0, Huge, Huge), new(10 * Huge, 2 * (long)Huge, Huge, Huge)], pieces);
    }

    [Fact]
    public void A_file_without_data_needs_no_piece() => Assert.Empty(PopulationPlan.Of([new(Page, Page, 0, Page)], []));

    private static IEnumerable<GuestRegion> Region(ulong address, ulong from, ulong to) => to > from ? [new(address, (to - from) * Page, from * Page, Page)] : [];

    private static SortedSet<ulong> DataPages(FileExtent[] extents)
    {
        var pages = new SortedSet<ulong>();
        foreach (var extent in extents)
        {
            for (ulong page = (ulong)extent.Offset / Page * Page; page < (ulong)extent.End; page += Page)
            {
                pages.Add(page);
            }
        }

        return pages;
    }
}
