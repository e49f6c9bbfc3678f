using Dh.Guest;

namespace Dh.Sandboxes;

/// <summary>A microVM that is ready to run code for one caller at a time, whoever has restored it. Disposing it ends the machine.</summary>
public interface ISandbox : IAsyncDisposable
{
    /// <summary>How its memory came back.</summary>
    MemoryPolicy MemoryPolicy { get; }

    /// <summary>A line for the user: what is not as one would expect.</summary>
    string? Notice { get; }

    /// <summary>What stands between the guest and this host.</summary>
    IsolationClass Isolation { get; }

    /// <summary>How long the caller has waited for it.</summary>
    TimeSpan RestoreTime { get; }

    /// <summary>Runs code and streams its output.</summary>
    /// <param name="request">What to run.</param>
    /// <param name="output">Takes the output as it comes.</param>
    /// <param name="cancellationToken">Interrupts the code (SIGINT, after 2 s SIGKILL); the result then says <see cref="ExecutionOutcome.Interrupted"/>.</param>
    /// <exception cref="DhException">The microVM ended, or its guest broke the protocol; dispose the sandbox.</exception>
    Task<ExecutionResult> ExecuteAsync(ExecutionRequest request, IOutputSink output, CancellationToken cancellationToken = default);
}
