using System.Net.Sockets;
using System.Text;

namespace Dh.Cli;

/// <summary>Tells whoever has started this process how far it is: sd_notify(3), a datagram to the socket that <c>NOTIFY_SOCKET</c> names.</summary>
internal static class ServiceNotification
{
    /// <summary>The variable that names the socket.</summary>
    public const string Variable = "NOTIFY_SOCKET";

    /// <summary>Sends a state; does nothing when nobody wants to know, or nobody is there any more.</summary>
    /// <param name="state">Such as <c>READY=1</c>.</param>
    public static void Send(string state)
    {
        if (Environment.GetEnvironmentVariable(Variable) is not { Length: > 1 } path)
        {
            return;
        }

        try
        {
            // A name that begins with @ is in the abstract namespace.
            using var socket = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
            socket.SendTo(Encoding.UTF8.GetBytes(state), new UnixDomainSocketEndPoint(path[0] == '@' ? "\0" + path[1..] : path));
        }
        catch (SocketException)
        {
            // It is for the other side to miss it.
        }
    }
}
