using System.Globalization;
using System.Text;

namespace Dh.Images;

/// <summary>
/// Writes a cpio archive of the "newc" kind, which the kernel unpacks as its first root (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
/// The same entries give the same bytes: time 0, owner 0, inodes counted from 1.
/// </summary>
internal sealed class CpioWriter(Stream stream)
{
    private const int RegularFile = 0x8000;
    private const int DirectoryKind = 0x4000;
    private const int CharacterDevice = 0x2000;
    private const int Alignment = 4;

    private int _inode;
    private long _position;

    /// <summary>Adds a directory; its parent must stand before it.</summary>
    public void AddDirectory(string path, UnixFileMode mode) => Add(path, DirectoryKind | (int)mode, links: 2, 0, 0, []);

    /// <summary>Adds a file.</summary>
    public void AddFile(string path, UnixFileMode mode, ReadOnlySpan<byte> content) => Add(path, RegularFile | (int)mode, links: 1, 0, 0, content);

    /// <summary>Adds a character device.</summary>
    public void AddCharacterDevice(string path, UnixFileMode mode, int major, int minor) => Add(path, CharacterDevice | (int)mode, links: 1, major, minor, []);

    /// <summary>Writes the end mark. The stream stays open.</summary>
    public void Finish()
    {
        _inode = -1; // the mark has inode 0
        Add("TRAILER!!!", 0, links: 1, 0, 0, []);
    }

    private void Add(string path, int mode, int links, int major, int minor, ReadOnlySpan<byte> content)
    {
        byte[] name = Encoding.UTF8.GetBytes(path + '\0');
        ReadOnlySpan<int> fields = [++_inode, mode, 0, 0, links, 0, content.Length, 0, 0, major, minor, name.Length, 0];
        var header = new StringBuilder("070701");
        foreach (int field in fields)
        {
            header.Append(CultureInfo.InvariantCulture, $"{field:X8}");
        }

        Write(Encoding.ASCII.GetBytes(header.ToString()));
        Write(name);
        Align();
        Write(content);
        Align();
    }

    private void Write(ReadOnlySpan<byte> bytes)
    {
        stream.Write(bytes);
        _position += bytes.Length;
    }

    private void Align() => Write(stackalloc byte[(int)(-_position & (Alignment - 1))]);
}
