using System.Diagnostics;
using System.Text.RegularExpressions;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Firecracker;

/// <summary><c>dh exec</c> over a played Firecracker: what is said to it, in which order, and what comes of each thing that goes wrong.</summary>
public sealed class FirecrackerRunTests : IAsyncLifetime
{
    private const string Code = "6 * 7";
    private const string LoadFailure = "Load snapshot error: Failed to restore from snapshot: ";

    private FirecrackerHome _home = null!;

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    public async ValueTask InitializeAsync() => await UseAsync();

    [Theory(Timeout = 60_000)]
    [InlineData("1.13.0", "prefetch")]
    [InlineData("1.15.0", "lazy")]
    [InlineData("1.16.1", "prefetch")]
    [InlineData("1.17.0", "eager")]
    public async Task With_a_page_server_it_loads_a_paused_machine_and_resumes_it_once(string version, string policy)
    {
        await UseAsync($"version {version}");
        await AssertRunsAsync("--memory-policy", policy);
        string[] requests = Requests();
        Assert.Equal(2, requests.Length);
        Assert.Matches("""^PUT /snapshot/load \{"snapshot_path":"state","mem_backend":\{"backend_type":"Uffd","backend_path":"uffd.sock"\},"resume_vm":false\}$""", requests[0]);
        Assert.Equal("""PATCH /vm {"state":"Resumed"}""", requests[1]);
    }

    [Fact(Timeout = 60_000)]
    public async Task From_the_file_the_load_resumes_and_nothing_else_does()
    {
        await AssertRunsAsync("--memory-policy", "file");
        Assert.Equal("""PUT /snapshot/load {"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"},"resume_vm":true}""", Assert.Single(Requests()));
    }

