using Dh.Linux.Abi;

namespace Dh.Linux;

/// <summary>
/// Random bytes of the kernel's (getrandom(2)). <see cref="System.Security.Cryptography.RandomNumberGenerator"/> asks OpenSSL for them, which
/// is first loaded and set up: milliseconds in a program that needs it for nothing else.
/// </summary>
public static class Entropy
{
    /// <summary>Gets random bytes, fit for keys.</summary>
    /// <param name="count">How many.</param>
    /// <exception cref="LinuxException">The call failed.</exception>
    public static unsafe byte[] GetBytes(int count)
    {
        byte[] bytes = new byte[count];
        fixed (byte* start = bytes)
        {
            for (int filled = 0; filled < count;)
            {
                // SAFETY: at most the rest of the pinned array is written.
                nint got = Libc.GetRandom(start + filled, (nuint)(count - filled), 0);
                if (got < 0 && LinuxException.LastErrno != Errno.EINTR)
                {
                    throw LinuxException.Last("getrandom");
                }

                filled += (int)Math.Max(got, 0);
            }
        }

        return bytes;
    }
}
