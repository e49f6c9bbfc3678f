using System.Diagnostics;
using System.Globalization;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>Code that does its worst to its guest: the documented exit code, nothing left, and the next run is as good as any.</summary>
public sealed class GuestAbuseTests(PreparedHome prepared) : IDisposable
{
    private readonly OwnHome _own = new(prepared);

    [Fact]
    public async Task A_kernel_panic_is_a_failure_that_shows_its_reason()
    {
        var result = await RunAsync("open('/proc/sysrq-trigger', 'w').write('c')");
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith("dh: The microVM ended while code ran (exit code 0). Its last words:\n", result.Error, StringComparison.Ordinal);
        Assert.EndsWith("Kernel panic - not syncing: sysrq triggered crash\n", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_killed_runner_is_a_failure_that_says_so()
    {
        var result = await RunAsync("import os, time; os.kill(os.getppid(), 9); time.sleep(60)");
        Assert.Equal(125, result.ExitCode);
        Assert.Contains("dh init: the runner ended by signal 9", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task The_guests_init_cannot_be_killed()
    {
        Assert.Equal(new ProgramResult(0, "alive\n", ""), await RunAsync("import os; os.kill(1, 9); print('alive')"));
    }

    [Fact]
    public async Task A_stopped_runner_ends_at_the_timeout()
    {
        var result = await RunAsync("import os, signal, time; os.kill(os.getppid(), signal.SIGSTOP); time.sleep(60)", "--timeout", "1");
        Assert.Equal(new ProgramResult(3, "", "dh: The code did not end within 1 s.\n"), result);
    }

    [Fact]
    public async Task Code_that_speaks_on_the_guest_channel_itself_is_a_failure()
    {
        const string Code = """
            import ctypes, os, time
            pidfd_open, pidfd_getfd = 434, 438  # asm/unistd_64.h
            system_call, runner = ctypes.CDLL(None).syscall, os.getppid()
            pidfd = system_call(pidfd_open, runner, 0)
            for name in os.listdir(f'/proc/{runner}/fd'):
                if 'vport' in os.readlink(f'/proc/{runner}/fd/{name}'):
                    os.write(system_call(pidfd_getfd, pidfd, int(name), 0), b'\xff' * 64)
            time.sleep(60)
            """;
        var result = await RunAsync(Code);
        Assert.Equal((125, ""), (result.ExitCode, result.Output));
        Assert.StartsWith("dh: The guest broke its protocol: a frame with a header of 4294967295 and a body of 4294967295 bytes.", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_fork_bomb_ends_at_its_timeout()
    {
        long start = Stopwatch.GetTimestamp();
        var result = await RunAsync("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "--timeout", "2");
        Assert.Equal(3, result.ExitCode);
        // The timeout, 2 s for SIGINT, 5 s for SIGKILL, and the restore.
        Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 2, 14);
    }

    [Fact]
    public async Task Endless_code_ends_at_its_timeout()
    {
        var result = await RunAsync("while True: pass", "--timeout", "1");
        Assert.Equal((3, ""), (result.ExitCode, result.Output));
        Assert.EndsWith("dh: The code did not end within 1 s.\n", result.Error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_full_disk_is_ENOSPC_for_the_code()
    {
        const string Code = """
            file = open('/tmp/file', 'wb', 0)
            try:
                while True: file.write(bytes(1 << 20))
            except OSError as error:
                print(error)
            """;
        Assert.Equal(new ProgramResult(0, "[Errno 28] No space left on device\n", ""), await RunAsync(Code));
    }

    [Fact]
    public async Task Eaten_memory_kills_the_code_with_137()
    {
        var result = await RunAsync("eaten = []\nwhile True: eaten.append(b'x' * (1 << 20))");
        Assert.Equal(new ProgramResult(137, "", "dh: The guest ran out of memory and killed the code. More: dh vm prepare --memory MIB --force\n"), result);
    }

    [Fact]
    public async Task A_gigabyte_of_output_passes_through_little_memory()
    {
        const long Gigabyte = 1 << 30;
        const long MaxAnonymousKib = 64 << 10;
        using var process = _own.Dh.Start(["exec", "-c", "import os\nblock = bytes(1 << 20)\nfor _ in range(1024): os.write(1, block)"]);
        process.StandardInput.Close();
        byte[] buffer = new byte[1 << 20];
        long total = 0, peakKib = 0;
        for (int read; (read = await process.StandardOutput.BaseStream.ReadAsync(buffer, TestContext.Current.CancellationToken)) > 0;)
        {
            // Each 16 MiB.
            if (total >> 24 != (total + read) >> 24)
            {
                peakKib = Math.Max(peakKib, Processes.AnonymousKib(process.Id));
            }

            total += read;
        }

        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal((Gigabyte, 0), (total, process.ExitCode));
        Assert.InRange(peakKib, 1, MaxAnonymousKib);
        await _own.AssertNothingLeftAndUsableAsync("a gigabyte of output");
    }

    [Fact]
    public async Task Output_without_end_costs_little_memory_while_nobody_reads_it_or_slowly()
    {
        const long MaxGrowthKib = 32 << 10;
        using var process = _own.Dh.Start(["exec", "-c", "import os\nblock = bytes(1 << 20)\nwhile True: os.write(1, block)"]);
        process.StandardInput.Close();
        byte[] buffer = new byte[64 << 10];
        var output = process.StandardOutput.BaseStream;
        await output.ReadExactlyAsync(buffer, TestContext.Current.CancellationToken);
        long before = Processes.AnonymousKib(process.Id), peak = before;
        for (int i = 0; i < 60; i++)
        {
            await Task.Delay(50, TestContext.Current.CancellationToken);
            peak = Math.Max(peak, Processes.AnonymousKib(process.Id));
            if (i >= 30)
            {
                await output.ReadExactlyAsync(buffer, TestContext.Current.CancellationToken);
            }
        }

        process.StandardOutput.Close();
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(141, process.ExitCode);
        Assert.InRange(before, 1, long.MaxValue);
        Assert.InRange(peak - before, 0, MaxGrowthKib);
        await _own.AssertNothingLeftAndUsableAsync("output without end");
    }

    public void Dispose() => _own.Dispose();

    private async Task<ProgramResult> RunAsync(string code, params string[] options)
    {
        var result = await _own.Dh.ExecAsync(code, options);
        await _own.AssertNothingLeftAndUsableAsync(string.Create(CultureInfo.InvariantCulture, $"exit code {result.ExitCode}"));
        return result;
    }
}
