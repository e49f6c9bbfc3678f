using Dh.Linux;

namespace Dh.Tests.Linux;

/// <summary>Random bytes of the kernel's.</summary>
public sealed class EntropyTests
{
    [Theory]
    [InlineData(0)]
    [InlineData(16)]
    [InlineData(4096)]
    public void As_many_bytes_as_asked_for(int count) => Assert.Equal(count, Entropy.GetBytes(count).Length);

    [Fact]
    public void All_of_them_are_filled_and_no_two_alike()
    {
        byte[] first = Entropy.GetBytes(4096), second = Entropy.GetBytes(4096);
        Assert.NotEqual(first, second);
        Assert.All(first.Chunk(64), chunk => Assert.Contains(chunk, b => b != 0));
    }
}
