using System.Diagnostics;

namespace Dh.TestSupport;

/// <summary>What a run of the program came to.</summary>
public sealed record ProgramResult(int ExitCode, string Output, string Error);

/// <summary>The built program, <c>bin/dh</c>, run as a user runs it.</summary>
/// <param name="home">Its DH_HOME.</param>
/// <param name="variables">What its environment has besides, in every run.</param>
public sealed class DhProgram(string home, IReadOnlyDictionary<string, string>? variables = null)
{
    private static readonly string ProgramPath = Repository.PathOf("bin/dh");

    /// <summary>The DH_HOME that it runs with.</summary>
    public string Home { get; } = home;

    /// <summary>Starts it with its three streams redirected.</summary>
    public Process Start(IEnumerable<string> arguments, IReadOnlyDictionary<string, string>? environment = null)
    {
        if (!File.Exists(ProgramPath))
        {
            throw new InvalidOperationException($"{ProgramPath} is not there: run `make build` first.");
        }

        return Start(new ProcessStartInfo(ProgramPath, arguments), environment);
    }

    /// <summary>Runs it to its end.</summary>
    public async Task<ProgramResult> RunAsync(
        IEnumerable<string> arguments, string input = "", IReadOnlyDictionary<string, string>? environment = null, TimeSpan? timeLimit = null)
    {
        using var process = Start(arguments, environment);
        return await FinishAsync(process, input, timeLimit);
    }

    /// <summary>Runs a command that ends up as the program, to its end.</summary>
    public async Task<ProgramResult> RunAsync(ProcessStartInfo command, TimeSpan? timeLimit = null)
    {
        using var process = Start(command, null);
        return await FinishAsync(process, "", timeLimit);
    }

    /// <summary>Runs code with <c>dh exec -c</c>.</summary>
    public Task<ProgramResult> ExecAsync(string code, params string[] options) => RunAsync(["exec", .. options, "-c", code]);

    private Process Start(ProcessStartInfo start, IReadOnlyDictionary<string, string>? environment)
    {
        start.RedirectStandardInput = start.RedirectStandardOutput = start.RedirectStandardError = true;
        start.WorkingDirectory = Path.GetTempPath();
        foreach (string name in (string[])["DH_VERSION", "DH_JSON", "DH_VM_NO_UFFD", "DH_TRACE", "DH_FIRECRACKER", "DH_JAILER", "DH_NO_POOL", "XDG_RUNTIME_DIR", "NOTIFY_SOCKET"])
        {
            start.Environment.Remove(name);
        }

        start.Environment["DH_HOME"] = Home;
        foreach (var (name, value) in (variables ?? new Dictionary<string, string>()).Concat(environment ?? new Dictionary<string, string>()))
        {
            start.Environment[name] = value;
        }

        return Process.Start(start)!;
    }

    private static async Task<ProgramResult> FinishAsync(Process process, string input, TimeSpan? timeLimit)
    {
        using var limit = new CancellationTokenSource(timeLimit ?? TimeSpan.FromSeconds(60));
        try
        {
            var output = process.StandardOutput.ReadToEndAsync(limit.Token);
            var error = process.StandardError.ReadToEndAsync(limit.Token);
            try
            {
                await process.StandardInput.WriteAsync(input.AsMemory(), limit.Token);
                process.StandardInput.Close();
            }
            catch (IOException)
            {
                // It ended without reading its input, which is its right.
            }

            await process.WaitForExitAsync(limit.Token);
            return new ProgramResult(process.ExitCode, await output, await error);
        }
        finally
        {
            if (!process.HasExited)
            {
                process.Kill();
            }
        }
    }
}
