using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class GuestRegionTests
{
    private const ulong Page = 4096;
    private const ulong Huge = 2 << 20;

    [Fact]
    public void Regions_may_lie_side_by_side_and_in_any_order() =>
        GuestRegion.Validate([new(8 * Page, 2 * Page, 0, Page), new(6 * Page, 2 * Page, 2 * Page, Page), new(Page, Page, 4 * Page, Page)], 5 * (long)Page);

    [Fact]
    public void A_region_of_huge_pages_is_accepted() => GuestRegion.Validate([new(Huge, Huge, Huge, Huge)], 2 * (long)Huge);

    [Fact]
    public void No_region_at_all_is_refused() =>
        Assert.Equal("The handshake names no memory region.", Assert.Throws<PageServerException>(() => GuestRegion.Validate([], 4096)).Message);

    [Theory]
    [InlineData(Page, Page, 0, 8192, "its page_size 8192 is neither 4096 nor 2097152")]
    [InlineData(Page, Page, 0, 0, "its page_size 0 is neither 4096 nor 2097152")]
    [InlineData(Page, 0, 0, Page, "it is empty")]
    [InlineData(Page + 1, Page, 0, Page, "its address 1001, size 4096 or offset 0 is not a multiple of its page size 4096")]
    [InlineData(Page, Page + 512, 0, Page, "its address 1000, size 4608 or offset 0 is not a multiple of its page size 4096")]
    [InlineData(Page, Page, 1, Page, "its address 1000, size 4096 or offset 1 is not a multiple of its page size 4096")]
    [InlineData(Page, Huge, 0, Huge, "its address 1000, size 2097152 or offset 0 is not a multiple of its page size 2097152")]
    [InlineData(ulong.MaxValue - Page + 1, 2 * Page, 0, Page, "its address fffffffffffff000 or offset 0 overflows with size 8192")]
    [InlineData(Page, 2 * Page, ulong.MaxValue - Page + 1, Page, "its address 1000 or offset 18446744073709547520 overflows with size 8192")]
    [InlineData(Page, 5 * Page, 0, Page, "it ends at byte 20480 of a memory file of 16384 bytes")]
    [InlineData(Page, Page, 4 * Page, Page, "it ends at byte 20480 of a memory file of 16384 bytes")]
    public void A_region_that_does_not_fit_is_refused(ulong address, ulong size, ulong offset, ulong pageSize, string reason)
    {
        var refusal = Assert.Throws<PageServerException>(() => GuestRegion.Validate([new(address, size, offset, pageSize)], 4 * (long)Page));

        Assert.Equal($"The handshake's memory region 0 is refused: {reason}.", refusal.Message);
    }

    [Theory]
    [InlineData(Page, 2 * Page)]
    [InlineData(2 * Page, 2 * Page)]
    [InlineData(8 * Page, Page)]
    public void Regions_that_overlap_in_memory_or_in_the_file_are_refused(ulong address, ulong offset)
    {
        var refusal = Assert.Throws<PageServerException>(() => GuestRegion.Validate([new(Page, 2 * Page, 0, Page), new(address, 2 * Page, offset, Page)], 4 * (long)Page));

        Assert.Equal("The handshake's memory region 1 is refused: it overlaps region 0.", refusal.Message);
    }
}
