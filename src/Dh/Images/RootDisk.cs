using System.Buffers.Binary;
using System.Globalization;
using System.Text;

namespace Dh.Images;

/// <summary>How large a file system must be for a tree.</summary>
/// <param name="Blocks">Blocks of <see cref="RootDisk.BlockSize"/>.</param>
/// <param name="Inodes">Files, directories and all else.</param>
internal readonly record struct RootDiskSize(long Blocks, long Inodes);

/// <summary>
/// Writes a tree into an ext4 image, without mounting anything. Equal trees give equal bytes: every time in it is <see cref="TimeSeconds"/>, the
/// identifiers and the features are fixed.
/// </summary>
internal static class RootDisk
{
    /// <summary>The time of everything in the image, in seconds since 1970: 2024-01-01T00:00:00Z. Any time after 1980, which zip archives can express.</summary>
    public const long TimeSeconds = 1_704_067_200;

    /// <summary>Bytes of a block.</summary>
    public const int BlockSize = 4096;

    private const int InodeSize = 256;
    private const int FirstFileInode = 11; // lost+found; the ten before it are the file system's own
    private const int BytesPerEntry = 64; // of a directory: name, inode and padding, generously
    private const int SlackPercent = 2;
    private const int SlackBlocks = 1024;
    private const int SlackInodes = 64;

    // Which names files is of no consequence, but it must be the same in every build.
    private const string Identifier = "6b1ddc2e-3a5b-4f0e-9d6c-2f1a6e9f7d10";

    // All named, so that the host's mke2fs.conf has no say. No journal: it is mounted read-only. No checksums: the manifest has them, and
    // computing them is work for an emulated CPU.
    private const string Features = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super,64bit";

    /// <summary>Writes it.</summary>
    /// <param name="tree">The tree.</param>
    /// <param name="image">The file to make.</param>
    /// <param name="workspace">Where the tree's owners are known.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    public static async Task WriteAsync(string tree, string image, BuildNamespace workspace, CancellationToken cancellationToken)
    {
        string entries = await workspace.Enter(BuildCommand.Of("find", tree, "-xdev", "-printf", "%y %s\n")).RunAsync(cancellationToken);
        await workspace.Enter(AtFixedTime(new BuildCommand("mke2fs", [.. MakeArguments(tree, image, Measure(entries))]))).RunAsync(cancellationToken);

        // mke2fs copies each file's ctime and atime, which nobody can set on a file.
        string script = image + ".times";
        await File.WriteAllTextAsync(script, TimesScript(UsedInodes(image)), cancellationToken);
        await AtFixedTime(BuildCommand.Of("debugfs", "-w", "-f", script, image)).RunAsync(cancellationToken);
        File.Delete(script);
    }

    /// <summary>Sizes a file system from find's <c>%y %s</c> lines. Sizes of directories are the host file system's affair and do not count.</summary>
    internal static RootDiskSize Measure(string entries)
    {
        long blocks = 0;
        long inodes = 0;
        foreach (var range in entries.AsSpan().Split('\n'))
        {
            var line = entries.AsSpan(range);
            if (line.Length < 3)
            {
                continue;
            }

            inodes++;
            blocks += line[0] is 'f' or 'l' ? BlocksOf(long.Parse(line[2..], CultureInfo.InvariantCulture)) : 1;
        }

        inodes += FirstFileInode + SlackInodes;
        long all = blocks + BlocksOf(inodes * InodeSize) + BlocksOf(inodes * BytesPerEntry);
        return new RootDiskSize(all + (all * SlackPercent / 100) + SlackBlocks, inodes);

        static long BlocksOf(long bytes) => (bytes + BlockSize - 1) / BlockSize;
    }

    /// <summary>mke2fs(8)'s arguments.</summary>
    internal static IReadOnlyList<string> MakeArguments(string tree, string image, RootDiskSize size) =>
    [
        "-q", "-F", "-t", "ext4", "-b", $"{BlockSize}", "-I", $"{InodeSize}", "-N", $"{size.Inodes}", "-m", "0", "-L", "dh-root", "-U", Identifier,
        "-O", Features, "-E", $"hash_seed={Identifier},root_owner=0:0,no_copy_xattrs,nodiscard,lazy_itable_init=0", "-d", tree, image, $"{size.Blocks}",
    ];

    /// <summary>debugfs(8)'s commands that give every file the same times.</summary>
    internal static string TimesScript(long usedInodes)
    {
        var script = new StringBuilder();
        for (long inode = FirstFileInode; inode <= usedInodes; inode++)
        {
            foreach (string field in (ReadOnlySpan<string>)["atime", "ctime", "mtime"])
            {
                script.Append(CultureInfo.InvariantCulture, $"set_inode_field <{inode}> {field} @{TimeSeconds}\n");
            }
        }

        return script.ToString();
    }

    private static BuildCommand AtFixedTime(BuildCommand command) =>
        command.With("SOURCE_DATE_EPOCH", $"{TimeSeconds}").With("E2FSPROGS_FAKE_TIME", $"{TimeSeconds}");

    // The superblock at 1024: s_inodes_count at 0, s_free_inodes_count at 0x10 (kernel: Documentation/filesystems/ext4/super.rst). mke2fs hands
    // inodes out one after another.
    private static long UsedInodes(string image)
    {
        Span<byte> superblock = stackalloc byte[0x14];
        using var file = File.OpenHandle(image);
        RandomAccess.Read(file, superblock, fileOffset: 1024);
        return BinaryPrimitives.ReadUInt32LittleEndian(superblock) - BinaryPrimitives.ReadUInt32LittleEndian(superblock[0x10..]);
    }
}