    [Fact(Timeout = 60_000)]
    public async Task Guest_memory_in_several_regions_is_served()
    {
        await UseAsync("split 20 30");
        var result = await _home.Dh.ExecAsync(Code, "--memory-policy", "eager", "--verbose");
        Assert.True(result is { ExitCode: 0, Output: "42\n" }, result.ToString());
        Assert.Contains("UFFD: populated 3 regions, 64 MiB", result.Error, StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_Firecracker_that_is_slow_to_answer_is_waited_for()
    {
        _home.Fake.Play("slow-accept 700", "vsock refuse 3");
        await AssertRunsAsync();
        Assert.Equal(4, _home.Fake.Notes().Count(note => note.Text.StartsWith("vsock CONNECT", StringComparison.Ordinal) && !_boot.Contains(note)));
    }

    [Theory(Timeout = 60_000)]
    [InlineData("1.0.3", "cannot have its memory from a page server, which takes 1.1 or newer", """{"snapshot_path":"state","mem_file_path":"memory","resume_vm":true}""")]
    [InlineData("1.10.1", "hangs up on its page server, which then cannot tell it from a dead one; 1.12 or newer does not", """{"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"},"resume_vm":true}""")]
    public async Task A_Firecracker_that_is_too_old_for_a_page_server_maps_the_file_and_one_line_says_so(string version, string why, string load)
    {
        await UseAsync($"version {version}");
        var result = await ExecAsync();
        Assert.Equal((0, "42\n"), (result.ExitCode, result.Output));
        Assert.Equal($"dh: no userfaultfd here (Firecracker {version} ({_home.Fake.ProgramPath}) {why}): the VMM maps the memory file instead\n", result.Error);
        Assert.Equal($"PUT /snapshot/load {load}", Assert.Single(Requests()));

        foreach (string policy in (string[])["eager", "prefetch", "lazy"])
        {
            await AssertFailsAsync($"Memory policy {policy} needs a userfaultfd: Firecracker {version}", "--memory-policy", policy);
        }
    }

    [Theory(Timeout = 60_000)]
    [InlineData("Failed to get snapshot state from file: Failed to load snapshot state from file: bitcode error", "was written by a Firecracker of another snapshot version, or is damaged")]
    [InlineData("Failed to get snapshot state from file: Failed to load snapshot state from file: CRC64 validation failed", "device state is damaged")]
    [InlineData("Failed to get snapshot state from file: Failed to load snapshot state from file: IO Error: File too short to contain CRC", "device state was cut off")]
    [InlineData("Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory: No such file or directory (os error 2)", "A file of the snapshot is missing")]
    [InlineData("Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: Connection refused (os error 111)", "page server's socket")]
    [InlineData("Failed to build microVM from snapshot: Kvm error: Error creating KVM object: Permission denied (os error 13)", "join its group (`kvm`)")]
    public async Task A_load_that_is_refused_shows_the_fault_and_what_it_means(string fault, string meaning)
    {
        _home.Fake.Play($"fatal /snapshot/load {LoadFailure}{fault}");
        string error = await AssertFailsAsync(LoadFailure + fault);
        Assert.Contains(meaning, error, StringComparison.Ordinal);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")]
    [InlineData("The requested operation is not supported after starting the microVM.")]
    public async Task A_load_that_is_refused_by_a_process_that_lives_on_ends_it(string fault)
    {
        _home.Fake.Play($"fail /snapshot/load {fault}");
        await AssertFailsAsync(fault);
    }

    [Fact(Timeout = 120_000)]
    public async Task What_never_answers_is_killed_after_the_limit()
    {
        // All at once: each of them takes the 30 s.
        await Task.WhenAll(
            AssertGivenUpAsync("silence /snapshot/load", "eager", "`PUT /snapshot/load` within 30 s, had not connected to the page server and was killed"),
            AssertGivenUpAsync("silence /snapshot/load", "file", "PUT /snapshot/load", "within 30 s", "was killed"),
            AssertGivenUpAsync("silence /vm", "lazy", "PATCH /vm", "within 30 s", "was killed"),
            AssertGivenUpAsync("slow-accept 100000", "lazy", "PUT /snapshot/load", "within 30 s", "was killed"),
            AssertGivenUpAsync("vsock silence", "eager", "took no connection on vsock port 25704 within 30"),
            AssertGivenUpAsync("vsock refuse 100000", "eager", "took no connection on vsock port 25704 within 30", "the last: it was refused"));

        static async Task AssertGivenUpAsync(string script, string policy, params string[] words)
        {
            using var home = await FirecrackerHome.CreateAsync();
            home.Fake.Play(script);
            var result = await home.Dh.ExecAsync(Code, "--memory-policy", policy);
            Assert.Equal((125, ""), (result.ExitCode, result.Output));
            Assert.All(words, word => Assert.Contains(word, result.Error, StringComparison.Ordinal));
            await home.AssertNothingLeftAsync(script);
        }
    }

    [Theory(Timeout = 60_000)]
    [InlineData("start", "")]
    [InlineData("start", " 1")]
    [InlineData("listen", "")]
    [InlineData("load", "")]
    [InlineData("load", " 148")]
    [InlineData("handshake", "")]
    [InlineData("populating", "")]
    [InlineData("populating", " 1")]
    [InlineData("loaded", "")]
    [InlineData("resume", "")]
    [InlineData("resumed", "")]
    [InlineData("connect", "")]
    [InlineData("connect", " 0")]
    public async Task A_Firecracker_that_dies_at_any_step_is_a_failure_with_its_last_words(string step, string code)
    {
        foreach (string policy in (string[])["eager", "lazy"])
        {
            _home.Fake.Play($"die {step}{code}");
            string error = await AssertFailsAsync($"the script ends this at: {step}", "--memory-policy", policy);
            Assert.Contains(code.Length > 0 ? $"exit code{code}" : "killed by signal 9", error, StringComparison.Ordinal);
        }
    }

    [Fact(Timeout = 60_000)]
    public async Task A_Firecracker_that_dies_while_code_runs_is_a_failure_with_its_last_words()
    {
        var arrived = new TaskCompletionSource();
        _home.Fake.Guest.Programs["dies"] = async run =>
        {
            await run.PrintAsync("before\n");
            await arrived.Task; // Firecracker itself carries it, and must not die with it
            await run.Vcpu.DieAsync(9);
            await Task.Delay(Timeout.InfiniteTimeSpan, run.Cancelled);
            return 0;
        };
        using var dh = _home.Dh.Start(["exec", "-c", "dies"]);
        Assert.Equal("before", await dh.StandardOutput.ReadLineAsync(Cancellation));
        arrived.SetResult();
        string output = await dh.StandardOutput.ReadToEndAsync(Cancellation), error = await dh.StandardError.ReadToEndAsync(Cancellation);
        await dh.WaitForExitAsync(Cancellation);
        Assert.Equal((125, ""), (dh.ExitCode, output));
        Assert.StartsWith("dh: The microVM ended while code ran (killed by signal 9). Its last words:\n", error, StringComparison.Ordinal);
        Assert.Contains("Kernel panic - not syncing: the guest ends its machine", error, StringComparison.Ordinal);
        await _home.AssertNothingLeftAsync("the death of Firecracker");
    }

    [Theory(Timeout = 60_000)]
    [InlineData("eof /snapshot/load", "PUT /snapshot/load")]
    [InlineData("garbage /snapshot/load", "PUT /snapshot/load")]
    [InlineData("eof /vm", "PATCH /vm")]
    [InlineData("garbage /vm", "PATCH /vm")]
    [InlineData("fail /vm No resume today.", "No resume today.")]
    [InlineData("vsock garbage", "answered `CONNECT 25704` with \"HTTP/1.1 200 OK")]
    [InlineData("vsock reset", "")]
    [InlineData("leftover api.sock", "Failed to open the API socket at: api.sock. Check that it is not already used.")]
    [InlineData("leftover v.sock", "Address already in use (os error 98)")]
    public async Task Whatever_else_it_does_wrong_is_a_failure_that_says_what(string script, string what)
    {
        _home.Fake.Play(script);
        await AssertFailsAsync(what);
    }

    [Fact(Timeout = 60_000)]
    public async Task Each_run_has_a_directory_of_its_own_and_its_sockets_go_with_it()
    {
        var started = new SemaphoreSlim(0);
        _home.Fake.Guest.Programs["wait"] = async run =>
        {
            started.Release();
            await Task.Delay(Timeout.InfiniteTimeSpan, run.Cancelled);
            return 0;
        };
        Process[] runs = [.. Enumerable.Range(0, 3).Select(_ => _home.Dh.Start(["exec", "-c", "wait"]))];
        for (int i = 0; i < runs.Length; i++)
        {
            Assert.True(await started.WaitAsync(TimeSpan.FromSeconds(20), Cancellation));
        }

        string[] directories = Directory.GetDirectories(_home.Home.RunDirectory);
        Assert.Equal(3, directories.Length);
        Assert.All(directories, directory => Assert.True(File.Exists(Path.Combine(directory, "v.sock")) && File.Exists(Path.Combine(directory, "api.sock"))));
        foreach (var run in runs)
        {
            run.Kill();
            await run.WaitForExitAsync(Cancellation);
            run.Dispose();
        }

        await _home.AssertNothingLeftAsync("three runs that were killed");
    }

    [Fact(Timeout = 60_000)]
    public async Task A_Firecracker_whose_snapshots_have_another_version_is_not_even_started()
    {
        using var other = new FakeFirecracker("version 1.15.0");
        var result = await _home.Dh.RunAsync(["exec", "-c", Code, "--firecracker", other.ProgramPath]);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.Contains("snapshots have version 10.0.0 (snapshot_version)", result.Error, StringComparison.Ordinal);
        Assert.Contains("reads version 9.0.0", result.Error, StringComparison.Ordinal);
        Assert.DoesNotContain(other.Notes(), note => note.Text == "listening");
    }

    public ValueTask DisposeAsync()
    {
        _home.Dispose();
        return ValueTask.CompletedTask;
    }

    private HashSet<FakeFirecrackerNote> _boot = [];

    /// <summary>A home whose fake plays this from the beginning.</summary>
    private async Task UseAsync(params string[] script)
    {
        _home?.Dispose();
        _home = await FirecrackerHome.CreateAsync(script);
        _home.Fake.Guest.Programs[Code] = run =>
        {
            run.ResultRepr = "42";
            return Task.FromResult(0);
        };
        _boot = [.. _home.Fake.Notes()];
    }

    private Task<ProgramResult> ExecAsync(params string[] options) => _home.Dh.ExecAsync(Code, options);

    private async Task AssertRunsAsync(params string[] options)
    {
        Assert.Equal(new ProgramResult(0, "42\n", ""), await ExecAsync(options));
        await _home.AssertNothingLeftAsync("a run");
    }

    private async Task<string> AssertFailsAsync(string what, params string[] options)
    {
        var result = await ExecAsync(options);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith("dh: ", result.Error, StringComparison.Ordinal);
        Assert.Contains(what, Regex.Replace(result.Error, "\n(?!$)", " "), StringComparison.Ordinal);
        await _home.AssertNothingLeftAsync("a failure");
        return result.Error;
    }

    /// <summary>The requests since the snapshot was made.</summary>
    private string[] Requests() =>
        [.. _home.Fake.Notes().Where(note => !_boot.Contains(note) && Regex.IsMatch(note.Text, "^(GET|PUT|PATCH) ")).Select(note => note.Text.TrimEnd())];
}
