using System.Net.Sockets;
using System.Text;

namespace Dh.Vmm.Qemu;

/// <summary>
/// The late lock (native/late_lock.h): once a machine is set up, and its state loaded, its VMM is told to give up every system call that a running machine
/// does not need. A VMM that makes another one afterwards is killed.
/// </summary>
internal static class LateLock
{
    private const string Locked = "locked";
    private const int MaxAnswer = 64;

    /// <summary>Gives the word and waits for the answer.</summary>
    /// <param name="socket">This end of the socket that the VMM's thread waits on.</param>
    /// <param name="accelerator">How the machine's code is executed: KVM needs ioctls.</param>
    /// <param name="purpose">A machine that was booted will be saved.</param>
    /// <param name="timeLimit">For the answer.</param>
    /// <param name="lastWords">What the VMM last said, for messages.</param>
    /// <param name="cancellationToken">Gives up.</param>
    /// <returns>The layer, with the reason when the kernel has refused it.</returns>
    /// <exception cref="DhException">The VMM has ended, or does not answer.</exception>
    public static async Task<CageLayer> CloseAsync(Socket socket, Accelerator accelerator, QemuPurpose purpose, TimeSpan timeLimit, Func<string> lastWords, CancellationToken cancellationToken)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        limit.CancelAfter(timeLimit);
        byte[] answer = new byte[MaxAnswer];
        try
        {
            string word = $"lock {(accelerator == Accelerator.Kvm ? "kvm" : "tcg")}{(purpose == QemuPurpose.Boot ? " save" : "")}";
            await socket.SendAsync(Encoding.ASCII.GetBytes(word), SocketFlags.None, limit.Token).ConfigureAwait(false);
            int length = await socket.ReceiveAsync(answer, SocketFlags.None, limit.Token).ConfigureAwait(false);
            string said = Encoding.ASCII.GetString(answer, 0, length);
            return said == Locked ? new CageLayer(CageLayer.LateLock, true, null)
                : said.Split(' ') is ["failed", var errno] ? new CageLayer(CageLayer.LateLock, false, $"seccomp: {Untrusted.OneLine(errno)}")
                : throw new DhException(DhErrorReason.Vmm, $"QEMU ended, or has no thread for it, before it had locked itself.{lastWords()}");
        }
        catch (SocketException e)
        {
            throw new DhException(DhErrorReason.Vmm, $"QEMU ended before it had locked itself.{lastWords()}", e);
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            throw new DhException(DhErrorReason.Vmm, $"QEMU did not lock itself within {timeLimit.TotalSeconds:0} s.{lastWords()}");
        }
    }
}
