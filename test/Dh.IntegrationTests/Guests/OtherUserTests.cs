using System.Diagnostics;
using System.Globalization;
using Dh.IntegrationTests.Pool;
using Dh.Sandboxes;
using Dh.Snapshots;

namespace Dh.IntegrationTests.Guests;

/// <summary>What another user of the host gets at while machines run: nothing.</summary>
public sealed class OtherUserTests(PreparedHome prepared) : IDisposable
{
    private const string Nobody = "65534";

    /// <summary>Tries each path of its input in each way, and tells of what succeeded. Debian's essential packages have perl.</summary>
    private const string Prober = """
        use Socket;
        use Fcntl;
        while (my $path = <STDIN>) {
            chomp $path;
            print "list $path\n" if opendir(my $directory, $path);
            print "read $path\n" if -e $path && !-d _ && sysopen(my $file, $path, O_RDONLY | O_NONBLOCK);
            print "write $path\n" if -e $path && !-d _ && sysopen(my $file, $path, O_WRONLY | O_APPEND | O_NONBLOCK);
            print "create in $path\n" if mkdir "$path/strange";
            print "link in $path\n" if symlink "/etc/passwd", "$path/stranger";
            print "rename $path\n" if rename $path, "$path.strange";
            for my $type (SOCK_STREAM, SOCK_SEQPACKET) {
                socket(my $socket, PF_UNIX, $type, 0);
                print "connect $path\n" if length($path) < 108 && connect($socket, pack_sockaddr_un($path));
            }
        }
        """;

    private readonly OwnHome _own = new(prepared);

    private static CancellationToken Cancellation => TestContext.Current.CancellationToken;

    [Fact(Timeout = 120_000)]
    public async Task Another_user_is_refused_at_every_path_and_socket()
    {
        Assert.SkipUnless(Environment.IsPrivilegedProcess, "Only root can become another user.");
        var home = new DhHome(_own.Dh.Home);
        await using var pool = await RunningPool.StartAsync(_own.Dh, "--size", "1");
        await using var sandbox = await Sandbox.RestoreAsync(new SnapshotStore(home).FindNewest("python")!, new SandboxOptions { Home = home }, Cancellation);

        // The directory of the test itself is opened, as if the home were where others may look.
        File.SetUnixFileMode(home.Path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute | UnixFileMode.OtherRead | UnixFileMode.OtherExecute);
        var everything = new EnumerationOptions { RecurseSubdirectories = true, AttributesToSkip = FileAttributes.None };
        string[] roots = [home.RunDirectory, home.CacheDirectory, home.SnapshotsDirectory, home.ImagesDirectory, Path.Combine(home.Path, "pool")];
        string[] paths = [.. roots, .. roots.SelectMany(root => Directory.EnumerateFileSystemEntries(root, "*", everything))];
        Assert.Contains(paths, path => path.EndsWith("/vmm.log", StringComparison.Ordinal));
        Assert.Contains(paths, path => path.EndsWith("/memory", StringComparison.Ordinal));
        Assert.Contains(paths, path => path.EndsWith(".sock", StringComparison.Ordinal));
        Assert.Equal("", await ProbeAsync(paths));

        // What is open to all, the prober finds.
        string open = _own.Write("open", "text");
        File.SetUnixFileMode(open, (UnixFileMode)0x1b6); // 0666
        Assert.Equal($"read {open}\nwrite {open}\n", await ProbeAsync([open]));

        int vmm = sandbox.VmmProcessId;
        Assert.Equal("", await AsNobodyAsync("sh", ["-c", string.Create(CultureInfo.InvariantCulture,
            $"cat /proc/{vmm}/environ; head -c 1 /proc/{vmm}/mem; ls /proc/{vmm}/fd/ /proc/{vmm}/map_files/ /proc/{vmm}/root/; kill -0 {vmm} && echo signaled")], ""));
    }

    public void Dispose() => _own.Dispose();

    private static Task<string> ProbeAsync(string[] paths) => AsNobodyAsync("perl", ["-e", Prober], string.Join('\n', paths) + "\n");

    private static async Task<string> AsNobodyAsync(string program, string[] arguments, string input)
    {
        using var process = Process.Start(new ProcessStartInfo("setpriv", [$"--reuid={Nobody}", $"--regid={Nobody}", "--clear-groups", program, .. arguments])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        var output = process.StandardOutput.ReadToEndAsync(Cancellation);
        var error = process.StandardError.ReadToEndAsync(Cancellation); // refusals
        await process.StandardInput.WriteAsync(input.AsMemory(), Cancellation);
        process.StandardInput.Close();
        await process.WaitForExitAsync(Cancellation);
        _ = await error;
        return await output;
    }
}
