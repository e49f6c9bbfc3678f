using System.Buffers.Binary;
using System.IO.Compression;
using K4os.Compression.LZ4;

namespace Dh.Images;

/// <summary>
/// A distribution's kernel for x86 (<c>vmlinuz</c>): setup code, a small decompressor, and the kernel proper, compressed. A VMM that starts a
/// kernel without its setup code wants the kernel proper, the ELF file <c>vmlinux</c> (kernel: Documentation/arch/x86/boot.rst, "The Real-Mode
/// Kernel Header"; scripts/Makefile.lib, size_append).
/// </summary>
internal sealed class BzImage
{
    /// <summary>The largest file that is read, in bytes.</summary>
    internal const int MaxBytes = 256 << 20;

    /// <summary>The largest ELF file that is made, in bytes.</summary>
    internal const int MaxElfBytes = 512 << 20;

    private const int SectorSize = 512;
    private const int MinSetupSectors = 4; // what 0 stands for
    private const int PayloadVersion = 0x0208; // of the boot protocol: the first that tells where the payload is
    private const int HeaderEnd = 0x250;
    private const int SizeBytes = sizeof(uint);
    private const uint Lz4Magic = 0x184C2102; // the next two: lz4: doc/lz4_Frame_format.md, "Legacy frame"
    private const int MaxLz4BlockBytes = 8 << 20;
    private const string DecoderMemory = "256MiB"; // Debian's kernels take 32 MiB

    private readonly string _path;
    private readonly ReadOnlyMemory<byte> _payload;
    private readonly Compression _compression;

    private BzImage(string path, ReadOnlyMemory<byte> payload, Compression compression, int elfBytes)
    {
        _path = path;
        _payload = payload;
        _compression = compression;
        ElfBytes = elfBytes;
    }

    private enum Compression
    {
        Gzip,
        Xz,
        Zstd,
        Lz4Legacy,
    }

    /// <summary>How long the ELF file is, in bytes, as the payload's last four bytes have it.</summary>
    public int ElfBytes { get; }

    /// <summary>Reads one.</summary>
    /// <param name="path">The file.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: it is no bzImage, or is compressed in a way that is not known here; the
    /// message names the file.</exception>
    /// <exception cref="IOException">It cannot be read.</exception>
    public static async Task<BzImage> ReadAsync(string path, CancellationToken cancellationToken)
    {
        long length = new FileInfo(path).Length;
        return length <= MaxBytes
            ? Parse(path, await File.ReadAllBytesAsync(path, cancellationToken))
            : throw Wrong(path, $"it has {length} bytes, and the largest kernel that is unpacked has {MaxBytes}");
    }

    /// <summary>Writes the ELF file.</summary>
    /// <param name="target">Its path; what is there is replaced, and a failure leaves nothing there.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: the payload is damaged, or is no x86-64 kernel; the message names the file.
    /// <see cref="DhErrorReason.Host"/>: a program is not installed.</exception>
    /// <exception cref="IOException">The file cannot be written.</exception>
    public async Task UnpackAsync(string target, CancellationToken cancellationToken)
    {
        try
        {
            await (_compression switch
            {
                Compression.Gzip => UnpackGzipAsync(target, cancellationToken),
                Compression.Lz4Legacy => UnpackLz4Async(target, cancellationToken),
                // Neither is in .NET. xz is needed anyway, for compressed modules, and both programs check what they unpack; a library for each
                // would be in every start of dh for the sake of kernels that few have.
                Compression.Xz => UnpackByProgramAsync(target, ".xz", ["xz", "--decompress", "--force", "--memlimit-decompress=" + DecoderMemory], cancellationToken),
                _ => UnpackByProgramAsync(target, ".zst", ["zstd", "--decompress", "--force", "--quiet", "--memory=" + DecoderMemory], cancellationToken),
            });
            await CheckAsync(target, cancellationToken);
        }
        catch
        {
            File.Delete(target);
            throw;
        }
    }

    /// <summary>Finds the payload. Offsets are from the start of the file: setup_sects at 0x1F1, boot_flag 0x1FE, header 0x202, version 0x206,
    /// payload_offset 0x248, payload_length 0x24C.</summary>
    internal static BzImage Parse(string path, ReadOnlyMemory<byte> file)
    {
        var header = file.Span;
        if (header.Length < HeaderEnd || BinaryPrimitives.ReadUInt16LittleEndian(header[0x1FE..]) != 0xAA55 || !header[0x202..].StartsWith("HdrS"u8))
        {
            throw Wrong(path, "it has no setup header of an x86 kernel");
        }

        int version = BinaryPrimitives.ReadUInt16LittleEndian(header[0x206..]);
        if (version < PayloadVersion)
        {
            throw Wrong(path, $"its boot protocol is {version >> 8}.{version & 0xFF:00}, and only {PayloadVersion >> 8}.{PayloadVersion & 0xFF:00} and later tell where the payload is");
        }

        int setupSectors = header[0x1F1] == 0 ? MinSetupSectors : header[0x1F1];
        long start = ((setupSectors + 1L) * SectorSize) + BinaryPrimitives.ReadUInt32LittleEndian(header[0x248..]);
        long length = BinaryPrimitives.ReadUInt32LittleEndian(header[0x24C..]);
        if (length <= 2 * SizeBytes || start + length > file.Length)
        {
            throw Wrong(path, $"its header puts a payload of {length} bytes at {start}, and the file has {file.Length}");
        }

        var payload = file.Slice((int)start, (int)length);
        uint elfBytes = BinaryPrimitives.ReadUInt32LittleEndian(payload.Span[^SizeBytes..]);
        if (elfBytes > MaxElfBytes)
        {
            throw Wrong(path, $"its payload claims to be {elfBytes} bytes, and the largest kernel that is unpacked has {MaxElfBytes}");
        }

        var compression = CompressionOf(path, payload.Span);
        // gzip's own last four bytes are the size; to the others the kernel's build adds them.
        return new BzImage(path, compression == Compression.Gzip ? payload : payload[..^SizeBytes], compression, (int)elfBytes);
    }

