namespace Dh.Cli;

/// <summary>The exit codes of <c>dh</c> (docs/exit-codes.md). <c>dh exec</c> otherwise ends with the code's own.</summary>
internal enum ExitCode
{
    /// <summary>It worked.</summary>
    Success = 0,

    /// <summary>The command line, or a setting, makes no sense.</summary>
    Usage = 2,

    /// <summary>The code did not end within <c>--timeout</c>.</summary>
    Timeout = 3,

    /// <summary>A snapshot, template or script that was named does not exist.</summary>
    NotFound = 4,

    /// <summary><c>dh</c> or the VM failed; the code may not have run.</summary>
    Failed = 125,

    /// <summary>SIGINT: 128 + 2.</summary>
    Interrupted = 130,

    /// <summary>Nobody reads the output any more: 128 + SIGPIPE.</summary>
    BrokenPipe = 141,

    /// <summary>SIGTERM: 128 + 15.</summary>
    Terminated = 143,
}
