using System.Buffers.Binary;
using System.Text;

namespace Dh.Images;

/// <summary>A kernel module, ready to be loaded.</summary>
/// <param name="Name">Its name, with underscores.</param>
/// <param name="Content">The ELF file, decompressed.</param>
internal sealed record KernelModule(string Name, ReadOnlyMemory<byte> Content);

/// <summary>
/// The modules of an unpacked kernel package. The package holds no modules.dep (depmod makes one where a kernel is installed), so what a module
/// needs is read where depmod reads it: in the module's own <c>.modinfo</c> section, which modpost wrote (kernel: scripts/mod/modpost.c, add_depends).
/// </summary>
internal sealed class KernelModules
{
    private readonly Dictionary<string, string> _paths;
    private readonly HashSet<string> _builtIn;
    private readonly string _directory;

    private KernelModules(string directory, Dictionary<string, string> paths, HashSet<string> builtIn)
    {
        _directory = directory;
        _paths = paths;
        _builtIn = builtIn;
    }

    /// <summary>Finds what there is.</summary>
    /// <param name="directory"><c>lib/modules/VERSION</c> of the package.</param>
    public static KernelModules Open(string directory)
    {
        string list = Path.Combine(directory, "modules.builtin");
        var builtIn = File.Exists(list) ? File.ReadLines(list).Select(NameOf) : [];
        var files = Directory.EnumerateFiles(Path.Combine(directory, "kernel"), "*.ko*", SearchOption.AllDirectories);
        return new KernelModules(directory, files.ToDictionary(NameOf, path => path, StringComparer.Ordinal), [.. builtIn]);
    }

    /// <summary>Modules and what they need, each after all that it needs; what is built into the kernel is left out.</summary>
    /// <param name="wanted">Names; a dash is an underscore.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: the kernel has no such module, or its file is damaged.</exception>
    public async Task<IReadOnlyList<KernelModule>> ReadInLoadOrderAsync(IEnumerable<string> wanted, CancellationToken cancellationToken)
    {
        var ordered = new List<KernelModule>();
        var seen = new HashSet<string>(StringComparer.Ordinal);
        foreach (string name in wanted)
        {
            await VisitAsync(NameOf(name));
        }

        return ordered;

        async Task VisitAsync(string name)
        {
            if (_builtIn.Contains(name) || !seen.Add(name))
            {
                return;
            }

            var content = await ReadAsync(name, cancellationToken);
            foreach (string needed in DependenciesOf(content.Span, name))
            {
                await VisitAsync(NameOf(needed));
            }

            ordered.Add(new KernelModule(name, content));
        }
    }

    /// <summary><c>kernel/drivers/char/virtio-rng.ko.xz</c> is the module <c>virtio_rng</c>.</summary>
    internal static string NameOf(string path)
    {
        string file = Path.GetFileName(path);
        int end = file.IndexOf(".ko", StringComparison.Ordinal);
        return (end < 0 ? file : file[..end]).Replace('-', '_');
    }

    /// <summary>What a module says that it needs: the <c>depends=</c> entry of its <c>.modinfo</c> section.</summary>
    internal static string[] DependenciesOf(ReadOnlySpan<byte> module, string name)
    {
        const string key = "depends=";
        string[] entries = Encoding.UTF8.GetString(Section(module, ".modinfo"u8, name)).Split('\0');
        string? depends = entries.FirstOrDefault(entry => entry.StartsWith(key, StringComparison.Ordinal));
        return depends?[key.Length..].Split(',', StringSplitOptions.RemoveEmptyEntries) ?? [];
    }

    // elf(5): a 64-bit little-endian file. e_shoff at 0x28, e_shentsize 0x3A, e_shnum 0x3C, e_shstrndx 0x3E; sh_name 0, sh_offset 0x18, sh_size 0x20.
    private static ReadOnlySpan<byte> Section(ReadOnlySpan<byte> elf, ReadOnlySpan<byte> wanted, string name)
    {
        try
        {
            if (elf.StartsWith("\u007fELF\u0002\u0001"u8))
            {
                int entrySize = BinaryPrimitives.ReadUInt16LittleEndian(elf[0x3A..]);
                int count = BinaryPrimitives.ReadUInt16LittleEndian(elf[0x3C..]);
                var headers = elf.Slice(checked((int)BinaryPrimitives.ReadUInt64LittleEndian(elf[0x28..])), checked(entrySize * count));
                var names = Content(elf, headers[(entrySize * BinaryPrimitives.ReadUInt16LittleEndian(elf[0x3E..]))..]);
                for (; !headers.IsEmpty; headers = headers[entrySize..])
                {
                    var text = names[(int)BinaryPrimitives.ReadUInt32LittleEndian(headers)..];
                    if (text[..text.IndexOf((byte)0)].SequenceEqual(wanted))
                    {
                        return Content(elf, headers);
                    }
                }
            }
        }
        catch (Exception error) when (error is ArgumentOutOfRangeException or OverflowException)
        {
            // Said below: a header that points out of the file is no module either.
        }

        throw new DhException(DhErrorReason.Image, $"The kernel module {name} is damaged: it is no ELF file with a .modinfo section.");

        static ReadOnlySpan<byte> Content(ReadOnlySpan<byte> elf, ReadOnlySpan<byte> header) => elf.Slice(
            checked((int)BinaryPrimitives.ReadUInt64LittleEndian(header[0x18..])), checked((int)BinaryPrimitives.ReadUInt64LittleEndian(header[0x20..])));
    }

    // init hands files to finit_module(2) as they are, so compressed ones (Debian 13: .ko.xz) are decompressed here.
    private async Task<ReadOnlyMemory<byte>> ReadAsync(string name, CancellationToken cancellationToken)
    {
        if (!_paths.TryGetValue(name, out string? path))
        {
            throw new DhException(DhErrorReason.Image, $"The kernel in {_directory} has no module {name}{Spelling.DidYouMean(name, _paths.Keys)}.");
        }

        string? decompressor = Path.GetExtension(path) switch { ".ko" => null, ".xz" => "xz", ".zst" => "zstd", _ => "gzip" };
        if (decompressor is not null)
        {
            await BuildCommand.Of(decompressor, "--decompress", "--quiet", "--force", "--keep", path).RunAsync(cancellationToken);
            path = Path.Combine(Path.GetDirectoryName(path)!, Path.GetFileNameWithoutExtension(path));
        }

        return await File.ReadAllBytesAsync(path, cancellationToken);
    }
}
