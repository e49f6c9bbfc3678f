using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary><c>dh exec</c> as a user types it, in a real guest.</summary>
public sealed class ExecTests(PreparedHome prepared)
{
    private DhProgram Dh => prepared.Dh;

    [Theory]
    [InlineData("eager")]
    [InlineData("file")]
    public async Task Output_and_the_value_of_the_last_expression_are_printed(string policy)
    {
        Assert.Equal(new ProgramResult(0, "hello\n42\n", ""), await Dh.ExecAsync("print('hello'); 6 * 7", "--memory-policy", policy));
    }

    [Fact]
    public async Task Verbose_says_what_the_page_server_did()
    {
        var result = await Dh.ExecAsync("print('Hello from UFFD!')", "--verbose");
        Assert.Equal("Hello from UFFD!\n", result.Output);
        Assert.Matches(@"UFFD: populated 1 regions, 512 MiB \(prefetch: \d+ MiB copied, \d+ MiB on demand, \d+ MiB zero, \d+ ms\)", result.Error);
    }

    [Fact]
    public async Task A_trace_tells_the_stages_in_their_order()
    {
        long before = Stopwatch.GetTimestamp();
        var result = await Dh.RunAsync(["exec", "-c", "print('hello')"], environment: new Dictionary<string, string> { ["DH_TRACE"] = "1" });
        long after = Stopwatch.GetTimestamp();
        Assert.Equal((0, "hello\n"), (result.ExitCode, result.Output));
        string[][] marks = [.. result.Error.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split(' '))];
        Assert.All(marks, mark => Assert.Equal("trace:", mark[0]));
        Assert.Equal(["main", "vmm-start", "restored", "result", "printed"], marks.Select(mark => mark[1]));
        long[] times = [before, .. marks.Select(mark => long.Parse(mark[2], CultureInfo.InvariantCulture)), after];
        Assert.Equal(times.Order(), times);
    }

    [Fact]
    public async Task Without_userfaultfd_the_output_is_the_same()
    {
        var environment = new Dictionary<string, string> { ["DH_VM_NO_UFFD"] = "1" };
        Assert.Equal(new ProgramResult(0, "same\n", ""), await Dh.RunAsync(["exec", "-c", "print('same')"], environment: environment));
    }

    [Theory]
    [InlineData("import sys; sys.exit(7)", 7, "")]
    [InlineData("import sys; sys.exit('words')", 1, "words\n")]
    [InlineData("import os; os._exit(9)", 9, "")]
    [InlineData("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "dh: Signal 9 ended the code.\n")]
    [InlineData("import ctypes; ctypes.string_at(0)", 139, "dh: Signal 11 ended the code.\n")]
    public async Task Exit_codes_are_the_codes_own(string code, int exitCode, string error)
    {
        var result = await Dh.ExecAsync(code);
        Assert.Equal((exitCode, error), (result.ExitCode, result.Error));
    }

    [Fact]
    public async Task An_exception_shows_the_codes_own_lines()
    {
        var result = await Dh.ExecAsync("def f():\n    return 1 / 0\nf()");
        Assert.Equal(1, result.ExitCode);
        Assert.StartsWith("Traceback (most recent call last):\n  File \"<string>\", line 3, in <module>\n", result.Error, StringComparison.Ordinal);
        Assert.EndsWith("ZeroDivisionError: division by zero\n", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Json_is_one_object()
    {
        var result = await Dh.ExecAsync("print('out'); 1 + 1", "--json");
        using var json = JsonDocument.Parse(result.Output);
        var root = json.RootElement;
        Assert.Equal("exited", root.GetProperty("outcome").GetString());
        Assert.Equal(0, root.GetProperty("exit_code").GetInt32());
        Assert.Equal("2", root.GetProperty("result_repr").GetString());
        Assert.Equal("out\n", root.GetProperty("stdout").GetString());
        Assert.Equal("", root.GetProperty("stderr").GetString());
        Assert.Equal(JsonValueKind.Array, root.GetProperty("tables").ValueKind);
        Assert.Equal("emulated+cage", root.GetProperty("isolation").GetString());
    }

    [Fact]
    public async Task Standard_input_reaches_the_code()
    {
        var result = await Dh.RunAsync(["exec", "-c", "import sys; print(sum(map(int, sys.stdin)))"], "1\n2\n3\n4\n5\n");
        Assert.Equal(new ProgramResult(0, "15\n", ""), result);
    }

    /// <summary>A directory cannot be read; and what the program opens next must not take a closed descriptor's place.</summary>
    [Theory]
    [InlineData("exec -c 'print(1)' < /", 0, "1\n", "")]
    [InlineData("exec -c 'input()' < /", 125, "", "dh: The code's standard input cannot be read: Is a directory")]
    [InlineData("exec -c 'import sys; print(len(sys.stdin.read()))' <&-", 0, "0\n", "")]
    [InlineData("exec -c 'import sys; sys.stderr.write(str(1)); print(2)' 2>&-", 0, "2\n", "")]
    [InlineData("exec -c 'print(1)' >&-", 125, "", "dh: Standard output does not take what is written to it: write: EBADF (Bad file descriptor)\n")]
    [InlineData("exec --json -c 'print(1)' >&-", 125, "", "Bad file descriptor")]
    [InlineData("vm status >&-", 125, "", "Bad file descriptor")]
    [InlineData("exec -c 'print(1)' <&- >&- 2>&-", 125, "", "")]
    public async Task Standard_descriptors_may_be_closed_or_of_no_use(string arguments, int exitCode, string output, string error)
    {
        var result = await Dh.RunAsync(new ProcessStartInfo("/bin/sh", ["-c", $"exec {Repository.PathOf("bin/dh")} {arguments}"]));
        Assert.Equal((exitCode, output), (result.ExitCode, result.Output));
        Assert.Contains(error, result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Input_that_the_code_does_not_read_stays_with_the_caller()
    {
        using var process = new Process
        {
            StartInfo = new ProcessStartInfo("/bin/sh", ["-c", $"printf '1\\n2\\n' | while read n; do {Repository.PathOf("bin/dh")} exec -c \"print($n)\"; done"])
            {
                RedirectStandardOutput = true,
            },
        };
        process.StartInfo.Environment["DH_HOME"] = Dh.Home;
        process.Start();
        Assert.Equal("1\n2\n", await process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken));
    }

    [Theory]
    [InlineData("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")]
    [InlineData("for line in open('/dev/stdin'): print(line, end='', flush=True)")]
    [InlineData("import os, select\nwhile select.select([0], [], []) and (data := os.read(0, 100)): os.write(1, data)")]
    public async Task Input_may_come_bit_by_bit(string code)
    {
        using var process = Dh.Start(["exec", "-c", code]);
        for (int i = 0; i < 5; i++)
        {
            await process.StandardInput.WriteLineAsync($"{i}");
            await process.StandardInput.FlushAsync(TestContext.Current.CancellationToken);
            Assert.Equal($"{i}", await process.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken).AsTask().WaitAsync(TimeSpan.FromSeconds(10), TestContext.Current.CancellationToken));
        }

        process.StandardInput.Close();
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(0, process.ExitCode);
    }

    [Fact]
    public async Task A_script_has_its_name_and_arguments()
    {
        using var directory = new TempDir();
        string script = directory.Write("script.py", "import sys, os\nprint(__name__, os.path.basename(__file__), sys.argv[1:])\nraise ValueError('x')\n");
        var result = await Dh.RunAsync(["exec", script, "a", "--b"]);
        Assert.Equal("__main__ script.py ['a', '--b']\n", result.Output);
        Assert.Equal(1, result.ExitCode);
        Assert.Contains("line 3, in <module>\n    raise ValueError('x')\nValueError: x\n", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Code_may_come_from_standard_input()
    {
        Assert.Equal(new ProgramResult(0, "from stdin\n", ""), await Dh.RunAsync(["exec", "-"], "print('from stdin')"));
    }

    [Fact]
    public async Task The_environment_is_passed_on()
    {
        Assert.Equal("bar\n", (await Dh.ExecAsync("import os; print(os.environ['FOO'])", "--env", "FOO=bar")).Output);
    }

    [Theory]
    [InlineData("while True: pass")]
    [InlineData("import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)")]
    public async Task A_timeout_ends_the_code_with_3(string code)
    {
        Assert.Equal(3, (await Dh.ExecAsync(code, "--timeout", "1")).ExitCode);
    }

    [Theory]
    [InlineData("0")]
    [InlineData("-1")]
    [InlineData("2592001")]
    [InlineData("NaN")]
    public async Task A_timeout_that_is_none_is_refused(string seconds)
    {
        var result = await Dh.ExecAsync("1", "--timeout", seconds);
        Assert.Equal((2, "dh: --timeout takes seconds: more than 0, at most 2592000 (30 days).\n"), (result.ExitCode, result.Error));
    }

    [Fact]
    public async Task The_guests_timers_are_fine_and_an_idle_guest_does_not_tick()
    {
        const string Code = """
            import time
            def ticks():
                with open("/proc/interrupts") as lines:
                    return sum(sum(map(int, line.split()[1:3])) for line in lines if line.lstrip().startswith("LOC:"))
            before = ticks()
            time.sleep(2)
            print(time.get_clock_info("monotonic").resolution, ticks() - before < 200)
            """;
        Assert.Equal("1e-09 True\n", (await Dh.ExecAsync(Code)).Output);
    }

    [Fact]
    public async Task A_timeout_ends_the_code_although_nobody_reads_its_output()
    {
        using var process = Dh.Start(["exec", "--timeout", "1", "-c", "while True: print('x' * 1000)"]);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken).WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.Equal(3, process.ExitCode);
    }

    [Fact]
    public async Task Too_little_isolation_is_refused_before_any_code()
    {
        var result = await Dh.ExecAsync("print('ran')", "--require-isolation", "hardware+jail");
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.Contains("hardware+jail", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_killed_runner_is_a_failure_of_the_sandbox()
    {
        var result = await Dh.ExecAsync("import os, signal; os.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(60)");
        Assert.Equal(125, result.ExitCode);
    }

    [Fact]
    public async Task A_flood_of_output_streams_through()
    {
        using var process = Dh.Start(["exec", "-c", "import os\nfor i in range(1024): os.write(1, b'x' * 65536)"]);
        process.StandardInput.Close();
        long total = 0;
        byte[] buffer = new byte[1 << 20];
        for (int read; (read = await process.StandardOutput.BaseStream.ReadAsync(buffer, TestContext.Current.CancellationToken)) > 0;)
        {
            total += read;
        }

        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal((64L << 20, 0), (total, process.ExitCode));
    }

    [Fact]
    public async Task Eight_clones_at_once_have_each_their_own_output()
    {
        var results = await Task.WhenAll(Enumerable.Range(0, 8).Select(i => Dh.ExecAsync($"print({i})")));
        Assert.Equal(Enumerable.Range(0, 8).Select(i => new ProgramResult(0, $"{i}\n", "")), results);
    }
}
