using System.CommandLine;
using System.Globalization;
using Dh.Pool;

namespace Dh.Cli;

/// <summary><c>dh vm pool status</c>: the pools that run.</summary>
internal sealed class PoolStatusCommand : Command
{
    private static readonly TimeSpan WatchInterval = TimeSpan.FromSeconds(1);

    private readonly Option<bool> _json = new("--json") { Description = "Print one JSON object on stdout. (Also: DH_JSON=1)" };
    private readonly Option<bool> _watch = new("--watch") { Description = "Print it again every second, until Ctrl-C." };

    public PoolStatusCommand()
        : base("status", "Lists the pools that run.")
    {
        Add(_json);
        Add(_watch);
        SetAction((parsed, _) => RunAsync(parsed));
    }

    private async Task<int> RunAsync(ParseResult parsed)
    {
        using var interruption = new Interruption();
        bool json = parsed.GetValue(_json) || Environment.GetEnvironmentVariable("DH_JSON") == "1";
        while (true)
        {
            Write(PoolControl.List(DhHome.Default), json);
            if (!parsed.GetValue(_watch))
            {
                return (int)ExitCode.Success;
            }

            await Task.Delay(WatchInterval, interruption.Token).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            if (interruption.Code is { } code)
            {
                return (int)code;
            }
        }
    }

    private static void Write(IReadOnlyList<PoolControl> pools, bool json)
    {
        if (json)
        {
            JsonOutput.Write(Console.OpenStandardOutput(), new PoolsOutput([.. pools.Select(pool => pool.Status)]), JsonOutput.Default.PoolsOutput);
            return;
        }

        if (pools.Count == 0)
        {
            Console.Out.WriteLine("There is no pool. Start one: dh vm pool start --detach");
        }

        foreach (var pool in pools)
        {
            var status = pool.Status;
            Console.Out.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{status.Template} {status.Version}: {status.Ready} of {status.Size} ready, {status.Starting} starting, {status.Running} running, {status.Waiting} waiting; {status.Restored} restored, {status.HandedOut} handed out, {status.Failed} failed; wait p50 {status.WaitP50Ms ?? 0:0.00} ms, p99 {status.WaitP99Ms ?? 0:0.00} ms; {status.MemoryBytes >> 20} MiB; process {status.ProcessId}, up {status.UptimeSeconds:0} s"));
        }
    }
}
