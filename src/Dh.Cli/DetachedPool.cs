using System.Collections;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using Dh.Linux;

namespace Dh.Cli;

/// <summary>Starts this program's own command line once more, in a session of its own, without <c>--detach</c>, and waits until it says that it is ready.</summary>
internal static class DetachedPool
{
    private static readonly TimeSpan StartLimit = TimeSpan.FromMinutes(5);
    private static readonly TimeSpan EndLimit = TimeSpan.FromSeconds(20);

    /// <summary>Starts it. What the daemon has to say before it is ready goes to this program's standard error.</summary>
    /// <exception cref="DhException">It was not ready in time.</exception>
    public static ExitCode Start()
    {
        // An abstract name: nothing is left of it, and only this user's daemon knows it.
        string name = $"@dh-pool-{Convert.ToHexStringLower(Entropy.GetBytes(16))}";
        using var notified = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
        notified.Bind(new UnixDomainSocketEndPoint($"\0{name[1..]}"));
        var (errors, theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);
        using var said = new Socket(errors);
        using var daemon = Spawn(name, theirs);
        long start = Environment.TickCount64;
        var code = ExitCode.Failed;
        var text = new StringBuilder();
        while (true)
        {
            var left = StartLimit - TimeSpan.FromMilliseconds(Environment.TickCount64 - start);
            int ready = left > TimeSpan.Zero ? Poll.WaitAny(left, notified.SafeHandle, said.SafeHandle, daemon.PidFd.Handle) : 0;
            if ((ready & 1) != 0)
            {
                string state = Read(notified);
                if (state.Contains("READY=1", StringComparison.Ordinal))
                {
                    return ExitCode.Success;
                }

                code = state.Split('=') is [PoolStartCommand.ExitStatus, var number] && int.TryParse(number, CultureInfo.InvariantCulture, out int value) ? (ExitCode)value : code;
            }
            else if ((ready & 2) != 0 && Read(said) is { Length: > 0 } words)
            {
                text.Append(words);
            }
            else if (ready != 0)
            {
                // Its events are in its log; what is left is why it has ended.
                bool ended = daemon.WaitAndReap(EndLimit);
                Console.Error.WriteLine(string.Join('\n', text.ToString().Split('\n').Where(line => line.StartsWith("dh: ", StringComparison.Ordinal))));
                return ended ? code : ExitCode.Failed;
            }
            else
            {
                _ = daemon.PidFd.SendSignal(PidFd.SigTerm);
                throw new DhException(DhErrorReason.Host, $"The pool was not ready within {StartLimit.TotalMinutes:0} minutes.");
            }
        }
    }

    private static string Read(Socket socket)
    {
        byte[] buffer = new byte[4096];
        return Encoding.UTF8.GetString(buffer, 0, socket.Receive(buffer));
    }

    private static ChildProcess Spawn(string notifySocket, SafeSocketHandle errors)
    {
        using (errors)
        using (var none = File.OpenHandle("/dev/null", FileMode.Open, FileAccess.Write))
        {
            string[] command = Environment.GetCommandLineArgs();
            string program = Environment.ProcessPath!;
            // `dotnet Dh.Cli.dll` in a development tree: the first argument is the library.
            string[] arguments = [.. command.Skip(Path.GetFileNameWithoutExtension(program) == "dotnet" ? 0 : 1).Where(argument => argument != "--detach")];
            var environment = Environment.GetEnvironmentVariables().Cast<DictionaryEntry>().ToDictionary(variable => (string)variable.Key, variable => (string)variable.Value!);
            environment[ServiceNotification.Variable] = notifySocket;
            return ChildProcess.Start(program, arguments, environment, [(1, none), (2, errors)]);
        }
    }
}
