using Dh.Preparation;

namespace Dh.Tests.Preparation;

public sealed class JvmHeapTests
{
    [Theory]
    [InlineData(256, "-Xmx1g")]
    [InlineData(1024, "-Xmx1G")]
    [InlineData(512, "-Xmx100m", "-XX:MaxHeapSize=524288k")]
    [InlineData(128, "-Xmx134217728")]
    public void A_heap_that_fills_the_machine_is_refused(int memoryMib, params string[] arguments)
    {
        var error = Assert.Throws<DhException>(() => JvmHeap.Require(arguments, memoryMib));
        Assert.Equal(DhErrorReason.Usage, error.Reason);
        Assert.Contains(arguments[^1], error.Message, StringComparison.Ordinal);
        Assert.Contains("--memory", error.Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(2048, "-Xmx1g")]
    [InlineData(256, "-Xmx1g", "-Xmx128m")]
    [InlineData(256)]
    [InlineData(256, "-Xms32m", "-XX:+UseG1GC")]
    [InlineData(256, "-Xmx")]
    [InlineData(256, "-Xmxmuch")]
    [InlineData(256, "-Xmx9999999999999t")]
    public void Another_is_not(int memoryMib, params string[] arguments) => JvmHeap.Require(arguments, memoryMib);
}
