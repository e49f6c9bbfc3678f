using System.Runtime.InteropServices;

namespace Dh.Linux;

/// <summary>A system call failed in a way that its caller did not expect.</summary>
public sealed class LinuxException : IOException
{
    /// <summary>Makes the exception for a failed call.</summary>
    /// <param name="operation">The call, with its object: <c>open /dev/userfaultfd</c>.</param>
    /// <param name="errno">What it failed with.</param>
    public LinuxException(string operation, Errno errno)
        : base($"{operation}: {errno.Describe()}", (int)errno)
    {
        Operation = operation;
        Errno = errno;
    }

    /// <summary>The call, with its object.</summary>
    public string Operation { get; }

    /// <summary>What the call failed with.</summary>
    public Errno Errno { get; }

    /// <summary>The exception for the last call of this thread that was declared with <c>SetLastError</c>.</summary>
    internal static LinuxException Last(string operation) => new(operation, LastErrno);

    internal static Errno LastErrno => (Errno)Marshal.GetLastPInvokeError();
}
