using System.Text.Json;
using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>The real engine, in a real guest.</summary>
[Collection(DeephavenCollection.Name)]
public sealed class DeephavenTests
{
    /// <summary>Prints 13 numbers and names that no two clones may have in common, and the time.</summary>
    private const string CloneCode = """
        import os, random, socket, time, uuid
        import jpy, numpy
        java = lambda name: jpy.get_type('java.' + name)
        print(os.urandom(8).hex(), random.random(), uuid.uuid4(), numpy.random.random(), numpy.random.default_rng().random(), socket.gethostname(), sep='\n')
        print(java('security.SecureRandom')().nextLong(), java('lang.Math').random(), java('util.concurrent.ThreadLocalRandom').current().nextLong(), sep='\n')
        print(java('util.SplittableRandom')().nextLong(), java('util.Random')().nextLong(), java('util.UUID').randomUUID().toString(), sep='\n')
        print(empty_table(1).update(['R = random()']).j_table.getColumnSource('R').getDouble(0))
        print(time.time())
        """;

    private const string Preview = "         x\n----------\n         0\n         1\n         2\n         3\n         4\n";

    private readonly DhProgram _dh;
    private readonly DeephavenHome _home;

    public DeephavenTests(DeephavenHome home)
    {
        Assert.SkipWhen(home.Missing is not null, home.Missing ?? "");
        _home = home;
        _dh = home.Dh;
    }

    [Theory]
    [InlineData("prefetch")]
    [InlineData("eager")]
    [InlineData("file")]
    [InlineData("lazy")]
    public async Task Code_and_tables_are_the_same_under_every_policy(string policy)
    {
        Assert.Equal(new ProgramResult(0, "hello\n2\n", ""), await ExecAsync("print('hello'); 1 + 1", "--memory-policy", policy));
        Assert.Equal(
            new ProgramResult(0, $"{Preview}\nt: 5 rows, static (x: int)\n{Preview}", ""),
            await ExecAsync("from deephaven import empty_table; t = empty_table(5).update(['x = i']); print(t.to_string())", "--memory-policy", policy));
    }

    [Fact]
    public async Task Verbose_says_what_the_page_server_did()
    {
        var result = await ExecAsync("print('Hello from UFFD!')", "--verbose");
        Assert.Equal("Hello from UFFD!\n", result.Output);
        Assert.Matches(@"UFFD: populated 1 regions, 2048 MiB \(prefetch: \d+ MiB copied, ", result.Error);
    }

