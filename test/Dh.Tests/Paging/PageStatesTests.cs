using CsCheck;
using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class PageStatesTests
{
    private enum Mark
    {
        Present,
        Zero,
        Missing,
    }

    /// <summary>Lengths around multiples of a word's 64 bits, and marks whose ends lie anywhere in them.</summary>
    private static readonly Gen<(int Pages, (Mark Mark, int First, int Count)[] Marks)> States =
        Gen.OneOf(Gen.Int[1, 300], Gen.Int[63, 65], Gen.Int[127, 129]).SelectMany(pages =>
            Gen.Select(Gen.Enum<Mark>(), Gen.Int[0, pages - 1], Gen.Int[0, pages])
                .Select((mark, first, count) => (mark, first, Math.Min(count, pages - first)))
                .Array[0, 12]
                .Select(marks => (pages, marks)));

    [Fact]
    public void Marks_are_those_of_a_plain_array() => States.Sample((pages, marks) =>
    {
        var (states, present, zero) = Apply(pages, marks);

        Assert.Equal(pages, states.Pages);
        Assert.Equal(present, Enumerable.Range(0, pages).Select(page => states.IsPresent(page)));
        Assert.Equal(zero, Enumerable.Range(0, pages).Select(page => states.IsZero(page)));
        Assert.Equal(zero.Count(page => page), states.CountZero());
    });

    [Fact]
    public void Runs_are_those_of_a_plain_array() =>
        Gen.Select(States, Gen.Double[0, 1], Gen.Double[0, 1]).Sample((layout, begin, stop) =>
        {
            var (states, present, zero) = Apply(layout.Pages, layout.Marks);
            int end = (int)(stop * (layout.Pages + 0.99)), first = (int)(begin * (end + 0.99));
            for (int kind = 0; kind < 2; kind++)
            {
                bool zeros = kind == 1;
                bool[] wanted = [.. Enumerable.Range(0, layout.Pages).Select(page => !present[page] && zero[page] == zeros)];
                long at = first;
                int expected = first;
                while (true)
                {
                    while (expected < end && !wanted[expected])
                    {
                        expected++;
                    }

                    int behind = expected;
                    while (behind < end && wanted[behind])
                    {
                        behind++;
                    }

                    long count = zeros ? states.NextAbsentZero(ref at, end) : states.NextMissing(ref at, end);
                    Assert.Equal((expected, behind - expected), ((int)at, (int)count));
                    if (count == 0)
                    {
                        break;
                    }

                    (at, expected) = (at + count, behind);
                }
            }
        });

    [Fact]
    public void Marks_of_several_threads_in_one_word_are_all_kept()
    {
        for (int round = 0; round < 200; round++)
        {
            var states = new PageStates(130);
            Parallel.For(0, 130, page => states.MarkPresent(page, 1));
            long first = 0;
            Assert.Equal(0, states.NextMissing(ref first, 130));
        }
    }

    [Fact]
    public async Task A_run_is_found_while_another_thread_places_what_is_before_it()
    {
        const int Pages = 4096;
        for (int round = 0; round < 200; round++)
        {
            var states = new PageStates(Pages);
            var placing = Task.Run(
                () =>
                {
                    for (int page = 0; page < Pages - 1; page++)
                    {
                        states.MarkPresent(page, 1);
                    }
                },
                TestContext.Current.CancellationToken);
            bool placed;
            do
            {
                placed = placing.IsCompleted;
                long first = 0, count = states.NextMissing(ref first, Pages);
                Assert.True(count > 0, $"none is missing from page {first} on, and yet the last one is");
            }
            while (!placed);
            await placing;
        }
    }

    private static (PageStates States, bool[] Present, bool[] Zero) Apply(int pages, (Mark Mark, int First, int Count)[] marks)
    {
        var states = new PageStates(pages);
        bool[] present = new bool[pages], zero = new bool[pages];
        foreach (var (mark, first, count) in marks)
        {
            switch (mark)
            {
                case Mark.Present:
                    states.MarkPresent(first, count);
                    present.AsSpan(first, count).Fill(true);
                    break;
                case Mark.Zero:
                    states.MarkZero(first, count);
                    zero.AsSpan(first, count).Fill(true);
                    present.AsSpan(first, count).Clear();
                    break;
                default:
                    states.MarkMissing(first, count);
                    zero.AsSpan(first, count).Clear();
                    break;
            }
        }

        return (states, present, zero);
    }
}
