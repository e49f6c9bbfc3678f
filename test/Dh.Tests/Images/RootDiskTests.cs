using Dh.Images;

namespace Dh.Tests.Images;

public sealed class RootDiskTests
{
    [Fact]
    public void The_file_system_is_made_with_nothing_left_to_the_hosts_configuration() => Assert.Equal(
        "-q -F -t ext4 -b 4096 -I 256 -N 200 -m 0 -L dh-root -U 6b1ddc2e-3a5b-4f0e-9d6c-2f1a6e9f7d10 " +
        "-O none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super,64bit " +
        "-E hash_seed=6b1ddc2e-3a5b-4f0e-9d6c-2f1a6e9f7d10,root_owner=0:0,no_copy_xattrs,nodiscard,lazy_itable_init=0 -d /t/root /t/root.img 5000",
        string.Join(' ', RootDisk.MakeArguments("/t/root", "/t/root.img", new RootDiskSize(Blocks: 5000, Inodes: 200))));

    [Fact]
    public void The_size_counts_files_in_whole_blocks_and_not_what_a_directory_measures_on_the_host()
    {
        var small = RootDisk.Measure("d 4096\nf 1\nf 4096\nf 4097\nl 7\n");
        var same = RootDisk.Measure("d 60\nf 1\nf 4096\nf 4097\nl 7\n");

        Assert.Equal(small, same);
        Assert.Equal(5 + 11 + 64, small.Inodes);

        // 1 + 1 + 1 + 2 + 1 of content, 5 of inodes, 2 of names, 2 % of that, and 1,024 to spare.
        Assert.Equal(6 + 5 + 2 + 1024, small.Blocks);
    }

    [Fact]
    public void Every_file_gets_the_same_three_times() => Assert.Equal(
        """
        set_inode_field <11> atime @1704067200
        set_inode_field <11> ctime @1704067200
        set_inode_field <11> mtime @1704067200
        set_inode_field <12> atime @1704067200
        set_inode_field <12> ctime @1704067200
        set_inode_field <12> mtime @1704067200

        """,
        RootDisk.TimesScript(usedInodes: 12));
}
