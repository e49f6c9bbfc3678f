using System.CommandLine;

namespace Dh.Cli;

/// <summary><c>dh vm pool stop</c>: ends the pools, and what runs in their sandboxes.</summary>
internal sealed class PoolStopCommand : Command
{
    private readonly PoolChoice _choice = new();

    public PoolStopCommand()
        : base("stop", "Ends the pools, their sandboxes, and the runs in those (exit code 125).")
    {
        _choice.AddTo(this);
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        var pools = _choice.Find(parsed);
        foreach (var pool in pools)
        {
            await pool.StopAsync();
            Console.Out.WriteLine($"stopped {pool.Status.Template} {pool.Status.Version} (process {pool.Status.ProcessId})");
        }

        if (pools.Count == 0)
        {
            Console.Error.WriteLine("dh: There was no pool to stop.");
        }

        return (int)ExitCode.Success;
    }
}
