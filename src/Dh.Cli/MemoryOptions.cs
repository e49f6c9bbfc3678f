using System.CommandLine;
using Dh.Sandboxes;

namespace Dh.Cli;

/// <summary>The options that say how guest memory comes back.</summary>
internal sealed class MemoryOptions
{
    /// <summary>The policy.</summary>
    public Option<string?> Policy { get; } = new("--memory-policy") { HelpName = "eager|prefetch|lazy|file", Description = "How guest memory comes back. (Default: prefetch where a working set is recorded)" };

    /// <summary>What the policy leaves out.</summary>
    public Option<bool> Fill { get; } = new("--fill") { Description = "Copy what prefetch or lazy leave out in the background." };

    /// <summary>What was chosen; no policy for the best.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Usage"/>: it makes no sense.</exception>
    public (MemoryPolicy? Policy, bool Fill) Read(ParseResult parsed)
    {
        MemoryPolicy? policy = parsed.GetValue(Policy) switch
        {
            null => Environment.GetEnvironmentVariable("DH_VM_NO_UFFD") == "1" ? MemoryPolicy.File : null,
            "eager" => MemoryPolicy.Eager,
            "prefetch" => MemoryPolicy.Prefetch,
            "lazy" => MemoryPolicy.Lazy,
            "file" => MemoryPolicy.File,
            var name => throw new DhException(DhErrorReason.Usage, $"There is no memory policy '{name}': eager, prefetch, lazy, file."),
        };
        bool fill = parsed.GetValue(Fill);
        return fill && policy is (MemoryPolicy.Eager or MemoryPolicy.File)
            ? throw new DhException(DhErrorReason.Usage, "--fill completes what prefetch or lazy leave out: it does not go with --memory-policy eager or file.")
            : (policy, fill);
    }
}