    [Fact]
    public async Task Tables_are_in_the_JSON_in_the_order_of_their_assignment()
    {
        var result = await ExecAsync("b = time_table('PT1S'); a = empty_table(3).update('Y = i * 0.5'); _hidden = empty_table(1); a.view('Y')", "--json");
        using var json = JsonDocument.Parse(result.Output);
        Assert.Equal(JsonValueKind.Null, json.RootElement.GetProperty("result_repr").ValueKind);
        JsonElement[] tables = [.. json.RootElement.GetProperty("tables").EnumerateArray()];
        Assert.Equal(["b", "a", null], tables.Select(table => table.GetProperty("name").GetString()));
        Assert.Equal([true, false, false], tables.Select(table => table.GetProperty("is_refreshing").GetBoolean()));
        Assert.Equal([3, 3], tables[1..].Select(table => table.GetProperty("row_count").GetInt64()));
        Assert.Equal("""[{"name":"Y","type":"double"}]""", tables[1].GetProperty("columns").GetRawText());
        Assert.StartsWith("                   Y\n", tables[1].GetProperty("preview").GetString(), StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_last_expression_that_is_a_table_is_shown_and_not_repeated()
    {
        Assert.Equal(new ProgramResult(0, $"(result): 5 rows, static (x: int)\n{Preview}", ""), await ExecAsync("empty_table(5).update('x = i')"));
        Assert.Equal(new ProgramResult(0, $"t: 5 rows, static (x: int)\n{Preview}", ""), await ExecAsync("t = empty_table(5).update('x = i')\nt"));
        Assert.Equal(new ProgramResult(0, Preview, ""), await ExecAsync("t = empty_table(5).update('x = i')", "--no-table-meta"));
        Assert.Equal(new ProgramResult(0, "7\n", ""), await ExecAsync("t = empty_table(5).update('x = i'); 7", "--no-show-tables"));
    }

    /// <summary>By itself an operation has `inspect` read the source of all that has called it (guest/engine_deephaven.py).</summary>
    [Fact]
    public async Task An_operation_reads_no_source_and_knows_its_callers_variables()
    {
        const string Code = """
            import sys
            opened = []
            sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == 'open' else None)
            def with_local():
                local = 7
                return empty_table(1).update('x = local').to_string()
            print(with_local().split(), opened)
            """;
        Assert.Equal(new ProgramResult(0, "['x', '----------', '7'] []\n", ""), await ExecAsync(Code));
    }

    [Fact]
    public async Task Of_a_large_table_ten_rows_are_looked_at()
    {
        var result = await ExecAsync("t = empty_table(10_000_000_000).view('x = ii')");
        Assert.Equal(0, result.ExitCode);
        Assert.StartsWith("t: 10000000000 rows, static (x: long)\n", result.Output, StringComparison.Ordinal);
        Assert.Equal(13, result.Output.Split('\n').Length - 1);
    }

    [Fact]
    public async Task A_table_that_cannot_be_shown_says_so_and_is_no_failure()
    {
        var result = await ExecAsync("def bad(x) -> int:\n    raise ValueError('not this one')\nt = empty_table(3).update_view('X = bad(i)')\nprint('done')");
        Assert.Equal(0, result.ExitCode);
        Assert.StartsWith("done\nt: ", result.Output, StringComparison.Ordinal);
        Assert.Contains("t cannot be shown: ", result.Output, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("import sys; sys.exit(7)", 7, "")]
    [InlineData("import os; os._exit(5)", 5, "")]
    [InlineData("import sys; sys.exit('words')", 1, "words\n")]
    [InlineData("import jpy; jpy.get_type('java.lang.System').exit(3)", 3, "")]
    [InlineData("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "dh: Signal 9 ended the code.\n")]
    public async Task Exit_codes_are_the_codes_own(string code, int exitCode, string error)
    {
        var result = await ExecAsync(code);
        Assert.Equal((exitCode, "", error), (result.ExitCode, result.Output, result.Error));
    }

    [Fact]
    public async Task A_crash_is_told_with_the_words_of_the_JVM()
    {
        var result = await ExecAsync("import ctypes; ctypes.string_at(0)");
        Assert.Equal((134, "dh: Signal 6 ended the code.\n"), (result.ExitCode, result.Error));
        Assert.Contains("A fatal error has been detected by the Java Runtime Environment", result.Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_formula_that_does_not_compile_is_the_codes_own_error()
    {
        var result = await ExecAsync("empty_table(1).update('X = nosuchcolumn + 1')");
        Assert.Equal(1, result.ExitCode);
        Assert.Contains("deephaven.dherror.DHError", result.Error, StringComparison.Ordinal);
        Assert.Contains("nosuchcolumn", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Standard_input_is_there_and_what_shadows_a_builtin_harms_nothing()
    {
        var result = await _dh.RunAsync(["exec", "--version", DeephavenHome.Version, "-c", "import sys; n = sum(map(int, sys.stdin)); n"], "1\n2\n3\n");
        Assert.Equal(new ProgramResult(0, "6\n", ""), result);
        Assert.Equal(new ProgramResult(0, "t: 1 row, static\n", ""), await ExecAsync("print = repr = str = 5; t = empty_table(1)"));
    }

    [Theory]
    [InlineData("while True: pass")]
    [InlineData("import jpy; jpy.get_type('java.lang.Thread').sleep(600_000)")]
    public async Task Code_that_never_ends_is_ended_in_Python_and_in_Java(string code)
    {
        var result = await ExecAsync(code, "--timeout", "1");
        Assert.Equal(3, result.ExitCode);
        Assert.EndsWith("dh: The code did not end within 1 s.\n", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_script_runs_as_python_runs_it()
    {
        using var directory = new TempDir();
        await File.WriteAllTextAsync(directory["script.py"], "import sys\nfrom deephaven import empty_table\nprint(sys.argv[1:], __name__, empty_table(2).size)\n", TestContext.Current.CancellationToken);
        Assert.Equal(new ProgramResult(0, "['a', 'b'] __main__ 2\n", ""), await _dh.RunAsync(["exec", "--version", DeephavenHome.Version, directory["script.py"], "a", "b"]));
    }

    [Fact]
    public async Task Clones_share_neither_random_numbers_nor_the_clock_of_the_snapshot()
    {
        var results = await Task.WhenAll(Enumerable.Range(0, 4).Select(_ => ExecAsync(CloneCode)));
        double now = DateTimeOffset.UtcNow.ToUnixTimeMilliseconds() / 1000.0;
        string[][] lines = [.. results.Select(result => result.Output.Split('\n', StringSplitOptions.RemoveEmptyEntries))];
        Assert.All(lines, clone => Assert.Equal(14, clone.Length));
        Assert.All(Enumerable.Range(0, 13), i => Assert.Equal(4, lines.Select(clone => clone[i]).Distinct().Count()));
        Assert.All(lines, clone => Assert.InRange(double.Parse(clone[13], System.Globalization.CultureInfo.InvariantCulture), now - 60, now + 1));
    }

    [Fact]
    public async Task Clones_that_were_busy_before_the_hello_share_no_random_numbers_either()
    {
        string[] first = (await LateHello.RunAsync(new DhHome(_dh.Home), "deephaven", CloneCode, TestContext.Current.CancellationToken)).Split('\n');
        string[] second = (await LateHello.RunAsync(new DhHome(_dh.Home), "deephaven", CloneCode, TestContext.Current.CancellationToken)).Split('\n');
        Assert.Equal((15, 15), (first.Length, second.Length));
        Assert.All(Enumerable.Range(0, 14), i => Assert.NotEqual(first[i], second[i]));
    }

    [Fact]
    public async Task A_second_run_in_a_sandbox_starts_with_a_namespace_of_its_own()
    {
        var snapshot = new SnapshotStore(new DhHome(_dh.Home)).FindNewest("deephaven")!;
        await using var sandbox = await Sandbox.RestoreAsync(
            snapshot, new SandboxOptions { Home = new DhHome(_dh.Home), Installation = new Installation(Repository.PathOf("bin")) }, TestContext.Current.CancellationToken);
        var output = new CapturedText();
        var first = await sandbox.ExecuteAsync(
            new ExecutionRequest { Source = "import os, subprocess\nt = empty_table(1)\nos.environ['NAME'] = 'x'\nsubprocess.Popen(['sleep', '600'])\nprint('first')" }, output, TestContext.Current.CancellationToken);
        var second = await sandbox.ExecuteAsync(
            new ExecutionRequest { Source = "import os\nprint('t' in globals(), 'NAME' in os.environ, input('? '))", Input = new MemoryStream("line\n"u8.ToArray()) }, output, TestContext.Current.CancellationToken);
        var third = await sandbox.ExecuteAsync(
            new ExecutionRequest { Source = "import os; print([p for p in os.listdir('/proc') if p.isdigit() and '(sleep) S' in open(f'/proc/{p}/stat').read()])" }, output, TestContext.Current.CancellationToken);
        Assert.Equal((0, 0, 0), (first.ExitCode, second.ExitCode, third.ExitCode));
        Assert.Equal("t", Assert.Single(first.Tables).Name);
        Assert.Empty(second.Tables);
        Assert.Equal("first\n? False False line\n[]\n", output.Text);
    }

    [Fact]
    public async Task Nothing_of_the_guest_is_reachable_from_outside()
    {
        var result = await ExecAsync("import os; print(sorted(os.listdir('/sys/class/net')))");
        Assert.Equal("['lo']\n", result.Output);
    }

    [Fact]
    public async Task A_version_that_is_not_there_names_what_was_looked_for()
    {
        var exec = await _dh.ExecAsync("1", "--version", "0.1");
        Assert.Equal(4, exec.ExitCode);
        Assert.Contains("There is no snapshot of version 0.1 (--version)", exec.Error, StringComparison.Ordinal);
        Assert.Contains($"deephaven {DeephavenHome.Version}", exec.Error, StringComparison.Ordinal);
        Assert.EndsWith("dh vm prepare --version 0.1\n", exec.Error, StringComparison.Ordinal);

        var prepare = await _dh.RunAsync(["vm", "prepare", "--version", "40.0", "--wheelhouse", _home.Wheelhouse], timeLimit: TimeSpan.FromMinutes(5));
        Assert.Equal(125, prepare.ExitCode);
        Assert.Contains("deephaven-server==40.0", prepare.Error, StringComparison.Ordinal);
        Assert.Contains(_home.Wheelhouse, prepare.Error, StringComparison.Ordinal);
    }

    private Task<ProgramResult> ExecAsync(string code, params string[] options) => _dh.ExecAsync(code, ["--version", DeephavenHome.Version, .. options]);
}
