using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;

namespace Dh.Images;

/// <summary>
/// The identity of what a build is given: SHA-256 over everything that goes into the image, each part with its length before it. Comments, blank
/// lines and the order of packages in a template count for nothing, nor does what only preparing uses (memory size, record code).
/// </summary>
internal sealed class ImageHash : IDisposable
{
    /// <summary>Counted up when the same inputs are built into something else.</summary>
    private const string Recipe = "dh image recipe 2";

    private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);

    private ImageHash()
    {
    }

    /// <summary>64 hexadecimal digits.</summary>
    /// <param name="template">The template.</param>
    /// <param name="requirements">All Python requirements.</param>
    /// <param name="guest">The guest's files.</param>
    /// <param name="wheelhouse">Where wheels come from, if from a directory.</param>
    /// <exception cref="IOException">A file cannot be read.</exception>
    public static string Compute(Template template, IReadOnlyList<string> requirements, GuestFiles guest, string? wheelhouse)
    {
        using var hash = new ImageHash();
        hash.AddAll(Recipe, AptSource.Architecture, template.Name, template.Engine, template.Version ?? "", template.Suite, template.WarmupCode, template.RestoreCode);
        hash.AddAll([.. template.Packages.Distinct().Order(StringComparer.Ordinal)]);
        hash.AddAll([.. requirements.Order(StringComparer.Ordinal)]);
        hash.AddAll([.. template.JvmArguments]);
        hash.AddAll([.. KernelPackage.GuestModules]);
        hash.AddAll([.. KernelPackage.VsockModules]);
        foreach (string file in guest.All.OrderBy(Path.GetFileName, StringComparer.Ordinal))
        {
            hash.Add(Encoding.UTF8.GetBytes(Path.GetFileName(file)));
            hash.Add(File.ReadAllBytes(file));
        }

        if (wheelhouse is not null && requirements.Count > 0)
        {
            var wheels = new DirectoryInfo(wheelhouse).EnumerateFiles("*.whl").OrderBy(wheel => wheel.Name, StringComparer.Ordinal);
            hash.AddAll([.. wheels.Select(wheel => $"{wheel.Name} {wheel.Length}")]);
        }

        return Convert.ToHexStringLower(hash._hash.GetHashAndReset());
    }

    /// <summary>Frees it.</summary>
    public void Dispose() => _hash.Dispose();

    private void AddAll(params ReadOnlySpan<string> texts)
    {
        AddLength(texts.Length);
        foreach (string text in texts)
        {
            Add(Encoding.UTF8.GetBytes(text));
        }
    }

    private void Add(ReadOnlySpan<byte> bytes)
    {
        AddLength(bytes.Length);
        _hash.AppendData(bytes);
    }

    private void AddLength(int length)
    {
        Span<byte> bytes = stackalloc byte[sizeof(int)];
        BinaryPrimitives.WriteInt32LittleEndian(bytes, length);
        _hash.AppendData(bytes);
    }
}
