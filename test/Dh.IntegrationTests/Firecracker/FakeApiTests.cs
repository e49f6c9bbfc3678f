using System.Diagnostics;
using System.Globalization;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>The fake's API has the original's habits, byte by byte where a client could trip over them.</summary>
public sealed class FakeApiTests : IDisposable
{
    private const string JsonError = "An error occurred when deserializing the json body of a request: ";
    private const string LoadError = "Load snapshot error: Failed to restore from snapshot: ";
    private const string Load = """{"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"}}""";

    private readonly FakeFirecracker _fake = new();
    private readonly TempDir _snapshot = new();

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    [Theory(Timeout = 60_000)]
    [InlineData("1.0.3", "4.0.0")]
    [InlineData("1.10.1", "4.0.0")]
    [InlineData("1.13.0", "8.0.0")]
    [InlineData("1.15.0", "9.0.0")]
    [InlineData("1.16.1", "10.0.0")]
    [InlineData("1.17.0", "11.0.0")]
    public async Task The_first_line_of_a_version_is_the_version_and_a_log_line_follows(string version, string snapshotVersion)
    {
        _fake.Play($"version {version}");
        Assert.Matches($"^Firecracker v{version}\n\n.*exit_code=0\n$", await RunAsync("--version"));
        Assert.Matches($"^v{snapshotVersion}\n.*exit_code=0\n$", await RunAsync("--snapshot-version"));
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        Assert.Equal($$$"""{"firecracker_version":"{{{version}}}"}""", (await api.AskAsync("GET", "/version")).Body);
        Assert.Equal($$"""{"id":"anonymous-instance","state":"Not started","vmm_version":"{{version}}","app_name":"Firecracker"}""", (await api.AskAsync("GET", "/")).Body);
    }

