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

    /// <summary>Runs of 4 KiB pages in 16 MiB, which do not overlap, in any order.</summary>
    private static readonly Gen<FileExtent[]> WorkingSet =
        Gen.Select(Gen.Int[1, 500].Array[2, 30], Gen.Int).Select((runs, seed) =>
        {
            var extents = new List<FileExtent>();
            long at = 0;
            for (int i = 0; i < runs.Length; at += runs[i++])
            {
                long length = Math.Min(runs[i], 4096 - at);
                if (i % 2 == 0 && length > 0)
                {
                    extents.Add(new FileExtent(at * (long)Page, length * (long)Page));
                }
            }

#pragma warning disable CA5394 // The same order for the same seed.
            var shuffled = extents.ToArray();
            new Random(seed).Shuffle(shuffled);
#pragma warning restore CA5394
            return shuffled;
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
    public void Huge_pages_that_unordered_extents_share_are_copied_once()
    {
        const long Huge = (long)GuestRegion.HugePageSize;
        var pieces = PopulationPlan.Of([new(0, 4 * (ulong)Huge, 0, (ulong)Huge)], [new(4096, 4096), new(2 * Huge, 4096), new(Huge - 4096, Huge + 4096), new(0, 4096)]);

        Assert.Equal([(0, Huge), (2 * Huge, Huge), (Huge, Huge)], pieces.Select(piece => (piece.Offset, (long)piece.Length)));
    }

    [Fact]
    public void Every_wanted_page_of_a_working_set_is_copied_once_in_its_order() =>
        Gen.Select(WorkingSet, Gen.Bool, Gen.Int[0, 8], Gen.Int[0, 8], Gen.OneOf(Gen.Const(4096ul), Gen.Const(256ul << 10), Gen.Const(PopulationPlan.PieceLength))).Sample((set, huge, first, second, pieceLength) =>
        {
            ulong pageSize = huge ? GuestRegion.HugePageSize : Page, unit = huge ? GuestRegion.HugePageSize : 512 * Page;
            ulong from = (ulong)Math.Min(first, second) * unit, to = (ulong)Math.Max(first, second) * unit;
            GuestRegion[] regions =
            [
                .. to > from ? [new GuestRegion(0x7000_0000, to - from, from, pageSize)] : Array.Empty<GuestRegion>(),
                .. to < 8 * unit ? [new GuestRegion(0x1000_0000, (8 * unit) - to, to, pageSize)] : Array.Empty<GuestRegion>(),
            ];

            foreach (var region in regions)
            {
                var covered = new List<ulong>();
                foreach (var piece in PopulationPlan.Of(regions, set, pieceLength).Where(piece => (ulong)piece.Offset >= region.Offset && (ulong)piece.Offset < region.Offset + region.Size))
                {
                    Assert.InRange(piece.Length, pageSize, Math.Max(pageSize, pieceLength));
                    Assert.Equal(pageSize, piece.PageSize);
                    Assert.Equal(0ul, (piece.Address | (ulong)piece.Offset | piece.Length) % pageSize);
                    Assert.Equal(region.BaseHostVirtAddr + ((ulong)piece.Offset - region.Offset), piece.Address);
                    Assert.InRange((ulong)piece.Offset + piece.Length, region.Offset, region.Offset + region.Size);
                    for (ulong at = 0; at < piece.Length; at += pageSize)
                    {
                        covered.Add((ulong)piece.Offset + at);
                    }
                }

                var wanted = set.SelectMany(extent => Pages(extent, pageSize)).Where(page => page >= region.Offset && page < region.Offset + region.Size).Distinct().ToList();
                Assert.Equal(wanted.Order(), covered.Order());
                if (!huge)
                {
                    Assert.Equal(wanted, covered);
                }
            }
        });

    [Fact]
    public void A_file_without_data_needs_no_piece() => Assert.Empty(PopulationPlan.Of([new(Page, Page, 0, Page)], []));

    private static IEnumerable<GuestRegion> Region(ulong address, ulong from, ulong to) => to > from ? [new(address, (to - from) * Page, from * Page, Page)] : [];

    private static IEnumerable<ulong> Pages(FileExtent extent, ulong pageSize)
    {
        for (ulong page = (ulong)extent.Offset / pageSize * pageSize; page < (ulong)extent.End; page += pageSize)
        {
            yield return page;
        }
    }

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
