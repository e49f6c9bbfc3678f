using System.Collections.Immutable;
using System.Diagnostics;
using System.Text;

namespace Dh.Images;

/// <summary>
/// One external program of an image build: no shell, a small fixed environment, a time limit, and the last lines of what it said for the error.
/// </summary>
/// <param name="Program">Its name; looked up in the system's directories only, not in the user's PATH.</param>
/// <param name="Arguments">Its arguments.</param>
internal sealed record BuildCommand(string Program, ImmutableArray<string> Arguments)
{
    /// <summary>Where programs are looked up. A user's PATH may put wrappers in front (interpreters above all) that change what is built.</summary>
    public const string SearchPath = "/usr/sbin:/usr/bin:/sbin:/bin";

    private const int KeptLines = 15;
    private const int ShownCommandLength = 160;
    private static readonly TimeSpan EndLimit = TimeSpan.FromSeconds(10);
    private static readonly string[] PassedOn = ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"];

    private static readonly Dictionary<string, string> DebianPackages = new(StringComparer.Ordinal)
    {
        ["apt-cache"] = "apt",
        ["apt-config"] = "apt",
        ["apt-get"] = "apt",
        ["chroot"] = "coreutils",
        ["debugfs"] = "e2fsprogs",
        ["dpkg-deb"] = "dpkg",
        ["dpkg-query"] = "dpkg",
        ["find"] = "findutils",
        ["mke2fs"] = "e2fsprogs",
        ["newuidmap"] = "uidmap",
        ["prlimit"] = "util-linux",
        ["rm"] = "coreutils",
        ["umount"] = "mount",
        ["unshare"] = "util-linux",
        ["xz"] = "xz-utils",
    };

    /// <summary>A program and its arguments that starts this one, such as unshare(1).</summary>
    public ImmutableArray<string> Prefix { get; init; } = [];

    /// <summary>Variables beside PATH, HOME, LC_ALL and those that name a proxy.</summary>
    public ImmutableDictionary<string, string> Environment { get; init; } = ImmutableDictionary<string, string>.Empty;

    /// <summary>Whether the program also gets the user's whole environment.</summary>
    public bool WithUserEnvironment { get; init; }

    /// <summary>Where it runs.</summary>
    public string WorkingDirectory { get; init; } = "/";

    /// <summary>When it is killed.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromMinutes(15);

    /// <summary>Gets every line of output and errors as it comes, from any thread.</summary>
    public Action<string>? OnLine { get; init; }

    /// <summary>A program and its arguments.</summary>
    public static BuildCommand Of(string program, params ReadOnlySpan<string> arguments) => new(program, [.. arguments]);

    /// <summary>The same with one more variable.</summary>
    public BuildCommand With(string variable, string value) => this with { Environment = Environment.SetItem(variable, value) };

    /// <summary>Runs it to its end, and gives its standard output.</summary>
    /// <exception cref="BuildCommandException">It ended with another exit code than 0, or was killed at its time limit.</exception>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: it is not installed, or cannot be started.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; it and its children are gone.</exception>
    public async Task<string> RunAsync(CancellationToken cancellationToken)
    {
        cancellationToken.ThrowIfCancellationRequested();
        var output = new StringBuilder();
        var lastLines = new LastLines(KeptLines);
        using var process = Start();
        process.StandardInput.Close();
        var reading = Task.WhenAll(
            ReadAsync(process.StandardOutput, line =>
            {
                output.Append(line).Append('\n');
                Take(line);
            }),
            ReadAsync(process.StandardError, Take));

        void Take(string line)
        {
            lastLines.Add(line);
            OnLine?.Invoke(line);
        }

        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(Timeout);
        try
        {
            await process.WaitForExitAsync(limit.Token);
            await reading.WaitAsync(limit.Token);
        }
        catch (OperationCanceledException)
        {
            await KillAsync(process, reading);
            cancellationToken.ThrowIfCancellationRequested();
            throw new BuildCommandException($"{this} was killed: it had not ended after {Timeout.TotalMinutes:0.#} minutes", lastLines.ToArray());
        }

        return process.ExitCode == 0
            ? output.ToString()
            : throw new BuildCommandException($"{this} ended with exit code {process.ExitCode}", lastLines.ToArray());
    }

