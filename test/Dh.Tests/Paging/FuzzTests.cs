using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;
using Dh.Paging;
using Dh.TestSupport;

namespace Dh.Tests.Paging;

/// <summary>
/// What strangers write - a VMM's handshake, a working set's file - is parsed or refused, whatever it is. `make fuzz` runs a million inputs;
/// input i of seed s is input 0 of seed s + i.
/// </summary>
#pragma warning disable CA5394 // The same input for the same seed.
public sealed class FuzzTests : IDisposable
{
    private const int Page = 4096;
    private const int HeaderLength = 96;
    private const int MemoryLength = 64 * Page;
    private const string Id = "fuzz";

    /// <summary>What one input may allocate: far above what is needed, far below what a forged length asks for.</summary>
    private const long MaxAllocated = 1 << 20;

    private static readonly string[] Handshakes =
    [
        """[{"base_host_virt_addr":139637976727552,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]""",
        """[{"base_host_virt_addr":4096,"size":8192,"offset":0},{"base_host_virt_addr":65536,"size":4096,"offset":8192,"page_size":2097152}]""",
        """[{"new":{"deep":[1,2,{"a":"]"}]},"base_host_virt_addr":18446744073709551615,"more":null,"size":0,"offset":1}] [] """,
    ];

    private static readonly long[] Numbers = [0, 1, -1, 2, 16, 95, 96, Page - 1, Page, -Page, 1 << 20, int.MaxValue, int.MinValue, uint.MaxValue, long.MaxValue, long.MinValue, long.MaxValue - Page + 1, MemoryLength, MemoryLength - Page];

    private readonly TempDir _directory = new();

    [Fact]
    public void A_handshake_is_read_or_refused_whatever_it_is()
    {
        byte[][] valid = [.. Handshakes.Select(Encoding.UTF8.GetBytes)];
        int read = Run(random => random.Next(8) == 0 ? Fuzz.Noise(random) : Fuzz.Mutate(random, [.. valid[random.Next(valid.Length)]]), input =>
        {
            if (HandshakeMessage.TryParse(input) is not { } regions)
            {
                return false;
            }

            Assert.InRange(regions.Count, 0, HandshakeMessage.MaxRegions);
            GuestRegion.Validate(regions, long.MaxValue);
            return true;
        });
        Assert.NotEqual(0, read);
    }

    [Fact]
    public void A_working_set_is_read_or_refused_whatever_it_is()
    {
        byte[] valid = WorkingSetBytes();
        int read = Run(random => random.Next(16) == 0 ? Fuzz.Noise(random) : Forge(random, [.. valid]), input =>
        {
            var file = WorkingSetFile.Parse("fuzz", (offset, buffer) => Read(input, offset, buffer), input.Length, Id, MemoryLength);
            Assert.Equal(input.Length, file.PagesOffset + file.Set.TouchedBytes);
            Assert.All(file.Set.Touched.Concat(file.Set.Written), run => Assert.True(run.Offset >= 0 && run.Length > 0 && run.End <= MemoryLength));
            return true;
        });
        Assert.NotEqual(0, read);
    }

    public void Dispose() => _directory.Dispose();

    /// <summary>Tries as many inputs as are asked for; returns how many were read.</summary>
    private static int Run(Func<Random, byte[]> make, Func<byte[], bool> read)
    {
        var (count, seed) = Fuzz.Ask();
        int accepted = 0;
        for (int i = 0; i < count; i++)
        {
            int at = unchecked(seed + i);
            byte[] input = make(new Random(at));
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                accepted += read(input) ? 1 : 0;
            }
            catch (PageServerException)
            {
                // A refusal is right.
            }
            catch (Exception e)
            {
                throw new InvalidOperationException($"FUZZ_SEED={at} FUZZ_COUNT=1: {e.GetType()}: {e.Message}", e);
            }

            long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            Assert.True(allocated <= MaxAllocated, $"FUZZ_SEED={at} FUZZ_COUNT=1: {allocated} bytes were allocated for {input.Length} bytes of input.");
        }

        return count >= 1000 ? accepted : 1; // a few inputs may all be refused
    }

    /// <summary>Mutates a working set's numbers, and mostly makes its hashes right again: else nothing behind them would ever be reached.</summary>
    private static byte[] Forge(Random random, byte[] bytes)
    {
        for (int rounds = random.Next(4); rounds > 0; rounds--)
        {
            int at = random.Next(3) == 0 ? random.Next(bytes.Length) : random.Next(256);
            switch (random.Next(4))
            {
                case 0 when at + 8 <= bytes.Length:
                    BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(at & ~7), Numbers[random.Next(Numbers.Length)]);
                    break;
                case 1 when at + 4 <= bytes.Length:
                    BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan(at & ~3), (int)Numbers[random.Next(Numbers.Length)]);
                    break;
                case 2 when random.Next(4) == 0:
                    bytes = random.Next(2) == 0 ? bytes[..random.Next(bytes.Length + 1)] : [.. bytes, .. new byte[random.Next(2) == 0 ? 1 : Page]];
                    break;
                default:
                    bytes = Fuzz.Flip(bytes, at, 1 << random.Next(8));
                    break;
            }

            if (bytes.Length < HeaderLength)
            {
                return bytes;
            }
        }

        if (bytes.Length >= HeaderLength && random.Next(8) != 0)
        {
            long runs = BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(24)) + (long)BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(28));
            ulong chunks = (BinaryPrimitives.ReadUInt64LittleEndian(bytes.AsSpan(40)) + (WorkingSetFile.ChunkLength - 1)) / WorkingSetFile.ChunkLength;
            decimal tables = (runs * 16m) + (chunks * 8m);
            if (tables <= bytes.Length - HeaderLength)
            {
                BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(80), XxHash3.HashToUInt64(bytes.AsSpan(HeaderLength, (int)tables)));
            }

            BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(88), XxHash3.HashToUInt64(bytes.AsSpan(0, 88)));
        }

        return bytes;
    }

    private static int Read(byte[] bytes, long offset, Span<byte> buffer)
    {
        int at = (int)Math.Clamp(offset, 0, bytes.Length), length = Math.Min(buffer.Length, bytes.Length - at);
        bytes.AsSpan(at, length).CopyTo(buffer);
        return length;
    }

    private byte[] WorkingSetBytes()
    {
        string path = _directory["working-set"];
        var set = WorkingSet.Combine(Id, MemoryLength, [[5 * Page, 6 * Page, 0, 40 * Page]], [new long[] { 0, Page, 63 * Page }]);
        WorkingSetFile.Write(path, set, (_, buffer) => buffer.Length);
        return File.ReadAllBytes(path);
    }
}
