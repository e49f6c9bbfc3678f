using System.Buffers.Binary;
using System.IO.Compression;
using Dh.Images;
using Dh.TestSupport;
using K4os.Compression.LZ4;

namespace Dh.Tests.Images;

public sealed class BzImageTests
{
    private const int PayloadOffset = 0x2C0; // from where the setup code ends
    private const int SetupSectors = 5;
    private const int PayloadStart = ((SetupSectors + 1) * 512) + PayloadOffset;

    // More than one block of LZ4's legacy form.
    private static readonly byte[] Elf = MakeElf((8 << 20) + 123_457);
    private static readonly byte[] SmallElf = MakeElf(20_001);

    public static TheoryData<string> Formats => ["gzip", "lz4", "xz", "zstd"];

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_kernel_is_unpacked_whole(string format)
    {
        using var directory = new TempDir();

        byte[] unpacked = await UnpackAsync(directory, await KernelAsync(directory, format, Elf));

        Assert.True(Elf.AsSpan().SequenceEqual(unpacked));
        Assert.Equal(["vmlinux", "vmlinuz"], FilesOf(directory));
    }

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_payload_that_is_cut_is_an_error_that_names_the_file(string format)
    {
        using var directory = new TempDir();
        byte[] payload = (await CompressAsync(directory, format, SmallElf))[..^4];
        foreach (int length in (int[])[6, 7, 8, 11, 20, payload.Length / 2, payload.Length - 1])
        {
            byte[] cut = Kernel([.. payload.AsSpan(0, length), .. Size(SmallElf.Length)]);

            var error = await FailsAsync(directory, cut);

            Assert.StartsWith($"The kernel {directory["vmlinuz"]} cannot be unpacked: its payload is damaged: ", error.Message, StringComparison.Ordinal);
        }
    }

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_flipped_bit_is_an_error_or_changes_contents_that_nothing_guards(string format)
    {
        using var directory = new TempDir();
        byte[] kernel = await KernelAsync(directory, format, SmallElf);
        int step = Math.Max(1, (kernel.Length - PayloadStart) / 40);
        for (int offset = PayloadStart; offset < kernel.Length; offset += step)
        {
            byte[] flipped = [.. kernel];
            flipped[offset] ^= 1;
            try
            {
                byte[] unpacked = await UnpackAsync(directory, flipped);
                // LZ4's legacy form has no checksum: image.json has the kernel's. What flips a header's hint (gzip: its time) changes nothing.
                Assert.True(format == "lz4" ? unpacked.Length == SmallElf.Length : unpacked.AsSpan().SequenceEqual(SmallElf), $"the bit at {offset}");
            }
            catch (DhException error)
            {
                Assert.Contains(directory["vmlinuz"], error.Message, StringComparison.Ordinal);
                Assert.Equal(DhErrorReason.Image, error.Reason);
            }
        }
    }

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_payload_never_takes_more_room_than_it_claims(string format)
    {
        using var directory = new TempDir();
        byte[] payload = await CompressAsync(directory, format, Elf);
        BinaryPrimitives.WriteInt32LittleEndian(payload.AsSpan(payload.Length - 4), 1 << 20);

        await FailsAsync(directory, Kernel(payload));
    }

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_payload_that_claims_more_than_there_is_is_damaged(string format)
    {
        using var directory = new TempDir();
        byte[] payload = await CompressAsync(directory, format, SmallElf);
        BinaryPrimitives.WriteInt32LittleEndian(payload.AsSpan(payload.Length - 4), SmallElf.Length + 1);

        await FailsAsync(directory, Kernel(payload));
    }

    [Theory]
    [InlineData(0, "its payload is damaged: an LZ4 block is malformed or too long, 4 bytes from its start")]
    [InlineData(uint.MaxValue, "its payload is damaged: an LZ4 block ends beyond it, 4 bytes from its start")]
    public async Task A_block_of_an_impossible_length_is_refused(uint length, string expected)
    {
        using var directory = new TempDir();
        byte[] payload = await CompressAsync(directory, "lz4", SmallElf);
        BinaryPrimitives.WriteUInt32LittleEndian(payload.AsSpan(4), length);

        var error = await FailsAsync(directory, Kernel(payload));
        Assert.Equal($"The kernel {directory["vmlinuz"]} cannot be unpacked: {expected}.", error.Message);
    }

