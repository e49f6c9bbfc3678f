using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Dh.Linux;
using Dh.TestSupport;

namespace Dh.Tests.Linux;

public sealed class ChildProcessTests
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(20);
    private static readonly Dictionary<string, string> NoEnvironment = [];

    [Fact]
    public void The_child_has_exactly_the_descriptors_it_was_given()
    {
        using var directory = new TempDir();
        using var file = File.OpenHandle(directory.Write("given", "7"));

        // The shell's glob opens the directory itself, so the listing is made by a builtin loop over numbers.
        string output = Run("for n in 0 1 2 3 4 5 6 7 8 9 10 64 65 66 67; do [ -e /proc/self/fd/$n ] && readlink /proc/$$/fd/$n; done", [(7, file)]);

        Assert.Equal("/dev/null\n" + "socket\n" + "socket\n" + directory["given"] + "\n", output);
    }

    [Fact]
    public void Descriptors_may_swap_their_numbers()
    {
        using var directory = new TempDir();
        using var first = File.OpenHandle(directory.Write("first", ""));
        using var second = File.OpenHandle(directory.Write("second", ""));
        int firstNumber = (int)first.DangerousGetHandle(), secondNumber = (int)second.DangerousGetHandle();
        if (firstNumber is >= 64 or < 3 || secondNumber is >= 64 or < 3)
        {
            // Too many are open here to ask for the very same numbers: the collision is made between the first two free ones instead.
            (firstNumber, secondNumber) = (10, 11);
        }

        string output = Run($"readlink /proc/$$/fd/{firstNumber}; readlink /proc/$$/fd/{secondNumber}", [(firstNumber, second), (secondNumber, first)]);

        Assert.Equal($"{directory["second"]}\n{directory["first"]}\n", output);
    }

    [Fact]
    public void The_environment_is_the_one_given_and_arguments_arrive_as_they_are()
    {
        string output = Run("echo \"$1|$NAME\"; env | wc -l", [], new() { ["NAME"] = "zwölf €", ["PATH"] = "/usr/bin:/bin" }, "arg", "two words \"quoted\" 漢");

        Assert.StartsWith("two words \"quoted\" 漢|zwölf €\n", output, StringComparison.Ordinal);
    }

    [Fact]
    public void The_child_leads_a_session_of_its_own_with_default_signals()
    {
        // Builtins only: while a shell waits for a child, it blocks signals of its own accord.
        string output = Run("read -r line < /proc/$$/stat; set -- $line; [ $6 = $$ ] && echo leader; while read -r line; do case $line in SigBlk*|SigIgn*) echo \"$line\";; esac; done < /proc/$$/status", []);

        // glibc's posix_spawn has its two internal signals, 32 and 33, ignored.
        Assert.Equal("leader\nSigBlk:\t0000000000000000\nSigIgn:\t0000000180000000\n", output);
    }

    [Fact]
    public void A_program_that_does_not_exist_is_named()
    {
        var error = Assert.Throws<LinuxException>(() => ChildProcess.Start("/no/such/program", [], NoEnvironment, []));

        Assert.Equal("posix_spawn /no/such/program: ENOENT (No such file or directory)", error.Message);
    }

    [Fact]
    public void Descriptor_numbers_from_64_on_are_refused()
    {
        using var file = File.OpenHandle("/dev/null");
        Assert.Throws<ArgumentOutOfRangeException>(() => ChildProcess.Start("/bin/true", [], NoEnvironment, [(64, file)]));
    }

    [Fact]
    public void Waiting_is_bounded_and_a_killed_child_is_reaped()
    {
        using var child = ChildProcess.Start("/bin/sleep", ["60"], NoEnvironment, []);

        Assert.False(child.WaitAndReap(TimeSpan.FromMilliseconds(30)));
        Assert.True(child.PidFd.SendSignal(PidFd.SigKill));
        Assert.True(child.WaitAndReap(Limit));
        Assert.False(Directory.Exists($"/proc/{child.Pid}"));
        Assert.False(child.PidFd.SendSignal(PidFd.SigTerm));
        Assert.Throws<LinuxException>(child.PidFd.Reap);
    }

    [Fact]
    public void A_pidfd_of_no_process_is_an_error() => Assert.Equal(Errno.ESRCH, Assert.Throws<LinuxException>(() => PidFd.Open(int.MaxValue)).Errno);

    private static string Run(string script, (int Number, SafeHandle Descriptor)[] descriptors, Dictionary<string, string>? environment = null, params string[] arguments)
    {
        var (ours, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using var output = new Socket(ours) { ReceiveTimeout = (int)Limit.TotalMilliseconds };
        using (theirs)
        {
            using var child = ChildProcess.Start("/bin/sh", ["-c", script, .. arguments], environment ?? new() { ["PATH"] = "/usr/bin:/bin" }, [(1, theirs), (2, theirs), .. descriptors]);
            theirs.Dispose();
            var text = new MemoryStream();
            byte[] buffer = new byte[4096];
            for (int length; (length = output.Receive(buffer)) > 0;)
            {
                text.Write(buffer, 0, length);
            }

            Assert.True(child.WaitAndReap(Limit));
            return System.Text.RegularExpressions.Regex.Replace(Encoding.UTF8.GetString(text.ToArray()), @"socket:\[\d+\]", "socket");
        }
    }
}
