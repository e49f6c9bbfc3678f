using System.Globalization;
using Dh;
using Dh.Linux;
using Dh.Paging;
using Dh.Snapshots;
using Dh.TestSupport;

namespace PowerCut;

/// <summary>
/// What runs in the machine whose power is cut: publishes snapshots without end, as a preparation does, or looks at what a power cut has left.
/// It says a line of each on the console.
/// </summary>
internal static class Program
{
    private const int MemoryMib = 2;

    // A machine that nobody cuts ends by itself.
    private static readonly TimeSpan PublishLimit = TimeSpan.FromMinutes(5);

    private static async Task<int> Main(string[] args)
    {
        try
        {
            var home = new DhHome(args[1]);
            var store = new SnapshotStore(home);
            using var preparing = await store.LockPreparationAsync(() => { }, CancellationToken.None);
            switch (args[0])
            {
                case "publish":
                    PublishWithoutEnd(home, store, careful: true);
                    return 0;
                case "publish-without-sync":
                    PublishWithoutEnd(home, store, careful: false);
                    return 0;
                case "verify":
                    await VerifyAsync(home, store);
                    return 0;
                default:
                    throw new ArgumentException($"There is no {args[0]}.");
            }
        }
        catch (Exception e) when (e is DhException or IOException or ArgumentException)
        {
            Console.WriteLine($"failed: {e.Message}");
            return 1;
        }
    }

    private static void PublishWithoutEnd(DhHome home, SnapshotStore store, bool careful)
    {
        Console.WriteLine("publishing");
        store.RemoveDeadDrafts();
        long start = Environment.TickCount64;
        for (int number = NextNumber(home); Environment.TickCount64 - start < PublishLimit.TotalMilliseconds; number++)
        {
            Console.WriteLine($"published {Publish(store, number, careful).Manifest.Id}");
        }
    }

    private static async Task VerifyAsync(DhHome home, SnapshotStore store)
    {
        var current = store.List(out var damaged).SingleOrDefault();
        if (damaged.Count > 0)
        {
            throw new IOException(string.Join(' ', damaged));
        }

        if (current is not null)
        {
            await current.VerifyAsync();
        }

        string left = string.Join(", ", Names(home).Except(NamesOf(current)));

        // As each preparation begins and ends.
        int number = NextNumber(home);
        store.RemoveDeadDrafts();
        var next = Publish(store, number, careful: true);
        await next.VerifyAsync();
        var unknown = Names(home).Except(NamesOf(next)).ToList();
        if (unknown.Count > 0)
        {
            throw new IOException($"The publication of {next.Manifest.Id} left {string.Join(", ", unknown)}");
        }

        Console.WriteLine($"verified {current?.Manifest.Id ?? IdOf(0)}, published {next.Manifest.Id}, left by the cut: {(left.Length > 0 ? left : "nothing")}");
    }

    private static Snapshot Publish(SnapshotStore store, int number, bool careful)
    {
        string id = IdOf(number);
        string draft = store.CreateDraft(id);
        var manifest = WrittenSnapshot.Write(draft, compressed: false, MemoryMib << 20, MemoryMib, id: id, seed: number);
        if (careful)
        {
            manifest = manifest with { Files = SnapshotDraft.FinishFiles(draft, Snapshot.MemoryName, CancellationToken.None) };
            SnapshotDraft.WriteManifest(draft, manifest);
            new WorkingSet(id, MemoryMib << 20, [new FileExtent(0, 1 << 20)], []).WriteTo(Path.Combine(draft, Snapshot.WorkingSetName), Path.Combine(draft, Snapshot.MemoryName));
        }

        return store.Publish(draft, manifest);
    }

    // Ids are not used twice. No snapshot is number 0.
    private static int NextNumber(DhHome home) =>
        1 + Names(home).Select(name => int.TryParse(name, CultureInfo.InvariantCulture, out int number) ? number : 0).DefaultIfEmpty().Max();

    private static string IdOf(int number) => number.ToString("D6", CultureInfo.InvariantCulture);

    /// <summary>What is in the store, two levels deep.</summary>
    private static IEnumerable<string> Names(DhHome home) => Directory
        .EnumerateFileSystemEntries(home.SnapshotsDirectory)
        .SelectMany(path => Path.GetFileName(path).StartsWith('.') ? [path] : Directory.EnumerateFileSystemEntries(path))
        .Select(path => Path.GetFileName(path));

    private static string[] NamesOf(Snapshot? snapshot) => snapshot is null ? [".prepare.lock"] : [".prepare.lock", "current", snapshot.Manifest.Id];
}
