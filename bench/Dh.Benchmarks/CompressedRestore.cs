using Dh.Linux;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Benchmarks;

/// <summary>Restores of one guest with all its memory, until it answers: from the memory file and from compressed memory, in turn.</summary>
/// <param name="Warm">The median of the rounds' ratios, compressed by not, from the page cache.</param>
/// <param name="Cold">The same with the memory dropped from the page cache before each.</param>
/// <param name="WarmMs">The medians from the page cache: not compressed, compressed.</param>
/// <param name="ColdMs">The medians from the disk.</param>
internal sealed record CompressedRestore(double Warm, double Cold, (double Plain, double Compressed) WarmMs, (double Plain, double Compressed) ColdMs)
{
    private const int Rounds = 15;

    /// <summary>Prepares the same guest a second time, compressed, from the image that is there, and measures.</summary>
    /// <param name="snapshot">The guest, not compressed.</param>
    public static async Task<CompressedRestore> MeasureAsync(Snapshot snapshot)
    {
        using var directory = new TempDir();
        var installation = new Installation(Repository.PathOf("bin"));
        var home = new DhHome(directory.Path);
        Directory.CreateDirectory(Path.GetDirectoryName(home.ImagesDirectory)!);
        Directory.CreateSymbolicLink(home.ImagesDirectory, DhHome.Default.ImagesDirectory);
        Directory.CreateSymbolicLink(home.CacheDirectory, DhHome.Default.CacheDirectory);
        var compressed = await SnapshotPreparation.PrepareAsync(new PreparationOptions
        {
            Template = Images.Template.Find(snapshot.Manifest.Template, installation.TemplatesDirectory),
            Home = home,
            Installation = installation,
            MemoryMib = snapshot.Manifest.MemoryMib,
            Compress = true,
        });
        var (warm, warmMs) = await AlternateAsync(cold: false);
        var (cold, coldMs) = await AlternateAsync(cold: true);
        return new CompressedRestore(warm, cold, warmMs, coldMs);

        async Task<(double Ratio, (double, double) Medians)> AlternateAsync(bool cold)
        {
            var rounds = new List<(double Plain, double Compressed)>();
            for (int round = -1; round < Rounds; round++)
            {
                var pair = (await RestoreAsync(snapshot, installation, cold), await RestoreAsync(compressed, installation, cold));
                if (round >= 0)
                {
                    rounds.Add(pair);
                }
            }

            return (Medians.Median(rounds.Select(pair => pair.Compressed / pair.Plain)), (Medians.Median(rounds.Select(pair => pair.Plain)), Medians.Median(rounds.Select(pair => pair.Compressed))));
        }
    }

    private static async Task<double> RestoreAsync(Snapshot snapshot, Installation installation, bool cold)
    {
        if (cold)
        {
            using var file = File.OpenHandle(snapshot.MemoryPath);
            SparseFile.DropFromPageCache(file);
        }

        await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { MemoryPolicy = MemoryPolicy.Eager, Installation = installation });
        return sandbox.RestoreTime.TotalMilliseconds;
    }
}
