using System.Text;
using Dh.Vmm;

namespace Dh.Tests.Vmm;

/// <summary>The last words of a machine that may say anything, for ever.</summary>
public sealed class TailBufferTests
{
    [Fact]
    public void The_last_lines_are_kept_however_much_came_before()
    {
        var tail = new TailBuffer();
        for (int i = 0; i < 100_000; i++)
        {
            tail.Append(Encoding.UTF8.GetBytes($"line {i}\n"));
        }

        Assert.Equal("line 99998\nline 99999", tail.LastLines(2));
    }

    [Fact]
    public void Nothing_in_them_steers_a_terminal() => Assert.Equal("[2Jred\tend", TailBuffer.LastLines("\u001b[2J\u0007red\tend\r\n\n", 5));

    [Fact]
    public void After_a_panic_they_end_with_its_reason() => Assert.Equal(
        "before\n[1.0] Kernel panic - not syncing: reason",
        TailBuffer.LastLines("long before\nbefore\n[1.0] Kernel panic - not syncing: reason\nregisters\nstack\n", 2));
}