    private static Compression CompressionOf(string path, ReadOnlySpan<byte> payload)
    {
        if (payload.StartsWith((ReadOnlySpan<byte>)[0x1F, 0x8B]))
        {
            return Compression.Gzip;
        }

        if (payload.StartsWith((ReadOnlySpan<byte>)[0xFD, (byte)'7', (byte)'z', (byte)'X', (byte)'Z', 0]))
        {
            return Compression.Xz;
        }

        return BinaryPrimitives.ReadUInt32LittleEndian(payload) switch
        {
            0xFD2FB528 => Compression.Zstd,
            Lz4Magic => Compression.Lz4Legacy,
            _ => throw Wrong(path, $"its payload begins with {Convert.ToHexString(payload[..6])}: it is compressed neither with gzip, XZ, zstd nor LZ4"),
        };
    }

    private static DhException Wrong(string path, string what, Exception? cause = null) =>
        new(DhErrorReason.Image, $"The kernel {path} cannot be unpacked: {what}.", cause);

    private DhException Damaged(string what, Exception? cause = null) => Wrong(_path, "its payload is damaged: " + what, cause);

    private async Task UnpackGzipAsync(string target, CancellationToken cancellationToken)
    {
        await using var output = File.Create(target);
        await using var input = new GZipStream(new MemoryStream(_payload.ToArray(), writable: false), CompressionMode.Decompress);
        byte[] buffer = new byte[1 << 20];
        try
        {
            for (int count; (count = await input.ReadAsync(buffer, cancellationToken)) > 0;)
            {
                if (output.Length + count > ElfBytes)
                {
                    throw Damaged($"it is longer than the {ElfBytes} bytes that it claims");
                }

                await output.WriteAsync(buffer.AsMemory(0, count), cancellationToken);
            }
        }
        catch (InvalidDataException error)
        {
            throw Damaged("gzip's form or checksum is wrong", error);
        }
    }

    // Blocks, each with its compressed length before it; the magic number may stand between two (kernel: lib/decompress_unlz4.c).
    private async Task UnpackLz4Async(string target, CancellationToken cancellationToken)
    {
        await using var output = File.Create(target);
        byte[] block = new byte[Math.Min(MaxLz4BlockBytes, ElfBytes)];
        for (var rest = _payload[SizeBytes..]; !rest.IsEmpty;)
        {
            uint length = rest.Length < SizeBytes ? uint.MaxValue : BinaryPrimitives.ReadUInt32LittleEndian(rest.Span);
            if (length == Lz4Magic)
            {
                rest = rest[SizeBytes..];
                continue;
            }

            if (length > rest.Length - SizeBytes)
            {
                throw Damaged($"an LZ4 block ends beyond it, {_payload.Length - rest.Length} bytes from its start");
            }

            int room = (int)Math.Min(block.Length, ElfBytes - output.Length);
            int count = LZ4Codec.Decode(rest.Span.Slice(SizeBytes, (int)length), block.AsSpan(0, room));
            if (count <= 0)
            {
                throw Damaged($"an LZ4 block is malformed or too long, {_payload.Length - rest.Length} bytes from its start");
            }

            await output.WriteAsync(block.AsMemory(0, count), cancellationToken);
            rest = rest[(SizeBytes + (int)length)..];
        }
    }

    // Both programs take their output's name from their input's. They are stopped where the file would become longer than it claims.
    private async Task UnpackByProgramAsync(string target, string extension, string[] command, CancellationToken cancellationToken)
    {
        string input = target + extension;
        try
        {
            await using (var stream = File.Create(input))
            {
                await stream.WriteAsync(_payload, cancellationToken);
            }

            var program = BuildCommand.Of(command[0], [.. command.AsSpan(1), "--keep", "--", input]);
            await (program with { Prefix = [BuildCommand.Locate("prlimit"), $"--fsize={ElfBytes}", "--"] }).RunAsync(cancellationToken);
        }
        catch (BuildCommandException error)
        {
            throw Damaged($"{command[0]} does not unpack it to {ElfBytes} bytes", error);
        }
        finally
        {
            File.Delete(input);
        }
    }

    // elf(5): e_ident, e_type 16 (ET_EXEC 2), e_machine 18 (EM_X86_64 62).
    private async Task CheckAsync(string target, CancellationToken cancellationToken)
    {
        byte[] header = new byte[20];
        using var file = File.OpenHandle(target);
        long length = RandomAccess.GetLength(file);
        if (length != ElfBytes)
        {
            throw Damaged($"it has {length} bytes, and claims {ElfBytes}");
        }

        int count = await RandomAccess.ReadAsync(file, header, fileOffset: 0, cancellationToken);
        if (count < header.Length || !header.AsSpan().StartsWith("\u007fELF\u0002\u0001"u8) ||
            BinaryPrimitives.ReadUInt16LittleEndian(header.AsSpan(16)) != 2 || BinaryPrimitives.ReadUInt16LittleEndian(header.AsSpan(18)) != 62)
        {
            throw Wrong(_path, "what is in it is no ELF file of an x86-64 kernel");
        }
    }
}
