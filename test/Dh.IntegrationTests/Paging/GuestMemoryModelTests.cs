using CsCheck;
using Dh.Linux;
using Dh.Paging;
using Dh.TestSupport;
using static Dh.IntegrationTests.Paging.PageHashes;

namespace Dh.IntegrationTests.Paging;

/// <summary>
/// Guest memory against a model: the memory file's bytes, zeros once given back, whatever the policy and whenever it happens. CsCheck prints
/// the seed of what fails; CsCheck_Seed repeats it.
/// </summary>
public sealed class GuestMemoryModelTests : IDisposable
{
    /// <summary>For all samples together.</summary>
    private const int Seconds = 15;

    private const string Id = "model";

    /// <summary>Above all that a loaded machine needs, far below the test's own time limit.</summary>
    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();

    internal enum Verb
    {
        Read,
        Write,
        Remove,
    }

    private static readonly Gen<Layout> Layouts = Gen.Int[2, 2000].SelectMany(pages =>
        Gen.Select(Gen.Int, Gen.Int[1, 200], Gen.Bool, Gen.Int[0, pages - 1].Array[0, 300], Gen.Int[0, pages - 1])
            .Select((seed, maxRun, holes, workingSet, split) => new Layout(pages, seed, maxRun, holes, workingSet, split)));

    private static readonly Gen<Serving> Servings =
        Gen.Select(Gen.Enum<PopulationPolicy>(), Gen.Bool, Gen.Int[12, 21], Gen.Int[1, 4], Gen.Int[0, 30], (policy, fill, block, workers, slow) => new Serving(policy, fill, 1 << block, workers, slow));

    private static readonly Gen<Step> Steps =
        Gen.Select(Gen.Select(Gen.Enum<Verb>(), Gen.Double[0, 1], Gen.Double[0, 1]), Gen.Select(Gen.Enum<Verb>(), Gen.Double[0, 1], Gen.Double[0, 1]), Gen.Bool)
            .Select((first, second, both) => new Step(new Access(first.Item1, first.Item2, first.Item3), new Access(second.Item1, second.Item2, second.Item3), both));

    [Fact(Timeout = 120_000)]
    public async Task Memory_is_the_files_until_it_is_given_back_and_zero_from_then_on() =>
        await Gen.Select(Layouts, Servings, Steps.Array[0, 30]).SampleAsync(ServeAsync, time: Seconds, threads: 1);

    public void Dispose() => _directory.Dispose();

    private async Task ServeAsync(Layout layout, Serving serving, Step[] steps)
    {
        long size = (long)layout.Pages * PageSize;
        string file = SparseFileBuilder.Write(_directory["memory"], size, layout.Seed, layout.MaxRun, layout.Holes), workingSet = _directory["working-set"];
        byte[] memory = await File.ReadAllBytesAsync(file);
        WorkingSet.Combine(Id, size, [[.. layout.WorkingSet.Select(page => (long)page * PageSize)]], []).WriteTo(workingSet, file);
        var source = new SlowSource(WorkingSetSource.Open(SparseFileSource.Open(file), workingSet, Id), serving.SlowReads);
        string mode = layout.Split == 0 ? "normal" : "two-regions";
        var (client, connection) = await GuestMemoryClient.StartAsync(mode, size, (long)layout.Split * PageSize);
        await using var owned = client;
        await using var server = PageServer.Start(connection, source, new PageServerOptions
        {
            Policy = serving.Policy,
            Fill = serving.Fill,
            BlockSize = serving.BlockSize,
            Workers = serving.Workers,
            Failed = _ => client.Kill(),
        });

        // At once: in the middle of the population, and while the filler runs.
        await client.SentAsync();
        foreach (var step in steps)
        {
            var (first, second) = (StretchOf(step.First, layout.Pages), StretchOf(step.Second, layout.Pages));
            if (step.Both && (!first.Overlaps(second) || (first.Verb, second.Verb) == (Verb.Read, Verb.Read)))
            {
                var expected = (Apply(memory, first), Apply(memory, second));
                var actual = await client.BothAsync(first.ToString(), second.ToString());
                Assert.Equal(first.Verb == Verb.Read ? expected.Item1 : actual.First, actual.First);
                Assert.Equal(second.Verb == Verb.Read ? expected.Item2 : actual.Second, actual.Second);
                continue;
            }

            ulong hash = Apply(memory, first);
            switch (first.Verb)
            {
                case Verb.Read:
                    Assert.Equal(hash, await client.ReadAsync(first.Offset, first.Length));
                    break;
                case Verb.Write:
                    await client.WriteAsync(first.Offset, first.Length);
                    break;
                default:
                    await client.RemoveAsync(first.Offset, first.Length);
                    break;
            }
        }

        var result = await server.WaitPopulatedAsync().WaitAsync(Bound);
        Assert.Null(result.Warning);
        if (serving.Fill || serving.Policy == PopulationPolicy.Eager)
        {
            Assert.Equal(PageServerEnd.Released, await server.Completion.WaitAsync(Bound));
        }

        AssertSame(HashPages(memory), await client.HashPagesAsync());
    }

