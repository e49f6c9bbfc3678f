using System.Buffers.Binary;
using System.Text;
using Dh.Images;
using Dh.TestSupport;

namespace Dh.Tests.Images;

public sealed class KernelModulesTests
{
    [Fact]
    public async Task Each_module_comes_after_all_that_it_needs_and_only_once()
    {
        using var directory = new TempDir();
        Add(directory, "drivers/virtio/virtio_ring.ko", "");
        Add(directory, "drivers/virtio/virtio.ko", "virtio_ring");
        Add(directory, "drivers/virtio/virtio_mmio.ko", "virtio_ring,virtio");
        Add(directory, "drivers/block/virtio_blk.ko", "virtio_ring,virtio");
        Add(directory, "drivers/other.ko", "");
        directory.Write("modules.builtin", "kernel/fs/ext4/ext4.ko\n");

        var modules = await KernelModules.Open(directory.Path).ReadInLoadOrderAsync(["virtio_mmio", "virtio_blk", "ext4"], TestContext.Current.CancellationToken);

        Assert.Equal(["virtio_ring", "virtio", "virtio_mmio", "virtio_blk"], modules.Select(module => module.Name));
    }

    [Fact]
    public async Task A_dash_in_a_files_name_is_an_underscore_in_the_modules()
    {
        using var directory = new TempDir();
        Add(directory, "virtio-rng.ko", "rng-core");
        Add(directory, "rng-core.ko", "");

        var modules = await KernelModules.Open(directory.Path).ReadInLoadOrderAsync(["virtio-rng"], TestContext.Current.CancellationToken);

        Assert.Equal(["rng_core", "virtio_rng"], modules.Select(module => module.Name));
    }

    [Fact]
    public async Task Modules_that_need_each_other_do_not_hang()
    {
        using var directory = new TempDir();
        Add(directory, "a.ko", "b");
        Add(directory, "b.ko", "a");

        var modules = await KernelModules.Open(directory.Path).ReadInLoadOrderAsync(["a"], TestContext.Current.CancellationToken);

        Assert.Equal(["b", "a"], modules.Select(module => module.Name));
    }

    [Fact]
    public async Task A_module_that_the_kernel_does_not_have_is_named()
    {
        using var directory = new TempDir();
        Add(directory, "virtio_blk.ko", "");

        var error = await Assert.ThrowsAsync<DhException>(
            () => KernelModules.Open(directory.Path).ReadInLoadOrderAsync(["virtio_bkl"], TestContext.Current.CancellationToken));
        Assert.Equal($"The kernel in {directory.Path} has no module virtio_bkl (did you mean 'virtio_blk'?).", error.Message);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(6)]
    [InlineData(64)]
    [InlineData(100)]
    public void A_module_that_is_cut_short_is_refused(int length)
    {
        byte[] module = Module("virtio")[..length];

        var error = Assert.Throws<DhException>(() => KernelModules.DependenciesOf(module, "m"));
        Assert.Equal("The kernel module m is damaged: it is no ELF file with a .modinfo section.", error.Message);
    }

    [Fact]
    public void No_damage_of_the_header_does_anything_but_an_error()
    {
        byte[] module = Module("virtio");
        for (int offset = 0; offset < module.Length; offset++)
        {
            byte[] damaged = [.. module];
            damaged[offset] ^= 0xFF;
            try
            {
                KernelModules.DependenciesOf(damaged, "m");
            }
            catch (DhException)
            {
                // As it should be. What is damaged elsewhere reads as other text.
            }
        }
    }

    private static void Add(TempDir directory, string path, string depends)
    {
        string file = directory["kernel/" + path];
        Directory.CreateDirectory(Path.GetDirectoryName(file)!);
        File.WriteAllBytes(file, Module(depends));
    }

    // An ELF file with three sections: the empty one, .modinfo and the sections' names.
    private static byte[] Module(string depends)
    {
        const int headerSize = 64;
        const int sectionSize = 64;
        byte[] names = "\0.modinfo\0.shstrtab\0"u8.ToArray();
        byte[] information = Encoding.ASCII.GetBytes($"license=GPL\0depends={depends}\0name=m\0");
        byte[] file = new byte[headerSize + names.Length + information.Length + (3 * sectionSize)];
        "\u007fELF\u0002\u0001\u0001"u8.CopyTo(file);
        int sections = headerSize + names.Length + information.Length;
        names.CopyTo(file, headerSize);
        information.CopyTo(file, headerSize + names.Length);
        BinaryPrimitives.WriteUInt64LittleEndian(file.AsSpan(0x28), (ulong)sections);
        BinaryPrimitives.WriteUInt16LittleEndian(file.AsSpan(0x3A), sectionSize);
        BinaryPrimitives.WriteUInt16LittleEndian(file.AsSpan(0x3C), 3);
        BinaryPrimitives.WriteUInt16LittleEndian(file.AsSpan(0x3E), 2);
        WriteSection(1, name: 1, headerSize + names.Length, information.Length);
        WriteSection(2, name: 10, headerSize, names.Length);
        return file;

        void WriteSection(int index, uint name, int offset, int size)
        {
            var header = file.AsSpan(sections + (index * sectionSize));
            BinaryPrimitives.WriteUInt32LittleEndian(header, name);
            BinaryPrimitives.WriteUInt64LittleEndian(header[0x18..], (ulong)offset);
            BinaryPrimitives.WriteUInt64LittleEndian(header[0x20..], (ulong)size);
        }
    }
}
