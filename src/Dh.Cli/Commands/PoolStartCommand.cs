using System.CommandLine;
using System.Globalization;
using System.Net;
using Dh.Pool;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.Cli;

/// <summary><c>dh vm pool start</c>: the daemon that keeps sandboxes ready.</summary>
internal sealed class PoolStartCommand : Command
{
    /// <summary>What tells whoever has started the daemon how it ends (sd_notify(3)).</summary>
    public const string ExitStatus = "EXIT_STATUS";

    private const int Threads = 16;

    private readonly Option<int> _size = new("--size", "-n") { HelpName = "N", DefaultValueFactory = _ => 2, Description = "How many sandboxes are ready." };
    private readonly Option<string?> _idleTimeout = new("--idle-timeout") { HelpName = "TIME", Description = "End after so much time without a run: 90, 30s, 5m, 2h. (Default: never)" };
    private readonly Option<string?> _metrics = new("--metrics") { HelpName = "ADDRESS", Description = "Serve metrics for Prometheus at http://ADDRESS/metrics, such as 127.0.0.1:9464." };
    private readonly Option<bool> _detach = new("--detach") { Description = "Return when the sandboxes are ready, and let the daemon go on in the background." };
    private readonly Option<string?> _version = new("--version") { HelpName = "V", Description = "The snapshot's version (see: dh vm status)." };
    private readonly Option<string?> _template = new("--template") { HelpName = "NAME", Description = "The snapshot's template." };
    private readonly MemoryOptions _memory = new();
    private readonly ProgramOptions _programs = new();

    public PoolStartCommand()
        : base("start", "Keeps sandboxes of a snapshot ready. dh exec with the same options finds them; each runs once.")
    {
        Option[] options = [_size, _idleTimeout, _metrics, _detach, _version, _template, _memory.Policy, _memory.Fill, _programs.Firecracker, _programs.Jailer];
        foreach (var option in options)
        {
            Add(option);
        }

        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var options = ReadOptions(parsed);
        if (parsed.GetValue(_detach))
        {
            return (int)DetachedPool.Start();
        }

        // Restores wait for their launchers on threads of the pool: whoever asks for a sandbox must not wait behind them.
        _ = ThreadPool.SetMinThreads(Threads, Threads);
        using var interruption = new Interruption();
        try
        {
            await using var daemon = PoolDaemon.Start(options, Console.Error.WriteLine);
            await daemon.RunAsync(() => ServiceNotification.Send("READY=1"), interruption.Token);
            ServiceNotification.Send("STOPPING=1");
        }
        catch (DhException e)
        {
            ServiceNotification.Send($"{ExitStatus}={(int)Failure.CodeOf(e)}");
            throw;
        }

        return (int)ExitCode.Success; // a signal is how a daemon is ended
    }

    private PoolOptions ReadOptions(ParseResult parsed)
    {
        var home = DhHome.Default;
        var (policy, fill) = _memory.Read(parsed);
        var snapshot = VersionChoice.Of(parsed.GetValue(_template), parsed.GetValue(_version), home).Open(new SnapshotStore(home), home);
        int size = parsed.GetValue(_size);
        return new PoolOptions
        {
            Template = snapshot.Manifest.Template,
            Version = snapshot.Manifest.Version,
            Size = size is >= 1 and <= PoolOptions.MaxSize ? size : throw new DhException(DhErrorReason.Usage, $"--size takes 1 to {PoolOptions.MaxSize}."),
            Metrics = ReadAddress(parsed.GetValue(_metrics)),
            IdleTimeout = ReadTime(parsed.GetValue(_idleTimeout)),
            Sandbox = new SandboxOptions { Home = home, MemoryPolicy = policy, Fill = fill, Programs = _programs.Read(parsed) },
        };
    }

    private static IPEndPoint? ReadAddress(string? text) =>
        text is null ? null
        : IPEndPoint.TryParse(text, out var address) && address.Port != 0 && IPAddress.IsLoopback(address.Address) ? address
        : throw new DhException(DhErrorReason.Usage, $"--metrics takes a loopback address with a port, such as 127.0.0.1:9464 or [::1]:9464, not '{text}': whoever can connect can read them.");

    private static TimeSpan? ReadTime(string? text)
    {
        if (text is null)
        {
            return null;
        }

        var (number, unit) = text.Length > 0 ? text[^1] switch { 's' => (text[..^1], 1), 'm' => (text[..^1], 60), 'h' => (text[..^1], 3600), _ => (text, 1) } : (text, 1);
        return double.TryParse(number, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double count) && count * unit is > 0 and <= 31_536_000
            ? TimeSpan.FromSeconds(count * unit)
            : throw new DhException(DhErrorReason.Usage, $"--idle-timeout takes a time such as 90, 30s, 5m or 2h, up to a year, not '{text}'.");
    }
}
