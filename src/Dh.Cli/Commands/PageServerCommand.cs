using System.CommandLine;
using System.Globalization;
using System.Net.Sockets;
using Dh.Paging;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh page-server</c>: the page server alone, for any VMM that speaks Firecracker's handshake (docs/page-server.md).</summary>
internal sealed class PageServerCommand : Command
{
    /// <summary>The first descriptor of socket activation (sd_listen_fds(3)).</summary>
    private const int FirstActivatedDescriptor = 3;

    private readonly Option<string?> _socket = new("--socket") { HelpName = "PATH", Description = "Where the VMM connects. (Default: the socket that systemd passed)" };
    private readonly Option<string> _memory = new("--memory") { HelpName = "FILE", Required = true, Description = "The memory file." };
    private readonly Option<string?> _workingSet = new("--working-set") { HelpName = "FILE", Description = "What prefetch copies before the machine resumes; --record makes one." };
    private readonly Option<string?> _policy = new("--policy") { HelpName = "eager|prefetch|lazy", Description = "What is copied before the machine resumes. (Default: prefetch with --working-set, else eager)" };
    private readonly Option<bool> _fill = new("--fill") { Description = "Copy the rest in the background; then the VMM needs no page server any more." };
    private readonly Option<string?> _record = new("--record") { HelpName = "FILE", Description = "Serve lazily, page by page, and write what was touched as a working set when the VMM ends." };
    private readonly Option<int> _workers = new("--workers") { HelpName = "N", DefaultValueFactory = _ => 2, Description = "Threads that copy, 1 to 64." };
    private readonly Option<int> _block = new("--block") { HelpName = "KIB", DefaultValueFactory = _ => 64, Description = "What one fault brings, 4 to 2048, a power of two." };
    private readonly Option<double?> _timeout = new("--timeout") { HelpName = "S", Description = "Give up when no VMM has connected after S seconds." };
    private readonly Option<bool> _forever = new("--serve-forever") { Description = "Serve one VMM after the other, and several at once, until SIGINT or SIGTERM." };
    private readonly Option<bool> _json = new("--json") { Description = "Print one JSON object per VMM on stdout when it has ended." };

    public PageServerCommand()
        : base("page-server", "Fills the memory of a VMM that connects: a userfaultfd handler for Firecracker and whoever speaks its handshake.")
    {
        Option[] options = [_socket, _memory, _workingSet, _policy, _fill, _record, _workers, _block, _timeout, _forever, _json];
        foreach (var option in options)
        {
            Add(option);
        }

        _policy.AcceptOnlyFromAmong("eager", "prefetch", "lazy");
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var options = ReadOptions(parsed);
        using var interruption = new Interruption();
        string? path = parsed.GetValue(_socket);
        using var listener = path is null ? TakeActivatedSocket() : PageServer.Bind(path);
        try
        {
            OpenSource(parsed).Dispose(); // what cannot be opened is said before a VMM depends on it
            Console.Error.WriteLine($"dh: listening on {path ?? "the socket from systemd"} for a VMM");
            return await ServeAsync(listener, parsed, options, interruption);
        }
        finally
        {
            if (path is not null)
            {
                File.Delete(path);
            }
        }
    }

    private async Task<int> ServeAsync(Socket listener, ParseResult parsed, PageServerOptions options, Interruption interruption)
    {
        var serving = new List<Task<bool>>();
        bool failed = false;
        try
        {
            do
            {
                var accepted = await AcceptAsync(listener, parsed.GetValue(_timeout), interruption.Token);
                serving.Add(ServeOneAsync(accepted, parsed, options, interruption.Token));
                foreach (var ended in serving.Where(task => task.IsCompleted).ToArray())
                {
                    failed |= !await ended;
                    serving.Remove(ended);
                }
            }
            while (parsed.GetValue(_forever));
        }
        catch (OperationCanceledException)
        {
            // SIGINT or SIGTERM: what is being served ends, too.
        }

        failed |= (await Task.WhenAll(serving)).Contains(false);
        return (int)(interruption.Code ?? (failed ? ExitCode.Failed : ExitCode.Success));
    }

