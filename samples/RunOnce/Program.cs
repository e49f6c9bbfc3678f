// Runs code in a fresh microVM: the newest prepared snapshot is restored, used once, and destroyed.
//
//   dh vm prepare
//   dotnet run --project samples/RunOnce -- "print('hello'); 6 * 7"

using Dh;
using Dh.Guest;
using Dh.Sandboxes;
using Dh.Snapshots;

var snapshot = new SnapshotStore(DhHome.Default).FindNewest(template: null)
    ?? throw new DhException(DhErrorReason.NotFound, "No snapshot is prepared. Run `dh vm prepare`.");

await using var sandbox = await Sandbox.RestoreAsync(snapshot);
var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = args.Length > 0 ? args[0] : "6 * 7", IsLast = true }, new ConsoleOutput());

Console.WriteLine($"value {result.ResultRepr ?? "none"}, exit code {result.ExitCode}, restored in {sandbox.RestoreTime.TotalMilliseconds:0} ms");
return result.ExitCode;

/// <summary>Shows the code's output as it comes.</summary>
internal sealed class ConsoleOutput : IOutputSink
{
    public async ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken)
    {
        await using var target = stream == OutputStream.Output ? Console.OpenStandardOutput() : Console.OpenStandardError();
        await target.WriteAsync(bytes, cancellationToken);
    }
}
