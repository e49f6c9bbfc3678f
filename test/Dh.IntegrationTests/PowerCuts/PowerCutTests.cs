using System.Globalization;
using System.Text.RegularExpressions;
using Dh.IntegrationTests.Guests;
using Dh.Snapshots;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.PowerCuts;

/// <summary>
/// Snapshots are published without end in a machine whose power is cut: QEMU is killed, and what was in its memory, in its disk's cache or in between
/// is gone. Shown for ext4 as mke2fs makes it and Linux mounts it; other file systems keep less order of their own.
/// </summary>
public sealed partial class PowerCutTests(PreparedHome prepared) : IDisposable
{
    private const string Published = "published "; // what the program says of each; and first of all, that it is publishing
    private const int DefaultCuts = 2;
    private const int MaxToldBefore = 3;
    private const int MaxDelayMs = 300; // a snapshot takes about 200
    private const int MaxEarlier = 60; // writes and flushes; a snapshot takes some 45

    private readonly TempDir _directory = new();

    private string InitrdPath => _directory["initrd"];

    /// <summary>POWER_CUTS sets their number: 2 here, 20 in <c>make chaos</c>; POWER_CUT_SEED what they begin with: the moments are the host's own.</summary>
    [Fact]
    public async Task After_a_power_cut_the_snapshot_that_was_published_last_is_in_use_and_whole()
    {
        int cuts = FromEnvironment("POWER_CUTS", DefaultCuts), failed = 0;
        var (random, guest, disk) = await BeginAsync();
        string? published = null;
        for (int cut = 1; cut <= cuts; cut++)
        {
            bool fresh = cut == 1 || published is null || random.Next(4) == 0; // the first snapshot of all is another case
            if (fresh)
            {
                await disk.FormatAsync(TestContext.Current.CancellationToken);
                published = null;
            }

            var (told, how) = await CutAsync(guest, disk, "publish", 1 + random.Next(MaxToldBefore), MaxEarlier, random);
            published = told ?? published;
            var (found, next, words) = await VerifyAsync(guest, disk);
            bool good = found is not null && (published is null || string.CompareOrdinal(found, published) >= 0);
            Say($"cut {cut}: {(fresh ? "a new disk; " : "")}{how}; told last: {published ?? "nothing"}; {words}{(good ? "" : ": FAILED")}");
            failed += good ? 0 : 1;
            published = good ? next : null;
        }

        Say($"{cuts} power cuts, {failed} failed");
        Assert.Equal(0, failed);
    }

    /// <summary>What the test above relies on: that what nobody has synced is gone.</summary>
    [Fact]
    public async Task A_snapshot_that_was_not_synced_does_not_survive_one()
    {
        var (random, guest, disk) = await BeginAsync();
        await disk.FormatAsync(TestContext.Current.CancellationToken);
        string how = (await CutAsync(guest, disk, "publish-without-sync", before: 1, earlier: 0, random)).How;
        string words = (await VerifyAsync(guest, disk)).Words;
        Say($"{how}; {words}");
        Assert.StartsWith("failed: ", words, StringComparison.Ordinal);
    }

    public void Dispose() => _directory.Dispose();

    private static int FromEnvironment(string name, int otherwise) =>
        Environment.GetEnvironmentVariable(name) is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : otherwise;

    private static void Say(string line) => TestContext.Current.TestOutputHelper!.WriteLine(line);

#pragma warning disable CA5394 // The same choices for the same seed.
    private async Task<(Random Random, MachineDescription Guest, LoggedDisk Disk)> BeginAsync()
    {
        int seed = FromEnvironment("POWER_CUT_SEED", Random.Shared.Next());
        Say($"POWER_CUT_SEED={seed}");
        var guest = new SnapshotStore(prepared.Home).FindNewest("python")!.Machine;
        await PowerCutMachine.MakeInitrdAsync(guest, InitrdPath, TestContext.Current.CancellationToken);
        return (new Random(seed), guest, new LoggedDisk(_directory.Path));
    }

    /// <summary>Cuts the power some time after the machine has begun to publish, or has told of a snapshot that it has published.</summary>
    /// <param name="before">Of how many it has told by then.</param>
    /// <param name="earlier">How much earlier the disk's power may fail, in writes and flushes.</param>
    /// <returns>Of which snapshot it told last.</returns>
    private async Task<(string? Told, string How)> CutAsync(MachineDescription guest, LoggedDisk disk, string mode, int before, int earlier, Random random)
    {
        int delayMs = random.Next(MaxDelayMs), lines = 0;
        await disk.PowerOnAsync(TestContext.Current.CancellationToken);
        using var machine = PowerCutMachine.Start(guest, InitrdPath, disk, mode);
        var told = new List<(string Id, long LogLength)>();
        while (await machine.ReadAsync("publish", "failed:", "dh init:", "ended") is { } line)
        {
            Assert.True(line.StartsWith("publish", StringComparison.Ordinal), $"The machine does not publish:\n{machine.Console}");
            if (line.StartsWith(Published, StringComparison.Ordinal))
            {
                told.Add((line[Published.Length..], disk.LogLength));
            }

            if (lines++ == before)
            {
                await Task.Delay(delayMs, TestContext.Current.CancellationToken);
                machine.Kill();
            }
        }

        await machine.EndedAsync();
        Assert.True(lines > before, $"The machine has ended before its power was cut:\n{machine.Console}");
        // Often just when it has told of one, which is then to stay: soon what belongs to the next takes it along to the disk.
        bool justTold = earlier > 0 && random.Next(3) == 0;
        var cut = disk.CutPower(justTold ? told[^1].LogLength : disk.LogLength, justTold ? 0 : earlier, random);
        return (
            told.LastOrDefault(snapshot => snapshot.LogLength <= cut.LogLength).Id,
            $"after {before} snapshots and {delayMs} ms; at flush {cut.Flushes}, of the writes after it {cut.Kept} kept, {cut.Lost} lost, {cut.Torn} torn");
    }

    private async Task<(string? Found, string? Next, string Words)> VerifyAsync(MachineDescription guest, LoggedDisk disk)
    {
        await disk.PowerOnAsync(TestContext.Current.CancellationToken);
        using var machine = PowerCutMachine.Start(guest, InitrdPath, disk, "verify");
        string? words = await machine.ReadAsync("verified ", "failed: ", "dh init:");
        while (await machine.ReadAsync() is not null)
        {
            // To its end.
        }

        await machine.EndedAsync();
        disk.PowerOff();
        return words is not null && Verified().Match(words) is { Success: true } match
            ? (match.Groups[1].Value, match.Groups[2].Value, words)
            : (null, null, words ?? $"The machine ended without a word:\n{machine.Console}");
    }

    [GeneratedRegex(@"^verified (\d+), published (\d+), ")]
    private static partial Regex Verified();
#pragma warning restore CA5394
}