    private static async Task<Socket> AcceptAsync(Socket listener, double? timeout, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        if (timeout is { } seconds)
        {
            limit.CancelAfter(TimeSpan.FromSeconds(seconds));
        }

        try
        {
            return await listener.AcceptAsync(limit.Token);
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.PageServer, string.Create(CultureInfo.InvariantCulture, $"No VMM connected within {timeout} s."));
        }
    }

    /// <returns>Whether all went well.</returns>
    private async Task<bool> ServeOneAsync(Socket accepted, ParseResult parsed, PageServerOptions options, CancellationToken cancellationToken)
    {
        PopulationResult? population = null;
        PageServerEnd? end = null;
        PageServerException? failure = null;
        var statistics = default(PageServerStatistics);
        try
        {
            await using var server = PageServer.StartAccepted(accepted, OpenSource(parsed), options);
            await using var stop = cancellationToken.Register(() => _ = server.DisposeAsync().AsTask());
            try
            {
                population = await server.WaitPopulatedAsync(CancellationToken.None);
                if (!parsed.GetValue(_json))
                {
                    Console.Out.WriteLine(population);
                }

                end = await server.Completion;
            }
            finally
            {
                statistics = server.Statistics;
            }

            if (parsed.GetValue(_record) is { } record)
            {
                Write(record, parsed.GetValue(_memory)!, server.StopRecording());
            }
        }
        catch (PageServerException e)
        {
            failure = e;
        }

        Report(parsed, population, end, statistics, failure);
        return failure is null;
    }

    private void Report(ParseResult parsed, PopulationResult? population, PageServerEnd? end, PageServerStatistics statistics, PageServerException? failure)
    {
        if (parsed.GetValue(_json))
        {
            JsonOutput.Write(Console.OpenStandardOutput(), PageServerOutput.Of(population, end, statistics, failure), JsonOutput.Default.PageServerOutput);
        }
        else if (failure is not null)
        {
            Console.Error.WriteLine($"dh: {failure.Message}");
        }
        else if (end != PageServerEnd.Released || parsed.GetValue(_fill))
        {
            Console.Out.WriteLine($"UFFD: {JsonOutput.Name(end!.Value).Replace('_', ' ')} after {statistics.Faults} faults: {statistics.CopiedBytes >> 20} MiB copied, {statistics.ZeroedBytes >> 20} MiB zeroed, {statistics.RemovedBytes >> 20} MiB given back");
        }
    }

    private static void Write(string path, string memory, IReadOnlyList<TouchedPage> touched)
    {
        long[] pages = [.. touched.Select(page => page.Offset)];
        var set = WorkingSet.Combine(IdentityOf(memory), new FileInfo(memory).Length, [pages], [touched.Where(page => page.IsWrite).Select(page => page.Offset).ToArray()]);
        set.WriteTo(path, memory);
        Console.Error.WriteLine($"dh: recorded {set.TouchedBytes >> 10} KiB in {set.Touched.Count} runs: {path}");
    }

    private PageServerOptions ReadOptions(ParseResult parsed)
    {
        string? record = parsed.GetValue(_record);
        string policy = parsed.GetValue(_policy) ?? (record is not null ? "lazy" : parsed.GetValue(_workingSet) is not null ? "prefetch" : "eager");
        if (policy == "prefetch" && parsed.GetValue(_workingSet) is null)
        {
            throw new DhException(DhErrorReason.Usage, "--policy prefetch needs --working-set FILE; --record FILE makes one.");
        }

        if (record is not null && (policy != "lazy" || parsed.GetValue(_fill) || parsed.GetValue(_forever)))
        {
            throw new DhException(DhErrorReason.Usage, "--record serves one VMM lazily: it does not go with another policy, --fill or --serve-forever.");
        }

        try
        {
            return new PageServerOptions
            {
                Policy = policy switch { "eager" => PopulationPolicy.Eager, "prefetch" => PopulationPolicy.Prefetch, _ => PopulationPolicy.Lazy },
                Fill = parsed.GetValue(_fill),
                Record = record is not null,
                Workers = parsed.GetValue(_workers),
                BlockSize = parsed.GetValue(_block) << 10,
            };
        }
        catch (ArgumentOutOfRangeException)
        {
            throw new DhException(DhErrorReason.Usage, "--workers takes 1 to 64; --block takes 4 to 2048 KiB, a power of two.");
        }
    }

    /// <summary>The memory file, and over it the working set when there is one that can be used.</summary>
    private IMemorySource OpenSource(ParseResult parsed)
    {
        string memory = parsed.GetValue(_memory)!;
        IMemorySource source = SparseFileSource.Open(memory);
        if (parsed.GetValue(_workingSet) is not { } workingSet)
        {
            return source;
        }

        try
        {
            return WorkingSetSource.Open(source, workingSet, IdentityOf(memory));
        }
        catch (PageServerException e)
        {
            Console.Error.WriteLine($"dh: {e.Message}");
            return source;
        }
    }

    /// <summary>The snapshot's id where the memory file lies in a snapshot's directory.</summary>
    private static string IdentityOf(string memory)
    {
        string directory = Path.GetDirectoryName(Path.GetFullPath(memory))!;
        return File.Exists(Path.Combine(directory, Snapshot.ManifestName)) ? Snapshot.Open(directory).Manifest.Id : WorkingSet.IdentityOf(memory);
    }

    /// <summary>sd_listen_fds(3): LISTEN_PID names this process, LISTEN_FDS says how many sockets there are.</summary>
    private static Socket TakeActivatedSocket()
    {
        if (Environment.GetEnvironmentVariable("LISTEN_PID") != Environment.ProcessId.ToString(CultureInfo.InvariantCulture)
            || Environment.GetEnvironmentVariable("LISTEN_FDS") != "1")
        {
            throw new DhException(DhErrorReason.Usage, "Where is the VMM to connect? Give --socket PATH, or start this through a systemd socket unit with one socket.");
        }

        return new Socket(new SafeSocketHandle(FirstActivatedDescriptor, ownsHandle: true));
    }
}
