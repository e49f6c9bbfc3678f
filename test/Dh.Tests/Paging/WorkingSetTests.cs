using CsCheck;
using Dh.Linux;
using Dh.Paging;

namespace Dh.Tests.Paging;

public sealed class WorkingSetTests
{
    private const long Page = 4096;
    private const long Pages = 24;

    private static readonly Gen<long[][]> Recordings = Gen.Long[0, Pages - 1].Select(page => page * Page).Array[0, 30].Array[0, 5];

    [Fact]
    public void Pages_that_half_of_the_recordings_touched_are_kept() =>
        Assert.Equal([new(0, Page), new(4 * Page, Page)], Combine([[0, 2 * Page], [4 * Page, 0], [0, 4 * Page], [6 * Page]]).Touched);

    [Fact]
    public void Neighbours_become_one_run() =>
        Assert.Equal([new(2 * Page, 3 * Page), new(9 * Page, Page)], Combine([[3 * Page, 9 * Page, 2 * Page, 4 * Page]]).Touched);

    [Fact]
    public void A_run_is_as_early_as_its_earliest_page() =>
        Assert.Equal([new(7 * Page, 2 * Page), new(3 * Page, Page), new(0, Page)], Combine([[8 * Page, 3 * Page, 0, 7 * Page]]).Touched);

    [Fact]
    public void The_mean_of_the_first_touches_gives_the_order() =>
        // Pages 0 and 6 come first and fourth in turn, page 2 always second, page 10 once and third, page 4 third and fifth.
        Assert.Equal([2 * Page, 0, 6 * Page, 10 * Page, 4 * Page],
            Combine([[0, 2 * Page, 4 * Page, 6 * Page], [6 * Page, 2 * Page, 10 * Page, 0, 4 * Page]]).Touched.Select(run => run.Offset));

    [Fact]
    public void A_page_that_is_touched_again_counts_once() =>
        Assert.Equal([new(0, Page), new(2 * Page, Page)], Combine([[0, 0, 0, 2 * Page], [0, 2 * Page, 0]]).Touched);

    [Fact]
    public void Written_pages_are_in_the_order_of_the_addresses()
    {
        var set = WorkingSet.Combine("id", Pages * Page, [], [new long[] { 5 * Page, Page, 4 * Page }, new long[] { 4 * Page, 5 * Page, 5 * Page }, new long[] { 9 * Page }]);

        Assert.Equal(("id", Pages * Page), (set.SnapshotId, set.MemoryLength));
        Assert.Empty(set.Touched);
        Assert.Equal([new(4 * Page, 2 * Page)], set.Written);
    }

    [Fact]
    public void No_recording_makes_an_empty_set() => Assert.Equal((0L, 0), (Combine([]).TouchedBytes, Combine([[], []]).Touched.Count));

    [Fact]
    public void A_combination_is_that_of_a_naive_model() => Gen.Select(Recordings, Recordings).Sample((recordings, written) =>
    {
        var set = WorkingSet.Combine("id", Pages * Page, recordings, written);

        var ranks = new double?[Pages];
        for (long page = 0; page < Pages; page++)
        {
            int[] firsts = [.. recordings.Select(recording => Array.IndexOf([.. recording.Distinct()], page * Page)).Where(rank => rank >= 0)];
            ranks[page] = firsts.Length > 0 && firsts.Length * 2 >= recordings.Length ? firsts.Average() : null;
        }

        var runs = Runs(page => ranks[page] is not null);
        Assert.Equal(runs.OrderBy(run => run.Offset), set.Touched.OrderBy(run => run.Offset));
        Assert.Equal(runs.Sum(run => run.Length), set.TouchedBytes);
        double[] order = [.. set.Touched.Select(run => Enumerable.Range((int)(run.Offset / Page), (int)(run.Length / Page)).Min(page => ranks[page]!.Value))];
        for (int i = 1; i < order.Length; i++)
        {
            Assert.True(order[i - 1] <= order[i] + 1e-9, $"run {i} is touched before run {i - 1}");
        }

        Assert.Equal(Runs(page => written.Count(pages => pages.Contains(page * Page)) is > 0 and var count && count * 2 >= written.Length), set.Written);
    });

    private static List<FileExtent> Runs(Func<int, bool> wanted)
    {
        var runs = new List<FileExtent>();
        for (int page = 0; page < Pages; page++)
        {
            if (wanted(page))
            {
                bool joins = page > 0 && wanted(page - 1);
                var run = joins ? runs[^1] with { Length = runs[^1].Length + Page } : new FileExtent(page * Page, Page);
                runs.RemoveRange(runs.Count - (joins ? 1 : 0), joins ? 1 : 0);
                runs.Add(run);
            }
        }

        return runs;
    }

    private static WorkingSet Combine(long[][] recordings) => WorkingSet.Combine("id", Pages * Page, recordings, []);
}
