using Dh.Images;

namespace Dh.Tests.Images;

public sealed class SpellingTests
{
    [Theory]
    [InlineData("", "", 0)]
    [InlineData("", "abc", 3)]
    [InlineData("kitten", "sitting", 3)]
    [InlineData("pip", "pip", 0)]
    public void The_distance_counts_single_changes(string from, string to, int distance) => Assert.Equal(distance, Spelling.Distance(from, to));

    [Fact]
    public void Nothing_is_proposed_when_nothing_is_near()
    {
        Assert.Equal("", Spelling.DidYouMean("colour", ["name", "suite"]));
        Assert.Equal("", Spelling.DidYouMean("colour", []));
        Assert.Equal(" (did you mean 'suite'?)", Spelling.DidYouMean("siute", ["name", "suite"]));
    }
}
