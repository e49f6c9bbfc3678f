using System.Globalization;
using Dh.IntegrationTests.Guests;
using Microsoft.Win32.SafeHandles;

namespace Dh.IntegrationTests.Pool;

/// <summary>What one clone has written into its memory is nowhere once it has ended.</summary>
public sealed class CanaryTests(PreparedHome prepared)
{
    private const int MinCopies = 200 * 60_000; // of 65,536 in each of 200 MiB: those that lie across two pages, the host does not see in one piece

    // The guest alone knows the bytes: they are printed in hexadecimal, and what the host makes of that it keeps the other way round.
    private const string Write = """
        import os, sys
        secret = os.urandom(16)
        blocks = [bytearray(secret * 65536) for _ in range(200)]
        with open('/tmp/secret', 'wb') as file:
            file.write(secret * 65536)
        print(secret[::-1].hex(), flush=True)
        sys.stdin.read()
        """;

    private static CancellationToken Test => TestContext.Current.CancellationToken;

    [Fact]
    public async Task What_a_clone_has_written_into_its_memory_is_nowhere_when_it_has_ended()
    {
        using var own = new OwnHome(prepared);
        await using var pool = await RunningPool.StartAsync(own.Dh, "-n", "1");
        byte[] reversed;
        using (var run = own.Dh.Start(["exec", "-c", Write]))
        {
            reversed = Convert.FromHexString((await run.StandardOutput.ReadLineAsync(Test))!);
            Assert.Equal(16, reversed.Length);
            Assert.InRange(CountInMemory(pool.HandedOutVmms().Single(), reversed), MinCopies, int.MaxValue); // it can be found where it is
            Assert.Equal(0, CountInMemory(pool.Daemon.Id, reversed)); // no byte of a run passes through the daemon
            run.StandardInput.Close();
            await run.WaitForExitAsync(Test);
            Assert.Equal(0, run.ExitCode);
        }

        await pool.WaitAsync("running", 0);
        await pool.WaitAsync("ready", 1);
        using (var next = own.Dh.Start(["exec", "-c", "import sys\nblocks = [bytearray(2**20) for _ in range(200)]\nprint(any(map(any, blocks)), flush=True)\nsys.stdin.read()"]))
        {
            Assert.Equal("False", await next.StandardOutput.ReadLineAsync(Test));
            int[] vmms = pool.HandedOutVmms();
            Assert.Equal(2, vmms.Distinct().Count());
            Assert.Equal(0, CountInMemory(vmms[1], reversed));
            next.StandardInput.Close();
            await next.WaitForExitAsync(Test);
        }

        Assert.Equal(0, CountInMemory(pool.Daemon.Id, reversed));
        foreach (string directory in (string[])[own.Dh.Home, Path.Combine(prepared.Home.Path, "vm"), prepared.Home.CacheDirectory])
        {
            // Locks and sockets are empty.
            foreach (string file in Directory.EnumerateFiles(directory, "*", SearchOption.AllDirectories).Where(file => new FileInfo(file).Length > 0))
            {
                using var handle = File.OpenHandle(file, share: FileShare.ReadWrite | FileShare.Delete);
                Assert.True(Count(handle, 0, RandomAccess.GetLength(handle), reversed) == 0, file);
            }
        }
    }

    /// <summary>How often it is in what a process has mapped and can be read.</summary>
    private static int CountInMemory(int process, byte[] reversed)
    {
        using var memory = File.OpenHandle($"/proc/{process}/mem");
        int count = 0;
        foreach (string line in File.ReadLines($"/proc/{process}/maps"))
        {
            // proc_pid_maps(5): 7f0000000000-7f0000001000 rw-p ...
            string[] fields = line.Split(' ', 3);
            if (fields[1][0] == 'r' && !line.EndsWith("[vvar]", StringComparison.Ordinal) && !line.EndsWith("[vsyscall]", StringComparison.Ordinal))
            {
                long[] range = [.. fields[0].Split('-').Select(address => long.Parse(address, NumberStyles.HexNumber, CultureInfo.InvariantCulture))];
                count += Count(memory, range[0], range[1] - range[0], reversed);
            }
        }

        return count;
    }

    private static int Count(SafeFileHandle file, long start, long length, byte[] reversed)
    {
        byte[] pattern = [.. reversed.Reverse()];
        byte[] buffer = new byte[(1 << 20) + pattern.Length - 1];
        int count = 0;
        try
        {
            for (long at = 0; at < length; at += 1 << 20)
            {
                // Each piece reaches into the next one by less than a pattern.
                int read = RandomAccess.Read(file, buffer.AsSpan(0, (int)Math.Min(buffer.Length, length - at)), start + at);
                for (int found, from = 0; (found = buffer.AsSpan(from, read - from).IndexOf(pattern)) >= 0; from += found + pattern.Length)
                {
                    count++;
                }
            }
        }
        catch (IOException)
        {
            // A mapping that cannot be read, as one beyond its file's end.
        }

        Array.Clear(pattern);
        return count;
    }
}
