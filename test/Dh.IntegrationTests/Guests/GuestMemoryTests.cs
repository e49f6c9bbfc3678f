using System.Text;
using Dh.Guest;
using Dh.Images;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>
/// A guest with 256 MiB of known contents in its snapshot and a balloon: whatever brings its memory back, every byte is what it was, also
/// while it gives memory back and takes it again.
/// </summary>
public sealed class GuestMemoryTests(PreparedHome prepared) : IDisposable
{
    private const int MemoryMib = 640;

    // 65,536 pages, each different from all others.
    private const string WarmUp = """
        import sys, zlib
        sys.dh_pages = bytearray(256 << 20)
        for page in range(65536):
            sys.dh_pages[page * 4096 : page * 4096 + 4096] = page.to_bytes(8, "little") * 512
        sys.dh_sum = zlib.crc32(sys.dh_pages)
        """;

    private const string Check = """
        import sys, zlib
        assert len(sys.dh_pages) == 256 << 20
        print("same" if zlib.crc32(sys.dh_pages) == sys.dh_sum else "different")
        """;

    // Tells when it starts, and works on memory of its own until a line comes: each block must read back as it was written.
    private const string Work = """
        import sys, threading
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
        def free():
            return next(int(line.split()[1]) >> 10 for line in open("/proc/meminfo") if line.startswith("MemFree:"))
        least = free()
        print("working", flush=True)
        rounds = 0
        while not ended.is_set():
            blocks = [bytes([(rounds + i) % 255 + 1]) * (1 << 20) for i in range(8)]
            assert all(block.count(block[0]) == len(block) for block in blocks)
            least = min(least, free())
            if rounds % 10 == 0:
                print("free", free(), flush=True)
            rounds += 1
        print("rounds", rounds > 0, flush=True)
        """;

    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(60);

    private readonly TempDir _directory = new();

    [Fact(Timeout = 300_000)]
    public async Task Memory_is_the_same_under_every_policy_and_a_balloon_disturbs_none()
    {
        var cancellation = TestContext.Current.CancellationToken;
        var snapshot = await SnapshotPreparation.PrepareAsync(
            new PreparationOptions { Template = MakeTemplate(), Home = MakeHome(), MemoryMib = MemoryMib, Balloon = true }, cancellationToken: cancellation);
        Assert.InRange(snapshot.Manifest.DataBytes, 256 << 20, 512 << 20);

        foreach (var (policy, fill) in ((MemoryPolicy, bool)[])[(MemoryPolicy.Eager, false), (MemoryPolicy.Prefetch, false), (MemoryPolicy.Prefetch, true), (MemoryPolicy.Lazy, false), (MemoryPolicy.File, false)])
        {
            await using var sandbox = await Sandbox.RestoreAsync(
                snapshot, new SandboxOptions { Home = new DhHome(_directory.Path), MemoryPolicy = policy, Fill = fill }, cancellation);
            Assert.Equal((policy, null), (sandbox.MemoryPolicy, sandbox.Notice));
            await BreatheAsync(sandbox, $"{policy}, fill {fill}");
            Assert.Equal("same\n", await RunAsync(sandbox, Check));
            if (policy is MemoryPolicy.Lazy or MemoryPolicy.Prefetch && !fill)
            {
                // What lay in long holes was given back to the kernel before, and is removed without the page server.
                Assert.InRange(sandbox.PageServerStatistics!.Value.Faults, 1, long.MaxValue);
            }
        }

        await snapshot.VerifyAsync(cancellation);
    }

    public void Dispose() => _directory.Dispose();

    /// <summary>Inflates and deflates the balloon by 64 MiB while code runs.</summary>
    private static async Task BreatheAsync(Sandbox sandbox, string what)
    {
        var cancellation = TestContext.Current.CancellationToken;
        var input = new System.IO.Pipelines.Pipe();
        var output = new WatchedOutput();
        var run = sandbox.ExecuteAsync(new ExecutionRequest { Source = Work, Input = input.Reader.AsStream(), Timeout = Bound }, output, cancellation);
        await output.UntilAsync(text => text.Contains("working", StringComparison.Ordinal), run);
        int before = await FreeAsync(output, run, _ => true);
        await sandbox.SetBalloonAsync(MemoryMib - 64, cancellation);
        await FreeAsync(output, run, free => free < before - 32);
        await sandbox.SetBalloonAsync(MemoryMib, cancellation);
        await FreeAsync(output, run, free => free > before - 32);
        await input.Writer.WriteAsync("end\n"u8.ToArray(), cancellation);
        await input.Writer.CompleteAsync();
        var result = await run;
        Assert.True(result.ExitCode == 0 && output.Text.EndsWith("rounds True\n", StringComparison.Ordinal), $"{what}: exit code {result.ExitCode}, output:\n{output.Text}");
    }

    /// <summary>Waits for a figure of free memory that is new and as wanted.</summary>
    private static async Task<int> FreeAsync(WatchedOutput output, Task run, Func<int, bool> wanted)
    {
        int from = output.Text.Length, free = 0;
        await output.UntilAsync(
            text =>
            {
                string[] lines = text[from..].Split('\n')[..^1];
                free = lines.Where(line => line.StartsWith("free ", StringComparison.Ordinal)).Select(line => int.Parse(line.AsSpan(5), provider: null)).LastOrDefault(-1);
                return free >= 0 && wanted(free);
            },
            run);
        return free;
    }

    private static async Task<string> RunAsync(Sandbox sandbox, string code)
    {
        var output = new WatchedOutput();
        var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = code, Timeout = Bound }, output, TestContext.Current.CancellationToken);
        Assert.True(result.ExitCode == 0, output.Text);
        return output.Text;
    }

    private static Template MakeTemplate()
    {
        var python = Template.Find("python", Installation.Current.TemplatesDirectory);
        return python with { WarmupCode = WarmUp };
    }

    /// <summary>A home of its own, with the tests' images beside the one that is made here.</summary>
    private DhHome MakeHome()
    {
        var home = new DhHome(_directory.Path);
        Directory.CreateDirectory(Path.GetDirectoryName(home.ImagesDirectory)!);
        Directory.CreateSymbolicLink(home.ImagesDirectory, prepared.Home.ImagesDirectory);
        Directory.CreateSymbolicLink(home.CacheDirectory, prepared.Home.CacheDirectory);
        return home;
    }

    /// <summary>Output that can be waited for.</summary>
    private sealed class WatchedOutput : IOutputSink
    {
        private readonly StringBuilder _text = new();
        private TaskCompletionSource _more = new(TaskCreationOptions.RunContinuationsAsynchronously);

        public string Text
        {
            get
            {
                lock (_text)
                {
                    return _text.ToString();
                }
            }
        }

        public ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
        {
            lock (_text)
            {
                _text.Append(Encoding.UTF8.GetString(bytes.Span));
                _more.SetResult();
                _more = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            }

            return ValueTask.CompletedTask;
        }

        public async Task UntilAsync(Func<string, bool> there, Task run)
        {
            while (true)
            {
                Task more;
                lock (_text)
                {
                    if (there(_text.ToString()))
                    {
                        return;
                    }

                    more = _more.Task;
                }

                Assert.True(await Task.WhenAny(more, run).WaitAsync(Bound) == more, $"The code ended early: {Text}");
            }
        }
    }
}
