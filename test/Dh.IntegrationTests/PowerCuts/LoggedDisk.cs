using System.Buffers.Binary;
using System.Diagnostics;
using Microsoft.Win32.SafeHandles;

namespace Dh.IntegrationTests.PowerCuts;

/// <summary>
/// A disk with a write cache that a power cut empties. QEMU logs each write and each flush before it does it (driver blklogwrites; the format is
/// dm-log-writes', kernel: drivers/md/dm-log-writes.c). What was written before the last flush is on the disk after a cut; of what came later,
/// each write is there, is not, or is there in part, by chance.
/// </summary>
/// <param name="directory">Where its files are.</param>
internal sealed class LoggedDisk(string directory)
{
    private const long Bytes = 128 << 20;
    private const int SectorLength = 512;
    private const int BlockSectors = 8; // a disk writes its blocks of 4 KiB whole, and ext4 cannot mount one whose superblock is not
    private const ulong FlushFlag = 1, NoDataFlags = 4 | 8; // discard, mark

    private readonly string _disk = Path.Combine(directory, "disk.img"), _live = Path.Combine(directory, "live.img"), _log = Path.Combine(directory, "log");

    /// <summary>
    /// The value of QEMU's option -blockdev for the node <c>disk</c>. The host's power is not cut: for the files that play the disk, flushes have
    /// no meaning.
    /// </summary>
    public string BlockDevice =>
        $"driver=blklogwrites,node-name=disk,file.driver=file,file.filename={_live},file.cache.no-flush=on,log.driver=file,log.filename={_log},log.cache.no-flush=on";

    /// <summary>How much has been logged: what is said now was done before what is logged next.</summary>
    public long LogLength => new FileInfo(_log).Length;

    /// <summary>Makes an ext4 file system on it as mke2fs makes one by itself, journal and all, but with the block size of larger ones.</summary>
    public async Task FormatAsync(CancellationToken cancellationToken)
    {
        File.Delete(_disk);
        using (var file = File.OpenHandle(_disk, FileMode.CreateNew, FileAccess.Write))
        {
            RandomAccess.SetLength(file, Bytes);
        }

        using var mke2fs = Process.Start("/sbin/mke2fs", ["-q", "-F", "-t", "ext4", "-b", "4096", _disk]);
        await mke2fs.WaitForExitAsync(cancellationToken);
        Assert.Equal(0, mke2fs.ExitCode);
    }

    /// <summary>Before a machine starts: it writes to a copy, and to a new log.</summary>
    public async Task PowerOnAsync(CancellationToken cancellationToken)
    {
        await File.WriteAllBytesAsync(_log, [], cancellationToken);
        using var cp = Process.Start("/bin/cp", ["--sparse=always", _disk, _live]);
        await cp.WaitForExitAsync(cancellationToken);
        Assert.Equal(0, cp.ExitCode);
    }

    /// <summary>After a machine has ended by itself: all that it wrote is there.</summary>
    public void PowerOff() => File.Move(_live, _disk, overwrite: true);

    /// <summary>
    /// After a machine was killed: what is on the disk when its power fails at one of the last writes and flushes. Each is as likely; by the clock most
    /// cuts would fall where a processor is busy and the disk is not.
    /// </summary>
    /// <param name="logLength">How much had been logged: all, or less at an earlier moment.</param>
    /// <param name="most">At most so many writes and flushes before that.</param>
    /// <param name="random">Decides on the moment, and on each write that was not flushed by then.</param>
    public DiskCut CutPower(long logLength, int most, Random random)
    {
        using var log = File.OpenHandle(_log);
        using var disk = File.OpenHandle(_disk, FileMode.Open, FileAccess.Write);
        var entries = ReadEntries(log, logLength);
#pragma warning disable CA5394 // The same choice for the same seed.
        int gone = random.Next(Math.Min(entries.Count, most) + 1);
        entries.RemoveRange(entries.Count - gone, gone);
        int flushed = entries.FindLastIndex(entry => (entry.Flags & FlushFlag) != 0);
        int kept = 0, lost = 0, torn = 0;
        for (int number = 0; number < entries.Count; number++)
        {
            var (sector, sectors, data, _) = entries[number];
            int written = sectors;
            if (number > flushed)
            {
                written = random.Next(3) switch { 0 => 0, 1 => sectors, _ => random.Next(sectors + 1) / BlockSectors * BlockSectors };
                kept += written == sectors ? 1 : 0;
                lost += written == 0 ? 1 : 0;
                torn += written != sectors && written != 0 ? 1 : 0;
            }

            byte[] bytes = new byte[written * SectorLength];
            Assert.Equal(bytes.Length, RandomAccess.Read(log, bytes, data));
            RandomAccess.Write(disk, bytes, sector * SectorLength);
        }
#pragma warning restore CA5394

        long end = entries.Count == 0 ? 0 : entries[^1].Data + ((long)entries[^1].Sectors * SectorLength);
        return new DiskCut(end, entries.Count(entry => (entry.Flags & FlushFlag) != 0), kept, lost, torn);
    }

    /// <summary>The log's writes and flushes, in order. The superblock counts fewer: QEMU writes it with a flush. What ends in the middle was never logged.</summary>
    private static List<Entry> ReadEntries(SafeFileHandle log, long length)
    {
        var entries = new List<Entry>();
        byte[] head = new byte[32];
        for (long at = SectorLength; at + SectorLength <= length && RandomAccess.Read(log, head, at) == head.Length;)
        {
            ulong flags = Field(head, 2);
            long sector = (long)Field(head, 0);
            int sectors = (int)Field(head, 1);
            Assert.True((flags & NoDataFlags) == 0 && sector + sectors <= Bytes / SectorLength, $"{flags:x} {sector} {sectors} at {at} is no entry of a log.");
            long data = at + SectorLength;
            at = data + ((long)sectors * SectorLength);
            if (at <= length)
            {
                entries.Add(new Entry(sector, sectors, data, flags));
            }
        }

        return entries;
    }

    private static ulong Field(byte[] head, int number) => BinaryPrimitives.ReadUInt64LittleEndian(head.AsSpan(number * sizeof(ulong)));

    /// <summary>A write of so many sectors, whose data stand in the log at that offset.</summary>
    private readonly record struct Entry(long Sector, int Sectors, long Data, ulong Flags);
}

/// <summary>A moment in a disk's life, and what became of the writes after its last flush.</summary>
/// <param name="LogLength">Bytes of the log until then.</param>
/// <param name="Flushes">Flushes until then.</param>
internal readonly record struct DiskCut(long LogLength, int Flushes, int Kept, int Lost, int Torn);
