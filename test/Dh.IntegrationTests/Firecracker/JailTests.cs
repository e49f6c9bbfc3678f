using System.Diagnostics;
using System.Net.Sockets;
using Dh.Guest;
using Dh.Linux;
using Dh.Paging;
using Dh.Sandboxes;
using Dh.TestSupport;
using Dh.Vmm;
using Dh.Vmm.Firecracker;

namespace Dh.IntegrationTests.Firecracker;

/// <summary>
/// A jail, with a script for a jailer that does what can be done on every host: it makes the root where the jailer does, goes there, and
/// becomes Firecracker under the same process number. What is given to the jail, and what is taken out of it, is the driver's.
/// </summary>
public sealed class JailTests : IAsyncLifetime
{
    private const string Jailer = """
        #!/bin/sh
        echo "$@" >> "$(dirname "$0")/jailed"
        while [ "$1" != -- ]; do
            case $1 in
                --id) id=$2 ;;
                --exec-file) program=$2 ;;
                --chroot-base-dir) base=$2 ;;
            esac
            shift 2
        done
        shift
        root=$base/$(basename "$program")/$id/root
        mkdir -p "$root" && cd "$root" && exec "$program" --id "$id" "$@"
        """;

    private static readonly TimeSpan Bound = TimeSpan.FromSeconds(20);