    /// <summary>Does to the model what the client does; returns the hash of what is read there.</summary>
    private static ulong Apply(byte[] memory, Stretch stretch)
    {
        var pages = memory.AsSpan((int)stretch.Offset, (int)stretch.Length);
        switch (stretch.Verb)
        {
            case Verb.Read:
                return Hash(pages);
            case Verb.Write:
                Write(pages);
                return 0;
            default:
                pages.Clear();
                return 0;
        }
    }

    /// <summary>Mostly short stretches, sometimes all of memory.</summary>
    private static Stretch StretchOf(Access access, int pages)
    {
        int first = (int)(access.Start * (pages - 1)), most = pages - first;
        int length = Math.Max(1, (int)(Math.Pow(access.Length, 4) * most));
        return new Stretch(access.Verb, (long)first * PageSize, (long)length * PageSize);
    }

    internal sealed record Layout(int Pages, int Seed, int MaxRun, bool Holes, int[] WorkingSet, int Split);

    internal sealed record Serving(PopulationPolicy Policy, bool Fill, int BlockSize, int Workers, int SlowReads);

    internal sealed record Access(Verb Verb, double Start, double Length);

    internal sealed record Step(Access First, Access Second, bool Both);

    /// <summary>Memory whose first reads take a while: what the client does meanwhile falls into the middle of the population.</summary>
    private sealed class SlowSource(IMemorySource source, int slowReads) : IMemorySource
    {
        private readonly int _slowReads = slowReads;
        private int _reads;

        public string Path => source.Path;

        public long Length => source.Length;

        public IReadOnlyList<FileExtent> DataExtents => source.DataExtents;

        public IReadOnlyList<FileExtent> PrefetchExtents => source.PrefetchExtents;

        public IMemoryReader OpenReader() => new Reader(this, source.OpenReader());

        public void ReadAhead(Func<bool> enough) => source.ReadAhead(enough);

        public void Dispose() => source.Dispose();

        private sealed class Reader(SlowSource slow, IMemoryReader reader) : IMemoryReader
        {
            public bool IsMapped => reader.IsMapped;

            public nuint Read(long offset, ref ulong length)
            {
                if (Interlocked.Increment(ref slow._reads) <= slow._slowReads)
                {
#pragma warning disable RS0030 // It is slowness that is wanted here, nothing is waited for.
                    Thread.Sleep(1);
#pragma warning restore RS0030
                }

                return reader.Read(offset, ref length);
            }

            public void Dispose() => reader.Dispose();
        }
    }

    private sealed record Stretch(Verb Verb, long Offset, long Length)
    {
        public bool Overlaps(Stretch other) => Offset < other.Offset + other.Length && other.Offset < Offset + Length;

        public override string ToString() => $"{Verb switch { Verb.Read => "read", Verb.Write => "write", _ => "remove" }} {Offset} {Length}";
    }
}
