using System.Runtime.InteropServices;

namespace Dh.Cli;

/// <summary>SIGINT and SIGTERM: the first one cancels, which ends the code, then the VM; the second one ends this program at once, and the launcher ends the VM.</summary>
internal sealed class Interruption : IDisposable
{
    private readonly CancellationTokenSource _source = new();
    private readonly PosixSignalRegistration _interrupt;
    private readonly PosixSignalRegistration _terminate;
    private int _code;

    public Interruption()
    {
        _interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, context => Take(context, ExitCode.Interrupted));
        _terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, context => Take(context, ExitCode.Terminated));
    }

    public CancellationToken Token => _source.Token;

    /// <summary>What the program ends with because of a signal; null when there was none.</summary>
    public ExitCode? Code => Volatile.Read(ref _code) is not 0 and var code ? (ExitCode)code : null;

    public void Dispose()
    {
        _interrupt.Dispose();
        _terminate.Dispose();
        _source.Dispose();
    }

    private void Take(PosixSignalContext context, ExitCode code)
    {
        context.Cancel = true;
        if (Interlocked.CompareExchange(ref _code, (int)code, 0) != 0)
        {
            Environment.Exit((int)code);
        }

        _source.Cancel();
    }
}