    [Fact(Timeout = 60_000)]
    public async Task Success_has_neither_a_reason_phrase_nor_a_body()
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        var answer = await api.AskAsync("PUT", "/entropy", "{}");
        Assert.Equal("HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n", answer.Head);
        Assert.Equal("", answer.Body);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("PUT /entropy HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "{ \"error\": \"Invalid header. Reason: Unsupported value. Key:Transfer-Encoding; Value:chunked\nAll previous unanswered requests will be dropped.\" }")]
    [InlineData("POST / HTTP/1.1\r\n\r\n", "{ \"error\": \"Invalid HTTP Method.\nAll previous unanswered requests will be dropped.\" }")]
    [InlineData("PUT /entropy HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", "{ \"error\": \"Request payload with size 51201 is larger than the limit of 51200 allowed by server.\nAll previous unanswered requests will be dropped.\" }")]
    [InlineData("GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", """{"fault_message":"GET request cannot have a body."}""")]
    [InlineData("PUT /entropy HTTP/1.1\r\n\r\n", """{"fault_message":"Empty PUT request."}""")]
    [InlineData("PUT /nothing HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", """{"fault_message":"Invalid request method and/or path: PUT nothing."}""")]
    [InlineData("PUT /entropy HTTP/1.1\r\nContent-Length: 5\r\n\r\n\uFEFF{}", $$"""{"fault_message":"{{JsonError}}expected value at line 1 column 1."}""")]
    public async Task What_it_does_not_take_is_answered_with_400(string request, string body)
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        await api.SayAsync(request);
        var answer = await api.HearAsync();
        Assert.Equal((400, body), (answer!.Status, answer.Body));
    }

    [Fact(Timeout = 60_000)]
    public async Task A_body_may_have_51200_bytes()
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        Assert.Equal(204, (await api.AskAsync("PUT", "/entropy", "{}".PadLeft(51_200))).Status);
    }

    [Fact(Timeout = 60_000)]
    public async Task Connection_close_is_ignored()
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        await api.SayAsync("GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
        Assert.Equal(200, (await api.HearAsync())!.Status);
        Assert.Equal(200, (await api.AskAsync("GET", "/version")).Status);
    }

    [Fact(Timeout = 60_000)]
    public async Task The_eleventh_connection_is_closed_with_a_word_and_the_others_stay()
    {
        using var process = await _fake.StartAsync();
        RawHttp[] ten = [.. Enumerable.Range(0, 10).Select(_ => process.Connect())];
        foreach (var api in ten)
        {
            Assert.Equal(200, (await api.AskAsync("GET", "/version")).Status);
        }

        using var eleventh = process.Connect();
        var answer = await eleventh.HearAsync();
        Assert.Equal((503, """{ "error": "Too many open connections" }"""), (answer!.Status, answer.Body));
        Assert.Null(await eleventh.HearAsync());
        Assert.Equal(200, (await ten[9].AskAsync("GET", "/version")).Status);
        Array.ForEach(ten, api => api.Dispose());
    }

    [Fact(Timeout = 60_000)]
    public async Task A_client_that_ends_its_sending_side_loses_the_reply()
    {
        // Slow enough for the end to be there before the request is taken.
        _fake.Play("slow-accept 200");
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        await api.SendAsync("PUT", "/entropy", "{}");
        api.EndSending();
        Assert.Null(await api.HearAsync());
    }

    [Theory(Timeout = 60_000)]
    [InlineData("1.0.3", "mem_backend", "expected one of `snapshot_path`, `mem_file_path`, `enable_diff_snapshots`, `resume_vm`")]
    [InlineData("1.10.1", "track_dirty_pages", "expected one of `snapshot_path`, `mem_backend`, `mem_file_path`, `enable_diff_snapshots`, `resume_vm`")]
    [InlineData("1.15.0", "vsock_override", "expected one of `snapshot_path`, `mem_backend`, `mem_file_path`, `enable_diff_snapshots`, `track_dirty_pages`, `resume_vm`, `network_overrides`")]
    [InlineData("1.15.0", "clock_realtime", "expected one of `snapshot_path`, `mem_backend`, `mem_file_path`, `enable_diff_snapshots`, `track_dirty_pages`, `resume_vm`, `network_overrides`")]
    [InlineData("1.16.1", "huge_pages", "expected one of `snapshot_path`, `mem_backend`, `mem_file_path`, `enable_diff_snapshots`, `track_dirty_pages`, `resume_vm`, `network_overrides`, `vsock_override`, `clock_realtime`")]
    [InlineData("1.17.0", "memory_policy", "expected one of `snapshot_path`, `mem_backend`, `mem_file_path`, `enable_diff_snapshots`, `track_dirty_pages`, `resume_vm`, `network_overrides`, `vsock_override`, `clock_realtime`, `huge_pages`")]
    public async Task A_field_that_a_version_does_not_know_is_answered_with_those_that_it_knows(string version, string field, string known)
    {
        _fake.Play($"version {version}");
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        var answer = await api.AskAsync("PUT", "/snapshot/load", $$"""{"{{field}}":1}""");
        Assert.Equal((400, $$"""{"fault_message":"{{JsonError}}unknown field `{{field}}`, {{known}} at line 1 column {{field.Length + 3}}."}"""), (answer.Status, answer.Body));
    }

    [Theory(Timeout = 60_000)]
    [InlineData("""{"snapshot_path":"s"}""", "missing field: either `mem_backend` or `mem_file_path` is required")]
    [InlineData("""{"snapshot_path":"s","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}}""", "too many fields: either `mem_backend` or `mem_file_path` exclusively is required")]
    [InlineData("""{"mem_file_path":"m"}""", "missing field `snapshot_path` at line 1 column 21")]
    [InlineData("""{"snapshot_path":"s","mem_backend":{"backend_path":"m"}}""", "missing field `backend_type` at line 1 column 55")]
    [InlineData("""{"snapshot_path":"s",}""", "trailing comma at line 1 column 22")]
    public async Task A_wrong_load_request_leaves_the_process_usable(string body, string error)
    {
        await _fake.MakeSnapshotAsync(_snapshot.Path, 8);
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        var answer = await api.AskAsync("PUT", "/snapshot/load", body);
        Assert.Equal((400, $$"""{"fault_message":"{{JsonError}}{{error}}."}"""), (answer.Status, answer.Body));
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", LoadOf("File", _snapshot["memory"]))).Status);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_load_after_a_boot_was_configured_or_into_a_live_machine_leaves_the_process_usable()
    {
        await _fake.MakeSnapshotAsync(_snapshot.Path, 8);
        using var configured = await _fake.StartAsync();
        using var first = configured.Connect();
        Assert.Equal(204, (await first.AskAsync("PUT", "/machine-config", """{"vcpu_count":1,"mem_size_mib":8}""")).Status);
        Assert.Equal(Fault("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."), (await first.AskAsync("PUT", "/snapshot/load", Load)).Body);
        Assert.Equal(200, (await first.AskAsync("GET", "/version")).Status);

        using var live = await _fake.StartAsync();
        using var second = live.Connect();
        Assert.Equal(204, (await second.AskAsync("PUT", "/snapshot/load", LoadOf("File", _snapshot["memory"]))).Status);
        Assert.Equal(Fault("The requested operation is not supported after starting the microVM."), (await second.AskAsync("PUT", "/snapshot/load", Load)).Body);
        Assert.Contains("\"Paused\"", (await second.AskAsync("GET", "/")).Body, StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task A_running_machine_gives_no_snapshot()
    {
        await _fake.MakeSnapshotAsync(_snapshot.Path, 8);
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        string create = $$$"""{"snapshot_path":"{{{_snapshot["state2"]}}}","mem_file_path":"{{{_snapshot["memory2"]}}}"}""";
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/load", LoadOf("File", _snapshot["memory"]).Replace("}}", "},\"resume_vm\":true}", StringComparison.Ordinal))).Status);
        Assert.Equal(Fault("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"), (await api.AskAsync("PUT", "/snapshot/create", create)).Body);
        Assert.Equal(204, (await api.AskAsync("PATCH", "/vm", """{"state":"Paused"}""")).Status);
        Assert.Equal(204, (await api.AskAsync("PUT", "/snapshot/create", create)).Status);
        Assert.Equal(await File.ReadAllBytesAsync(_snapshot["memory"], Cancellation), await File.ReadAllBytesAsync(_snapshot["memory2"], Cancellation));
        Assert.True(AllocatedBlocks(_snapshot["memory"]) < AllocatedBlocks(_snapshot["memory2"]), "a Diff of a booted machine is sparse, a Full is not");
    }

    [Theory(Timeout = 60_000)]
    [InlineData("state-missing", "Failed to get snapshot state from file: Failed to open snapshot file: No such file or directory (os error 2)")]
    [InlineData("state-short", "Failed to get snapshot state from file: Failed to load snapshot state from file: IO Error: File too short to contain CRC")]
    [InlineData("state-damaged", "Failed to get snapshot state from file: Failed to load snapshot state from file: CRC64 validation failed")]
    [InlineData("state-of-another-version", "Failed to get snapshot state from file: Failed to load snapshot state from file: bitcode error")]
    [InlineData("memory-missing", "Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory: No such file or directory (os error 2)")]
    [InlineData("memory-short", "Total sum of memory regions exceeds largest possible file offset")]
    [InlineData("vsock-left-over", "VsockUnixBackend: Error binding to the host-side Unix socket: Address already in use (os error 98)")]
    [InlineData("no-page-server", "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: No such file or directory (os error 2)")]
    [InlineData("dead-page-server", "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: Connection refused (os error 111)")]
    public async Task A_load_that_fails_is_the_end_of_the_process(string damage, string why)
    {
        await _fake.MakeSnapshotAsync(_snapshot.Path, 8);
        await DamageAsync(damage);
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        var answer = await api.AskAsync("PUT", "/snapshot/load", LoadOf(damage.Contains("page-server", StringComparison.Ordinal) ? "Uffd" : "File", _snapshot[damage switch { "dead-page-server" => "dead.sock", "no-page-server" => "no.sock", _ => "memory" }]));
        Assert.Equal(400, answer.Status);
        Assert.StartsWith($$"""{"fault_message":"{{LoadError}}""", answer.Body, StringComparison.Ordinal);
        Assert.EndsWith($$$"""{{{why}}}"}""", answer.Body, StringComparison.Ordinal);
        Assert.Equal(1, await process.WaitForExitAsync());
        Assert.True(File.Exists(Path.Combine(process.Directory, "api.sock")), "api.sock stays behind");
    }

    [Fact(Timeout = 60_000)]
    public async Task An_API_socket_that_is_left_over_ends_it()
    {
        _fake.Play("leftover api.sock");
        using var process = await _fake.StartAsync();
        Assert.Equal(1, await process.WaitForExitAsync());
        Assert.Contains("Failed to open the API socket at: api.sock. Check that it is not already used.", await process.Output, StringComparison.Ordinal);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("start", "", 137)]
    [InlineData("listen", "", 137)]
    [InlineData("load", " 148", 148)]
    [InlineData("loaded", "", 137)]
    [InlineData("resume", " 1", 1)]
    [InlineData("resumed", "", 137)]
    public async Task It_dies_where_the_script_says_so(string step, string code, int exitCode)
    {
        await _fake.MakeSnapshotAsync(_snapshot.Path, 8);
        _fake.Play($"die {step}{code}");
        using var process = await _fake.StartAsync();
        if (step is not ("start" or "listen"))
        {
            using var api = process.Connect();
            await api.SendAsync("PUT", "/snapshot/load", LoadOf("File", _snapshot["memory"]));
            if (step != "load" && await api.HearAsync() is not null && step != "loaded")
            {
                await api.SendAsync("PATCH", "/vm", """{"state":"Resumed"}""");
            }

            await process.WaitForExitAsync();
        }

        Assert.Equal(exitCode, await process.WaitForExitAsync());
        Assert.EndsWith($"the script ends this at: {step}\n", await process.Output, StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task Requests_are_noted_with_their_time()
    {
        using var process = await _fake.StartAsync();
        using var api = process.Connect();
        long before = Stopwatch.GetTimestamp();
        await api.AskAsync("PUT", "/entropy", "{}");
        var note = Assert.Single(_fake.Notes(), note => note.Text == "PUT /entropy {}");
        Assert.Equal(process.Id, note.ProcessId);
        Assert.InRange(note.Time, before, Stopwatch.GetTimestamp());
    }

    public void Dispose()
    {
        _fake.Dispose();
        _snapshot.Dispose();
    }

    private static string Fault(string message) => $$$"""{"fault_message":"{{{message}}}"}""";

    private static long AllocatedBlocks(string path)
    {
        using var stat = Process.Start(new ProcessStartInfo("/usr/bin/stat", ["-c", "%b", path]) { RedirectStandardOutput = true })!;
        return long.Parse(stat.StandardOutput.ReadToEnd(), CultureInfo.InvariantCulture);
    }

    private string LoadOf(string type, string path) => $$$"""{"snapshot_path":"{{{_snapshot["state"]}}}","mem_backend":{"backend_type":"{{{type}}}","backend_path":"{{{path}}}"}}""";

    private async Task DamageAsync(string damage)
    {
        switch (damage)
        {
            case "state-missing":
                File.Delete(_snapshot["state"]);
                break;
            case "state-short":
                await File.WriteAllBytesAsync(_snapshot["state"], new byte[7], Cancellation);
                break;
            case "state-damaged":
                byte[] state = await File.ReadAllBytesAsync(_snapshot["state"], Cancellation);
                state[100]++;
                await File.WriteAllBytesAsync(_snapshot["state"], state, Cancellation);
                break;
            case "state-of-another-version":
                _fake.Play("version 1.15.0");
                break;
            case "memory-missing":
                File.Delete(_snapshot["memory"]);
                break;
            case "memory-short":
                await using (var memory = File.OpenWrite(_snapshot["memory"]))
                {
                    memory.SetLength(4096);
                }

                break;
            case "vsock-left-over":
                _fake.Play("leftover v.sock");
                break;
            case "dead-page-server":
                using (var server = Dh.Paging.PageServer.Bind(_snapshot["other.sock"]))
                {
                    File.Move(_snapshot["other.sock"], _snapshot["dead.sock"]);
                }

                break;
        }
    }

    private async Task<string> RunAsync(string argument)
    {
        using var process = Process.Start(new ProcessStartInfo(_fake.ProgramPath, [argument]) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(Cancellation);
        await process.WaitForExitAsync(Cancellation);
        return output;
    }
}
