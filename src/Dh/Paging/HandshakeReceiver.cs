using System.Diagnostics;
using System.Net.Sockets;
using Dh.Linux;
using Microsoft.Win32.SafeHandles;

namespace Dh.Paging;

/// <summary>Receives regions and the userfaultfd from a connected VMM: bounded in time, in bytes and in receives.</summary>
internal static class HandshakeReceiver
{
    /// <summary>A VMM sends one message; some have been seen to send one without the descriptor first. More than this is nonsense.</summary>
    public const int MaxReceives = 5;

    /// <summary>Receives the handshake.</summary>
    /// <param name="socket">The connected socket; it stays open: its end of file tells that the VMM died.</param>
    /// <param name="stop">Ends the wait.</param>
    /// <param name="timeLimit">At most this long.</param>
    /// <returns>The regions, not validated, and the userfaultfd, which the caller owns.</returns>
    /// <exception cref="PageServerException">The peer closed, kept silent, or sent something else.</exception>
    public static (List<GuestRegion> Regions, Userfaultfd Uffd) Receive(SafeSocketHandle socket, WakeEvent stop, TimeSpan timeLimit)
    {
        long start = Stopwatch.GetTimestamp();
        byte[] buffer = new byte[HandshakeMessage.MaxLength + 1];
        int length = 0;
        var descriptors = new List<SafeFileHandle>();
        try
        {
            for (int receives = 0; receives < MaxReceives;)
            {
                var left = timeLimit - Stopwatch.GetElapsedTime(start);
                int ready = left > TimeSpan.Zero ? Poll.WaitAny(left, socket, stop.Handle) : 0;
                if ((ready & 2) != 0)
                {
                    throw new PageServerException("The page server was stopped before a VMM sent its handshake.");
                }

                if (ready == 0)
                {
                    throw new PageServerException($"The VMM sent no complete handshake within {timeLimit.TotalSeconds:0.#} s ({length} bytes, {descriptors.Count} descriptors so far).");
                }

                int received = FdPassing.Receive(socket, buffer.AsSpan(length), descriptors);
                if (received < 0)
                {
                    continue;
                }

                if (received == 0)
                {
                    throw new PageServerException($"The VMM closed the handshake socket after {length} bytes and {descriptors.Count} descriptors.") { PeerEnded = true };
                }

                receives++;
                length += received;
                if (length > HandshakeMessage.MaxLength)
                {
                    throw new PageServerException($"The handshake is refused: more than {HandshakeMessage.MaxLength} bytes.");
                }

                if (descriptors.Count > 1)
                {
                    throw new PageServerException($"The handshake is refused: {descriptors.Count} descriptors instead of one userfaultfd.");
                }

                var regions = HandshakeMessage.TryParse(buffer.AsSpan(0, length));
                if (regions is not null && descriptors.Count == 1)
                {
                    var uffd = Userfaultfd.FromPeer(descriptors[0])
                        ?? throw new PageServerException("The handshake is refused: its descriptor is no userfaultfd.");
                    descriptors.Clear();
                    return (regions, uffd);
                }
            }

            throw new PageServerException(
                $"The handshake is refused: after {MaxReceives} receives there are {length} bytes and {(descriptors.Count == 0 ? "no descriptor" : "no complete JSON array")}.");
        }
        catch (LinuxException e)
        {
            throw new PageServerException("The handshake could not be received.", e);
        }
        finally
        {
            descriptors.ForEach(descriptor => descriptor.Dispose());
        }
    }
}