    private readonly TempDir _directory = new();
    private readonly TempDir _run = new();
    private FirecrackerHome _home = null!;
    private FirecrackerDriver _driver = null!;

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    public async ValueTask InitializeAsync()
    {
        _home = await FirecrackerHome.CreateAsync();
        string jailer = _directory.Write("jailer", Jailer);
        File.SetUnixFileMode(jailer, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        _driver = new FirecrackerDriver(await FirecrackerBinary.OfAsync(_home.Fake.ProgramPath, _directory.Path, Cancellation), jailer);
    }

    [Theory(Timeout = 60_000)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_snapshot_is_restored_in_it(bool pageServer)
    {
        var snapshot = _home.Snapshot;
        var options = Options();
        MemoryBackend memory = pageServer ? new MemoryBackend.Uffd(Userfaultfd.OpenDevice()) : new MemoryBackend.File(snapshot.MemoryPath, []);
        await using (var vmm = await _driver.RestoreAsync(snapshot.Machine, memory, snapshot.StatePath, options, Cancellation))
        {
            string root = RootOf(options);
            await using var server = pageServer ? vmm.ServeMemory(snapshot.OpenMemory(), new PageServerOptions()) : null;
            if (pageServer)
            {
                Assert.Equal("600 2", (await StatAsync("%a %u", Path.Combine(root, "uffd.sock")))[..5]); // mode; a user of the jails' range
                Assert.False(File.Exists(Path.Combine(root, "memory")), "a machine whose memory is served does not see the memory file");
            }

            await vmm.WaitRestoredAsync(Cancellation);
            await vmm.ResumeAsync(Cancellation);
            using var session = new GuestSession(new SocketTransport(await vmm.ConnectGuestAsync(Bound, Cancellation)));
            await session.GreetAsync(Bound, Cancellation);
            foreach (string name in (string[])["state", "root.img"])
            {
                string file = Path.Combine(root, name);
                Assert.Null(new FileInfo(file).LinkTarget); // nothing leads out of the jail
                Assert.Equal(await StatAsync("%i", Path.Combine(snapshot.Directory, name)), await StatAsync("%i", file));
            }
        }

        Assert.False(Directory.Exists(options.RunDirectory));
        string jailed = await File.ReadAllTextAsync(_directory["jailed"], Cancellation);
        Assert.Contains("--cgroup-version 2 --parent-cgroup dh", jailed, StringComparison.Ordinal);
        Assert.Contains("fsize=16777216", jailed, StringComparison.Ordinal);
    }

    [Theory(Timeout = 60_000)]
    [InlineData("")]
    [InlineData("no-seccomp")]
    public async Task Its_filters_of_system_calls_are_looked_at_before_the_guest_runs(string script)
    {
        _home.Fake.Play(script);
        var snapshot = _home.Snapshot;
        await using var vmm = await _driver.RestoreAsync(snapshot.Machine, new MemoryBackend.Uffd(Userfaultfd.OpenDevice()), snapshot.StatePath, Options(), Cancellation);
        await using var server = vmm.ServeMemory(snapshot.OpenMemory(), new PageServerOptions());
        await vmm.WaitRestoredAsync(Cancellation);
        var layer = Assert.Single(vmm.Cage);
        Assert.Equal(("system-calls", script.Length == 0), (layer.Name, layer.IsOn));
        Assert.Equal(script.Length == 0, Isolation.IsCaged(vmm.Cage));
        Assert.Equal(
            script.Length == 0 ? null : "Firecracker's threads without a filter: firecracker, firecracker; it was built without filters, or started with --no-seccomp",
            layer.Reason);
    }

    [Fact(Timeout = 60_000)]
    public async Task What_is_saved_in_it_is_taken_out()
    {
        string kernel = _run.Write("kernel", "\u007fELF, and no more");
        var machine = _driver.Complete(_home.Snapshot.Machine) with { KernelPath = kernel, InitrdPath = _run.Write("initrd", "initrd"), RootDiskPath = _run.Write("root.img", "root disk") };
        var options = Options();
        await using (var vmm = await _driver.BootAsync(machine, _run["memory"], options, Cancellation))
        {
            await vmm.ResumeAsync(Cancellation);
            using var session = new GuestSession(new SocketTransport(await vmm.ConnectGuestAsync(Bound, Cancellation)));
            await session.WaitReadyAsync(Bound, Cancellation);
            await vmm.PauseAsync(Cancellation);
            await vmm.SaveAsync(_run["state"], Cancellation);
            Assert.False(File.Exists(Path.Combine(RootOf(options), "memory")));
        }

        Assert.Equal(machine.MemoryBytes, new FileInfo(_run["memory"]).Length);
        Assert.True(File.Exists(_run["state"]));
        Assert.DoesNotContain("fsize", await File.ReadAllTextAsync(_directory["jailed"], Cancellation), StringComparison.Ordinal);
    }

    [Fact(Timeout = 60_000)]
    public async Task Another_process_does_not_get_the_page_server()
    {
        var snapshot = _home.Snapshot;
        var options = Options();
        await using var vmm = await _driver.RestoreAsync(snapshot.Machine, new MemoryBackend.Uffd(Userfaultfd.OpenDevice()), snapshot.StatePath, options, Cancellation);
        await using var server = vmm.ServeMemory(snapshot.OpenMemory(), new PageServerOptions());
        using (var stranger = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            // The path is too long for a socket's; the directory's descriptor is not.
            using var directory = Files.OpenDirectory(RootOf(options));
            await stranger.ConnectAsync(new UnixDomainSocketEndPoint($"/proc/self/fd/{directory.DangerousGetHandle()}/uffd.sock"), Cancellation);
            Assert.Equal(0, await stranger.ReceiveAsync(new byte[1], Cancellation).AsTask().WaitAsync(Bound, Cancellation));
        }

        await vmm.WaitRestoredAsync(Cancellation);
        await server.WaitPopulatedAsync(Cancellation).WaitAsync(Bound, Cancellation);
    }

    [Fact(Timeout = 60_000)]
    public async Task The_launcher_removes_the_cgroup_and_limits_what_is_written()
    {
        string cgroup = Directory.CreateDirectory(_run["cgroup"]).FullName;
        var options = Options();
        await using (var process = VmmProcess.Start(
            options,
            new Dictionary<string, string>(),
            ["/bin/sh", "-c", "yes > flood; ls -l flood; sleep 60"],
            [],
            new LauncherOptions { MaxFileBytes = 100_000, CgroupDirectory = cgroup }))
        {
            long start = Stopwatch.GetTimestamp();
            while (!process.LastLogLines(5).Contains(" 100000 ", StringComparison.Ordinal) && Stopwatch.GetElapsedTime(start) < Bound)
            {
                await Task.Delay(10, Cancellation);
            }

            Assert.Contains(" 100000 ", process.LastLogLines(5), StringComparison.Ordinal);
            Assert.True(Directory.Exists(cgroup));
        }

        Assert.False(Directory.Exists(cgroup));
        Assert.False(Directory.Exists(options.RunDirectory));
    }

    public ValueTask DisposeAsync()
    {
        _home.Dispose();
        _run.Dispose();
        _directory.Dispose();
        return ValueTask.CompletedTask;
    }

    private VmmStartOptions Options() => new()
    {
        RunDirectory = Path.Combine(DhHome.EnsurePrivate(_home.Home.RunDirectory), Guid.NewGuid().ToString("N")),
        Installation = Installation.Current,
    };

    private string RootOf(VmmStartOptions options) => Jail.RootDirectory(options.RunDirectory, _home.Fake.ProgramPath, Path.GetFileName(options.RunDirectory));

    private static async Task<string> StatAsync(string format, string path)
    {
        using var process = Process.Start(new ProcessStartInfo("stat", ["--format", format, path]) { RedirectStandardOutput = true })!;
        string output = await process.StandardOutput.ReadToEndAsync(Cancellation);
        await process.WaitForExitAsync(Cancellation);
        Assert.Equal(0, process.ExitCode);
        return output.Trim();
    }
}
