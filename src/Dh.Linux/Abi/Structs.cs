using System.Runtime.InteropServices;

namespace Dh.Linux.Abi;

// Layouts of the kernel's and the C library's headers for x86-64; test/abi-check prints the C compiler's sizes and offsets for comparison.

/// <summary><c>struct pollfd</c>, poll.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct PollFd
{
    public int Fd;
    public short Events;
    public short Revents;
}

/// <summary><c>struct iovec</c>, sys/uio.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct IoVec
{
    public void* Base;
    public nuint Length;
}

/// <summary><c>struct msghdr</c>, sys/socket.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct MsgHdr
{
    public void* Name;
    public uint NameLength;
    public IoVec* Iov;
    public nuint IovLength;
    public void* Control;
    public nuint ControlLength;
    public int Flags;
}

/// <summary><c>struct cmsghdr</c>, sys/socket.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct CMsgHdr
{
    public nuint Length;
    public int Level;
    public int Type;
}

/// <summary><c>struct ucred</c>, sys/socket.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UCred
{
    public int Pid;
    public uint Uid;
    public uint Gid;
}

/// <summary><c>struct uffdio_api</c>, linux/userfaultfd.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UffdioApi
{
    public ulong Api;
    public ulong Features;
    public ulong Ioctls;
}

/// <summary><c>struct uffdio_range</c>, linux/userfaultfd.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UffdioRange
{
    public ulong Start;
    public ulong Length;
}

/// <summary><c>struct uffdio_register</c>, linux/userfaultfd.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UffdioRegister
{
    public UffdioRange Range;
    public ulong Mode;
    public ulong Ioctls;
}

/// <summary><c>struct uffdio_copy</c>, linux/userfaultfd.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UffdioCopy
{
    public ulong Destination;
    public ulong Source;
    public ulong Length;
    public ulong Mode;
    public long Copied;
}

/// <summary><c>struct uffdio_zeropage</c>, linux/userfaultfd.h.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct UffdioZeroPage
{
    public UffdioRange Range;
    public ulong Mode;
    public long Zeroed;
}

/// <summary><c>struct uffd_msg</c>, linux/userfaultfd.h: one event. The union's members that are used share their offsets.</summary>
[StructLayout(LayoutKind.Explicit, Size = 32)]
internal struct UffdMsg
{
    [FieldOffset(0)] public byte Event;

    /// <summary><c>arg.pagefault.flags</c>.</summary>
    [FieldOffset(8)] public ulong PageFaultFlags;

    /// <summary><c>arg.pagefault.address</c>.</summary>
    [FieldOffset(16)] public ulong PageFaultAddress;

    /// <summary><c>arg.remove.start</c>.</summary>
    [FieldOffset(8)] public ulong RemoveStart;

    /// <summary><c>arg.remove.end</c>, exclusive.</summary>
    [FieldOffset(16)] public ulong RemoveEnd;
}
