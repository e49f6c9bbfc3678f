using System.Text;
using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class HandshakeMessageTests
{
    private const string One = """{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096,"page_size_kib":4096}""";
    private const string Two = """{"base_host_virt_addr":65536,"size":4096,"offset":8192,"page_size":4096}""";

    private static readonly GuestRegion First = new(4096, 8192, 0, 4096);
    private static readonly GuestRegion Second = new(65536, 4096, 8192, 4096);

    [Fact]
    public void One_region_is_read() => Assert.Equal([First], Parse($"[{One}]"));

    [Fact]
    public void Several_regions_are_read_in_their_order() => Assert.Equal([First, Second], Parse($"[{One},{Two}]"));

    [Fact]
    public void Of_glued_messages_the_last_counts() => Assert.Equal([Second], Parse($"[{One}][{Two}]"));

    [Fact]
    public void White_space_and_newlines_around_messages_do_not_matter() => Assert.Equal([Second], Parse($" [{One}]\r\n\t[{Two}]\n"));

    [Fact]
    public void Unknown_members_of_any_kind_are_passed_over() =>
        Assert.Equal([First], Parse("""[{"new":{"deep":[1,2]},"base_host_virt_addr":4096,"more":null,"size":8192,"offset":0,"text":"]"}]"""));

    [Fact]
    public void Without_a_page_size_pages_are_4096_bytes() => Assert.Equal([First], Parse("""[{"base_host_virt_addr":4096,"size":8192,"offset":0}]"""));

    [Fact]
    public void The_old_member_page_size_kib_holds_bytes() =>
        Assert.Equal([First with { PageSize = 2097152 }], Parse("""[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size_kib":2097152}]"""));

    [Fact]
    public void The_largest_numbers_are_read() =>
        Assert.Equal([new GuestRegion(ulong.MaxValue, ulong.MaxValue, ulong.MaxValue, 4096)],
            Parse($$"""[{"base_host_virt_addr":{{ulong.MaxValue}},"size":{{ulong.MaxValue}},"offset":{{ulong.MaxValue}}}]"""));

    [Fact]
    public void An_empty_array_is_read_as_no_region() => Assert.Equal([], Parse("[]"));

    [Fact]
    public void Every_prefix_of_a_message_waits_for_more()
    {
        string text = $"[{One},{Two}]";
        for (int length = 0; length < text.Length; length++)
        {
            Assert.Null(Parse(text[..length]));
        }
    }

    [Fact]
    public void A_complete_message_with_the_start_of_another_waits_for_the_rest()
    {
        string text = $"[{One}][{Two}]";
        for (int length = One.Length + 3; length < text.Length; length++)
        {
            Assert.Null(Parse(text[..length]));
        }
    }

    [Theory]
    [InlineData("{}", "expected a JSON array of regions, found StartObject at byte 0.")]
    [InlineData("\"text\"", "expected a JSON array of regions, found String at byte 0.")]
    [InlineData("hello", "malformed JSON at byte 0.")]
    [InlineData("[1]", "region 0 is a Number, not an object.")]
    [InlineData("[[", "region 0 is a StartArray, not an object.")]
    [InlineData("[{\"size\":1,\"offset\":0}]", "region 0 has no `base_host_virt_addr`.")]
    [InlineData("[{\"base_host_virt_addr\":0,\"offset\":0}]", "region 0 has no `size`.")]
    [InlineData("[{\"base_host_virt_addr\":0,\"size\":1}]", "region 0 has no `offset`.")]
    [InlineData("[{\"size\":-1}]", "`size` of region 0 is no unsigned 64-bit number.")]
    [InlineData("[{\"size\":1.5}]", "`size` of region 0 is no unsigned 64-bit number.")]
    [InlineData("[{\"size\":18446744073709551616}]", "`size` of region 0 is no unsigned 64-bit number.")]
    [InlineData("[{\"size\":\"1\"}]", "`size` of region 0 is no unsigned 64-bit number.")]
    [InlineData("[{\"size\":null}]", "`size` of region 0 is no unsigned 64-bit number.")]
    [InlineData("[{\"a\":{\"b\":{\"c\":{}}}}]", "malformed JSON at byte 16.")]
    public void What_cannot_become_a_handshake_is_refused(string text, string reason)
    {
        var refusal = Assert.Throws<PageServerException>(() => Parse(text));

        Assert.Equal($"The handshake is refused: {reason}", refusal.Message);
    }

    [Theory]
    [InlineData(new byte[] { (byte)'[', (byte)'{', (byte)'"', 0xff, (byte)'"', (byte)':', (byte)'1', (byte)'}', (byte)']' })]
    [InlineData(new byte[] { 0xff, 0xfe, 0x00 })]
    [InlineData(new byte[] { 0 })]
    public void Bytes_that_are_no_text_are_refused(byte[] bytes) => Assert.Throws<PageServerException>(() => HandshakeMessage.TryParse(bytes));

    [Fact]
    public void A_lone_surrogate_in_a_name_is_refused() => Assert.Throws<PageServerException>(() => Parse("""[{"\ud800":1}]"""));

    [Fact]
    public void More_regions_than_any_VMM_has_are_refused()
    {
        string regions = string.Join(',', Enumerable.Repeat(One, HandshakeMessage.MaxRegions));
        Assert.Equal(HandshakeMessage.MaxRegions, Parse($"[{regions}]")!.Count);

        var refusal = Assert.Throws<PageServerException>(() => Parse($"[{regions},{One}]"));

        Assert.Equal("The handshake is refused: more than 256 regions.", refusal.Message);
    }

    private static List<GuestRegion>? Parse(string text) => HandshakeMessage.TryParse(Encoding.UTF8.GetBytes(text));
}
