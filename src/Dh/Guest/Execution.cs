namespace Dh.Guest;

/// <summary>How source code is run.</summary>
public enum ExecutionMode
{
    /// <summary>As <c>python -c</c> runs it; the value of a last expression is kept.</summary>
    Code,

    /// <summary>As <c>python script.py ARG...</c> runs it.</summary>
    Script,
}

/// <summary>Code to run in a sandbox, and with what.</summary>
public sealed record ExecutionRequest
{
    /// <summary>The largest source, in bytes of UTF-8.</summary>
    public const int MaxSourceBytes = 16 << 20;

    /// <summary>The longest time limit: 30 days.</summary>
    public static readonly TimeSpan MaxTimeout = TimeSpan.FromDays(30);

    /// <summary>Python source code.</summary>
    public required string Source { get; init; }

    /// <summary>How it is run. Default: as code.</summary>
    public ExecutionMode Mode { get; init; }

    /// <summary>The name in tracebacks; for a script its path, whose base name it has in the guest.</summary>
    public string Filename { get; init; } = "<string>";

    /// <summary><c>sys.argv</c> from index 1 on.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>Added to the guest's own environment.</summary>
    public IReadOnlyDictionary<string, string> Environment { get; init; } = new Dictionary<string, string>();

    /// <summary>Whether the value of a last expression is wanted.</summary>
    public bool ShowResult { get; init; } = true;

    /// <summary>Whether the tables that the code assigns are wanted: looking at them takes the guest some time. Default: yes.</summary>
    public bool ShowTables { get; init; } = true;

    /// <summary>
    /// Whether nothing runs in the sandbox after it, and the sandbox is disposed: the guest then does not get ready for another run, which takes a processor for some milliseconds,
    /// and refuses one; what the code leaves behind ends with the machine. Default: no.
    /// </summary>
    public bool IsLast { get; init; }

    /// <summary>Standard input, read only when code in the guest waits for it; null for an empty one.</summary>
    public Stream? Input { get; init; }

    /// <summary>How long the code may run before it is interrupted, at most <see cref="MaxTimeout"/>; null for as long as it takes.</summary>
    public TimeSpan? Timeout { get; init; }
}

/// <summary>Where output came from.</summary>
public enum OutputStream
{
    /// <summary>The code's descriptor 1.</summary>
    Output,

    /// <summary>The code's descriptor 2.</summary>
    Error,
}

/// <summary>Takes the output of running code as it comes. While it waits, the code in the guest waits too.</summary>
public interface IOutputSink
{
    /// <summary>Takes some output.</summary>
    /// <param name="stream">Where it came from.</param>
    /// <param name="bytes">The bytes; valid only until the returned task has completed.</param>
    /// <param name="cancellationToken">Ends the wait.</param>
    ValueTask WriteAsync(OutputStream stream, ReadOnlyMemory<byte> bytes, CancellationToken cancellationToken);
}

/// <summary>How a run ended.</summary>
public enum ExecutionOutcome
{
    /// <summary>The code ended by itself: normally, by <c>sys.exit</c>, or by an exception.</summary>
    Exited,

    /// <summary>A signal ended its process; also when the guest ran out of memory.</summary>
    Signaled,

    /// <summary>It was interrupted because its time was over.</summary>
    Timeout,

    /// <summary>It was interrupted by the caller.</summary>
    Interrupted,
}

/// <summary>An exception that ended the code.</summary>
/// <param name="Type">Its type's name.</param>
/// <param name="Message">Its words.</param>
/// <param name="Traceback">As Python prints it.</param>
public sealed record ExecutionError(string Type, string Message, string Traceback);

/// <summary>A column of a table.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Type">Its type's name, as Java has it.</param>
public sealed record TableColumn(string Name, string Type);

/// <summary>A table that code has assigned, or that its last expression is.</summary>
public sealed record TablePreview
{
    /// <summary>The variable; null for the last expression's.</summary>
    public string? Name { get; init; }

    /// <summary>How many rows it has; null when that cannot be said.</summary>
    public long? RowCount { get; init; }

    /// <summary>Whether it changes by itself.</summary>
    public bool IsRefreshing { get; init; }

    /// <summary>Its columns, in their order.</summary>
    public IReadOnlyList<TableColumn> Columns { get; init; } = [];

    /// <summary>The first ten rows, as text; null when it cannot be shown.</summary>
    public string? Preview { get; init; }

    /// <summary>Why it cannot be shown.</summary>
    public string? Error { get; init; }
}

/// <summary>What came of a run.</summary>
public sealed record ExecutionResult
{
    /// <summary>How it ended.</summary>
    public required ExecutionOutcome Outcome { get; init; }

    /// <summary>0 to 255; 128 + the signal's number when a signal ended it.</summary>
    public required int ExitCode { get; init; }

    /// <summary>The signal that ended it.</summary>
    public int? Signal { get; init; }

    /// <summary>Whether the guest's kernel killed it for memory.</summary>
    public bool OutOfMemory { get; init; }

    /// <summary>The repr of the value of the last expression; null when there is none, or it is None.</summary>
    public string? ResultRepr { get; init; }

    /// <summary>The exception that ended it.</summary>
    public ExecutionError? Error { get; init; }

    /// <summary>The tables that the code has assigned, in the order of assignment, then that of its last expression; empty for engines without tables.</summary>
    public IReadOnlyList<TablePreview> Tables { get; init; } = [];

    /// <summary>From sending the code until the result was here.</summary>
    public TimeSpan Elapsed { get; init; }

    /// <summary>When the result was here, in <see cref="System.Diagnostics.Stopwatch"/> ticks: what comes after is the host's own.</summary>
    public long ReceivedAt { get; init; }

    /// <summary>What the guest measured for the code alone, in milliseconds.</summary>
    public double GuestRunMilliseconds { get; init; }
}
