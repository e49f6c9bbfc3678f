using CsCheck;
using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class AddressRangesTests
{
    private const int Space = 200;

    [Fact]
    public void Ranges_agree_with_a_set_of_single_addresses()
    {
        Gen.Select(Gen.Int[0, Space], Gen.Int[0, 20]).Array[0, 40].Sample(additions =>
        {
            var ranges = new AddressRanges();
            bool[] model = new bool[Space + 40];
            foreach (var (start, length) in additions)
            {
                ranges.Add((ulong)start, (ulong)(start + length));
                Array.Fill(model, true, start, length);
                Assert.Equal(Runs(model), ranges.Count);
            }

            for (int address = 0; address < Space; address++)
            {
                for (int wanted = 1; wanted < 30; wanted += 7)
                {
                    ulong length = (ulong)wanted;
                    Assert.Equal(model[address], ranges.Covers((ulong)address, ref length));
                    // As far as the answer holds, and not a byte less.
                    int expected = 1;
                    while (expected < wanted && model[address + expected] == model[address])
                    {
                        expected++;
                    }

                    Assert.Equal((ulong)expected, length);
                }
            }
        });
    }

    [Fact]
    public void A_million_removals_of_one_page_after_the_other_are_one_range()
    {
        var ranges = new AddressRanges();
        for (ulong page = 0; page < 1_000_000; page++)
        {
            ranges.Add(page * 4096, (page + 1) * 4096);
        }

        Assert.Equal(1, ranges.Count);
    }

    [Fact]
    public void An_empty_or_reversed_range_adds_nothing()
    {
        var ranges = new AddressRanges();
        ranges.Add(5, 5);
        ranges.Add(7, 6);

        Assert.Equal(0, ranges.Count);
    }

    private static int Runs(bool[] model) => Enumerable.Range(0, model.Length).Count(i => model[i] && (i == 0 || !model[i - 1]));
}
