using System.Runtime.InteropServices;

namespace Dh.IntegrationTests.Paging;

/// <summary>Guest memory as test/guest-memory-client.c hashes and changes it: FNV-1a over 64-bit words.</summary>
internal static class PageHashes
{
    public const int PageSize = 4096;

    /// <summary>The hash of a page that reads as zeros.</summary>
    public static readonly ulong ZeroPage = Hash(new byte[PageSize]);

    public static ulong Hash(ReadOnlySpan<byte> pages)
    {
        ulong hash = 14695981039346656037;
        foreach (ulong word in MemoryMarshal.Cast<byte, ulong>(pages))
        {
            hash = (hash ^ word) * 1099511628211;
        }

        return hash;
    }

    /// <summary>One hash per page.</summary>
    public static ulong[] HashPages(ReadOnlySpan<byte> memory)
    {
        ulong[] hashes = new ulong[memory.Length / PageSize];
        for (int page = 0; page < hashes.Length; page++)
        {
            hashes[page] = Hash(memory.Slice(page * PageSize, PageSize));
        }

        return hashes;
    }

    public static ulong[] HashFile(string path) => HashPages(File.ReadAllBytes(path));

    /// <summary>Does to a copy of guest memory what the client's `write` does to it.</summary>
    public static void Write(Span<byte> pages)
    {
        for (int at = 0; at < pages.Length; at += PageSize)
        {
            pages[at + 8]++;
        }
    }

    public static void AssertSame(ulong[] expected, ulong[] actual)
    {
        Assert.Equal(expected.Length, actual.Length);
        int[] differing = [.. Enumerable.Range(0, expected.Length).Where(page => expected[page] != actual[page])];
        Assert.True(differing.Length == 0, $"{differing.Length} of {expected.Length} pages differ, {differing.Count(page => actual[page] == ZeroPage)} of them are zero; first: {differing.FirstOrDefault()}");
    }
}
