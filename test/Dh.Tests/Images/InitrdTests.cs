using System.Text;
using Dh.Images;

namespace Dh.Tests.Images;

public sealed class InitrdTests
{
    private const UnixFileMode Mode755 = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute | UnixFileMode.GroupRead
        | UnixFileMode.GroupExecute | UnixFileMode.OtherRead | UnixFileMode.OtherExecute;

    [Fact]
    public void An_archive_has_the_bytes_that_the_kernels_documentation_says()
    {
        using var stream = new MemoryStream();
        var archive = new CpioWriter(stream);
        archive.AddDirectory("dev", Mode755);
        archive.AddCharacterDevice("dev/console", UnixFileMode.UserRead | UnixFileMode.UserWrite, 5, 1);
        archive.AddFile("init", Mode755, "hello"u8);
        archive.Finish();

        // Magic, then inode, mode, owner, group, links, time, size, device (2), own device (2), length of the name with its NUL, 0; then the name.
        Assert.Equal(
            """
            070701 00000001 000041ED 00000000 00000000 00000002 00000000 00000000 00000000 00000000 00000000 00000000 00000004 00000000 dev~~~
            070701 00000002 00002180 00000000 00000000 00000001 00000000 00000000 00000000 00000000 00000005 00000001 0000000C 00000000 dev/console~~~
            070701 00000003 000081ED 00000000 00000000 00000001 00000000 00000005 00000000 00000000 00000000 00000000 00000005 00000000 init~~hello~~~
            070701 00000000 00000000 00000000 00000000 00000001 00000000 00000000 00000000 00000000 00000000 00000000 0000000B 00000000 TRAILER!!!~~~~
            """.ReplaceLineEndings("").Replace(" ", "", StringComparison.Ordinal),
            Encoding.ASCII.GetString(stream.ToArray()).Replace('\0', '~'));
    }

    [Fact]
    public void The_initrd_lists_its_modules_in_load_order()
    {
        using var stream = new MemoryStream();
        Initrd.Write(
            stream, "ELF"u8, [new KernelModule("virtio", "a"u8.ToArray()), new KernelModule("virtio_blk", "b"u8.ToArray())], [new KernelModule("vsock", "c"u8.ToArray())]);
        string text = Encoding.ASCII.GetString(stream.ToArray());

        Assert.Contains("/modules/virtio.ko\n/modules/virtio_blk.ko\nvsock /modules/vsock.ko\n", text, StringComparison.Ordinal);
        Assert.Equal(
            [
                "dev", "proc", "sys", "run", "tmp", "root", "newroot", "modules", "dev/console", "init",
                "modules.list", "modules/virtio.ko", "modules/virtio_blk.ko", "modules/vsock.ko", "TRAILER!!!",
            ],
            text.Split("070701").Skip(1).Select(entry => entry[104..entry.IndexOf('\0', StringComparison.Ordinal)]));
    }

    [Fact]
    public void The_same_content_gives_the_same_bytes()
    {
        byte[][] archives = [.. Enumerable.Range(0, 2).Select(_ =>
        {
            using var stream = new MemoryStream();
            Initrd.Write(stream, "ELF"u8, [new KernelModule("virtio", "a"u8.ToArray())], []);
            return stream.ToArray();
        })];

        Assert.Equal(archives[0], archives[1]);
    }
}