    /// <summary>The command for a message, shortened.</summary>
    public override string ToString()
    {
        string line = string.Join(' ', [Program, .. Arguments]);
        return line.Length <= ShownCommandLength ? line : string.Concat(line.AsSpan(0, ShownCommandLength), "...");
    }

    /// <summary>The path of an installed program.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: it is not installed; the message names the package.</exception>
    internal static string Locate(string program)
    {
        if (Path.IsPathRooted(program))
        {
            return program;
        }

        return SearchPath.Split(':').Select(directory => Path.Combine(directory, program)).FirstOrDefault(File.Exists)
            ?? throw new DhException(
                DhErrorReason.Host,
                $"{program} is not installed: run `make setup` or `apt-get install {DebianPackages.GetValueOrDefault(program, program)}`.");
    }

    private static async Task ReadAsync(StreamReader reader, Action<string> take)
    {
        while (await reader.ReadLineAsync() is { } line)
        {
            take(line);
        }
    }

    // A grandchild that outlives the kill would keep the pipes open: the wait for their end is bounded.
    private static async Task KillAsync(Process process, Task reading)
    {
        process.Kill(entireProcessTree: true);
        try
        {
            await process.WaitForExitAsync().WaitAsync(EndLimit);
            await reading.WaitAsync(EndLimit);
        }
        catch (TimeoutException)
        {
        }
    }

    private Process Start()
    {
        string program = Locate(Program);
        string[] line = [.. Prefix, program, .. Arguments];
        var start = new ProcessStartInfo(Locate(line[0]))
        {
            WorkingDirectory = WorkingDirectory,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach (string argument in line.AsSpan(1))
        {
            start.ArgumentList.Add(argument);
        }

        SetEnvironment(start.Environment);
        try
        {
            return Process.Start(start)!;
        }
        catch (System.ComponentModel.Win32Exception error)
        {
            throw new DhException(DhErrorReason.Host, $"{program} cannot be started.", error);
        }
    }

    private void SetEnvironment(IDictionary<string, string?> environment)
    {
        var user = new Dictionary<string, string?>(environment, StringComparer.Ordinal);
        if (!WithUserEnvironment)
        {
            environment.Clear();
            foreach (string name in PassedOn.Where(user.ContainsKey))
            {
                environment[name] = user[name];
            }
        }

        environment["PATH"] = SearchPath;
        environment["HOME"] = user.GetValueOrDefault("HOME") ?? "/";
        environment["LC_ALL"] = "C.UTF-8";
        foreach (var (name, value) in Environment)
        {
            environment[name] = value;
        }
    }

    /// <summary>The last lines of two streams.</summary>
    private sealed class LastLines(int capacity)
    {
        private readonly Queue<string> _lines = new(capacity);

        public void Add(string line)
        {
            if (string.IsNullOrWhiteSpace(line))
            {
                return;
            }

            lock (_lines)
            {
                if (_lines.Count == capacity)
                {
                    _lines.Dequeue();
                }

                _lines.Enqueue(line.TrimEnd());
            }
        }

        public string[] ToArray()
        {
            lock (_lines)
            {
                return [.. _lines];
            }
        }
    }
}

/// <summary>An external program of an image build failed.</summary>
/// <param name="what">The command and how it ended.</param>
/// <param name="lastLines">The last lines of its output and errors.</param>
internal sealed class BuildCommandException(string what, IReadOnlyList<string> lastLines)
    : DhException(DhErrorReason.Image, lastLines.Count == 0 ? $"{what}, and said nothing." : $"{what}. Its last lines:\n{Indent(lastLines)}")
{
    /// <summary>The last lines of its output and errors.</summary>
    public IReadOnlyList<string> LastLines { get; } = lastLines;

    /// <summary>Lines as they stand in a message.</summary>
    internal static string Indent(IEnumerable<string> lines) => string.Join('\n', lines.Select(line => "  " + line));
}