    [Fact]
    public async Task What_is_in_it_must_be_an_x86_64_kernel()
    {
        using var directory = new TempDir();
        foreach (int offset in (int[])[0, 4, 5, 16, 18])
        {
            byte[] other = [.. SmallElf];
            other[offset] ^= 0x40;

            var error = await FailsAsync(directory, await KernelAsync(directory, "lz4", other));
            Assert.Equal($"The kernel {directory["vmlinuz"]} cannot be unpacked: what is in it is no ELF file of an x86-64 kernel.", error.Message);
        }
    }

    [Fact]
    public async Task A_file_that_is_no_kernel_is_refused()
    {
        byte[] kernel = Kernel([.. "\u0002\u0021\u004C\u0018"u8, .. new byte[60]]);

        AssertRefused(kernel[..0x24F], "it has no setup header of an x86 kernel");
        AssertRefused(With(kernel, 0x1FE, 0), "it has no setup header of an x86 kernel");
        AssertRefused(With(kernel, 0x202, (byte)'h'), "it has no setup header of an x86 kernel");
        AssertRefused(With(kernel, 0x206, 7), "its boot protocol is 2.07, and only 2.08 and later tell where the payload is");
        AssertRefused(kernel[..^1], $"its header puts a payload of 64 bytes at {PayloadStart}, and the file has {kernel.Length - 1}");
        AssertRefused(With(kernel, 0x24B, 0xFF), $"its header puts a payload of 64 bytes at {PayloadStart + 0xFF000000L}, and the file has {kernel.Length}");
        AssertRefused(With(kernel, 0x24C, 8), $"its header puts a payload of 8 bytes at {PayloadStart}, and the file has {kernel.Length}");
        AssertRefused(With(kernel, kernel.Length - 1, 0x7F), $"its payload claims to be {0x7F000000} bytes, and the largest kernel that is unpacked has {BzImage.MaxElfBytes}");
        AssertRefused(With(kernel, PayloadStart, (byte)'B'), "its payload begins with 42214C180000: it is compressed neither with gzip, XZ, zstd nor LZ4");

        using var directory = new TempDir();
        using (var sparse = File.Create(directory["vmlinuz"]))
        {
            sparse.SetLength(BzImage.MaxBytes + 1L);
        }

        var error = await Assert.ThrowsAsync<DhException>(() => BzImage.ReadAsync(directory["vmlinuz"], Token));
        Assert.Equal($"The kernel {directory["vmlinuz"]} cannot be unpacked: it has {BzImage.MaxBytes + 1} bytes, and the largest kernel that is unpacked has {BzImage.MaxBytes}.", error.Message);
    }

    [Fact]
    public void No_setup_sectors_mean_four()
    {
        byte[] kernel = Kernel([.. "\u0002\u0021\u004C\u0018"u8, .. new byte[60]]);
        byte[] moved = [.. kernel.AsSpan(0, 1024), .. kernel.AsSpan(1536)]; // one sector less
        moved[0x1F1] = 0;

        Assert.Equal(0, BzImage.Parse("vmlinuz", moved).ElfBytes);
    }

    private static void AssertRefused(byte[] kernel, string expected)
    {
        var error = Assert.Throws<DhException>(() => BzImage.Parse("/boot/vmlinuz", kernel));
        Assert.Equal($"The kernel /boot/vmlinuz cannot be unpacked: {expected}.", error.Message);
    }

    private static async Task<DhException> FailsAsync(TempDir directory, byte[] kernel)
    {
        var error = await Assert.ThrowsAsync<DhException>(() => UnpackAsync(directory, kernel));
        Assert.Equal(["vmlinuz"], FilesOf(directory));
        return error;
    }

    private static async Task<byte[]> UnpackAsync(TempDir directory, byte[] kernel)
    {
        File.Delete(directory["vmlinux"]);
        await File.WriteAllBytesAsync(directory["vmlinuz"], kernel, Token);
        await (await BzImage.ReadAsync(directory["vmlinuz"], Token)).UnpackAsync(directory["vmlinux"], Token);
        return await File.ReadAllBytesAsync(directory["vmlinux"], Token);
    }

    private static string[] FilesOf(TempDir directory) =>
        [.. Directory.EnumerateFiles(directory.Path).Select(file => Path.GetFileName(file)).Order(StringComparer.Ordinal)];

    private static byte[] With(byte[] bytes, int offset, byte value)
    {
        byte[] changed = [.. bytes];
        changed[offset] = value;
        return changed;
    }

    private static async Task<byte[]> KernelAsync(TempDir directory, string format, byte[] elf) => Kernel(await CompressAsync(directory, format, elf));

    private static byte[] Kernel(byte[] payload)
    {
        byte[] kernel = new byte[PayloadStart + payload.Length];
        kernel[0x1F1] = SetupSectors;
        BinaryPrimitives.WriteUInt16LittleEndian(kernel.AsSpan(0x1FE), 0xAA55);
        "HdrS"u8.CopyTo(kernel.AsSpan(0x202));
        BinaryPrimitives.WriteUInt16LittleEndian(kernel.AsSpan(0x206), 0x020F);
        BinaryPrimitives.WriteInt32LittleEndian(kernel.AsSpan(0x248), PayloadOffset);
        BinaryPrimitives.WriteInt32LittleEndian(kernel.AsSpan(0x24C), payload.Length);
        payload.CopyTo(kernel, PayloadStart);
        return kernel;
    }

    // As the kernel's build does it (scripts/Makefile.lib): with the size after all but gzip's, which has it.
    private static async Task<byte[]> CompressAsync(TempDir directory, string format, byte[] elf)
    {
        if (format is "gzip")
        {
            using var gzip = new MemoryStream();
            await using (var compressor = new GZipStream(gzip, CompressionLevel.Fastest, leaveOpen: true))
            {
                await compressor.WriteAsync(elf, Token);
            }

            return gzip.ToArray();
        }

        if (format is "lz4")
        {
            return [.. Size(0x184C2102), .. elf.Chunk(8 << 20).SelectMany(Block), .. Size(elf.Length)];
        }

        string file = directory["payload"];
        await File.WriteAllBytesAsync(file, elf, Token);
        string[] arguments = format == "xz" ? ["--check=crc32", "--x86", "--lzma2=preset=1,dict=32MiB", file] : ["-1", "--quiet", file];
        await BuildCommand.Of(format, arguments).RunAsync(Token);
        File.Delete(file);
        string compressed = file + (format == "xz" ? ".xz" : ".zst");
        byte[] bytes = await File.ReadAllBytesAsync(compressed, Token);
        File.Delete(compressed);
        return [.. bytes, .. Size(elf.Length)];
    }

    private static byte[] Block(byte[] contents)
    {
        byte[] block = new byte[LZ4Codec.MaximumOutputSize(contents.Length)];
        int length = LZ4Codec.Encode(contents, block);
        return [.. Size(length), .. block.AsSpan(0, length)];
    }

    private static byte[] Size(int value)
    {
        byte[] bytes = new byte[4];
        BinaryPrimitives.WriteInt32LittleEndian(bytes, value);
        return bytes;
    }

    private static byte[] MakeElf(int length)
    {
        byte[] elf = new byte[length];
        var random = new Random(1);
        for (int offset = 64; offset < length; offset += 512)
        {
            random.NextBytes(elf.AsSpan(offset, Math.Min(128, length - offset))); // three quarters are zeros
        }

        "\u007fELF\u0002\u0001\u0001"u8.CopyTo(elf);
        elf[16] = 2;
        elf[18] = 62;
        return elf;
    }
}
