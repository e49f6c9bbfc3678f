using System.Net.Sockets;
using Dh.Linux;
using Dh.Linux.Abi;
using Dh.TestSupport;
using Microsoft.Win32.SafeHandles;

namespace Dh.Tests.Linux;

public sealed class FdPassingTests : IDisposable
{
    private readonly SafeSocketHandle _ours;
    private readonly SafeSocketHandle _theirs;
    private readonly List<SafeFileHandle> _received = [];

    public FdPassingTests() => (_ours, _theirs) = UnixSockets.CreatePair(UnixSocketKind.Stream);

    [Fact]
    public void Bytes_and_descriptors_arrive_together_and_close_on_exec()
    {
        using var directory = new TempDir();
        using var file = File.OpenHandle(directory.Write("file", "contents"));

        FdPassing.Send(_ours, "hello"u8, file, file);
        byte[] buffer = new byte[100];
        int length = FdPassing.Receive(_theirs, buffer, _received);

        Assert.Equal("hello"u8, buffer.AsSpan(0, length));
        Assert.Equal(2, _received.Count);
        Assert.All(_received, descriptor =>
        {
            byte[] contents = new byte[8];
            Assert.Equal(8, RandomAccess.Read(descriptor, contents, 0));
            Assert.Equal("contents"u8, contents);
            const int F_GETFD = 1, FD_CLOEXEC = 1;
            Assert.Equal(FD_CLOEXEC, Libc.Fcntl(descriptor, F_GETFD, 0));
        });
        Assert.False(file.IsClosed);
    }

    [Fact]
    public void As_many_descriptors_as_allowed_arrive()
    {
        using var file = Userfaultfd.OpenDevice();
        FdPassing.Send(_ours, "x"u8, [.. Enumerable.Repeat(file, FdPassing.MaxDescriptors)]);

        Assert.Equal(1, FdPassing.Receive(_theirs, new byte[1], _received));
        Assert.Equal(FdPassing.MaxDescriptors, _received.Count);
    }

    [Fact]
    public unsafe void Descriptors_that_were_cut_off_are_refused_and_the_rest_is_closed()
    {
        const int Count = FdPassing.MaxDescriptors + 1;
        using var file = Userfaultfd.OpenDevice();
        byte* control = stackalloc byte[sizeof(CMsgHdr) + (Count * sizeof(int))];
        *(CMsgHdr*)control = new CMsgHdr { Length = (nuint)(sizeof(CMsgHdr) + (Count * sizeof(int))), Level = Constants.SOL_SOCKET, Type = Constants.SCM_RIGHTS };
        new Span<int>(control + sizeof(CMsgHdr), Count).Fill((int)file.DangerousGetHandle());
        byte data = 1;
        var iov = new IoVec { Base = &data, Length = 1 };
        var message = new MsgHdr { Iov = &iov, IovLength = 1, Control = control, ControlLength = (nuint)(sizeof(CMsgHdr) + (Count * sizeof(int))) };
        Assert.Equal(1, Libc.SendMsg(_ours, &message, 0));

        var refusal = Assert.Throws<LinuxException>(() => FdPassing.Receive(_theirs, new byte[1], _received));

        Assert.Equal("recvmsg: descriptors were cut off (MSG_CTRUNC): EMSGSIZE (Message too long)", refusal.Message);
        Assert.Equal(FdPassing.MaxDescriptors, _received.Count);
    }

    [Fact]
    public void Nothing_that_waits_is_minus_one_and_end_of_file_is_zero()
    {
        Assert.Equal(-1, FdPassing.Receive(_theirs, new byte[1], _received));
        _ours.Dispose();
        Assert.Equal(0, FdPassing.Receive(_theirs, new byte[1], _received));
    }

    [Fact]
    public void Sending_to_a_peer_that_is_gone_throws_and_raises_no_signal()
    {
        _theirs.Dispose();
        Assert.Equal(Errno.EPIPE, Assert.Throws<LinuxException>(() => FdPassing.Send(_ours, "x"u8)).Errno);
    }

    [Fact]
    public void Arguments_out_of_range_are_refused()
    {
        using var file = Userfaultfd.OpenDevice();
        Assert.Throws<ArgumentOutOfRangeException>(() => FdPassing.Send(_ours, [], file));
        Assert.Throws<ArgumentOutOfRangeException>(() => FdPassing.Send(_ours, "x"u8, [.. Enumerable.Repeat(file, FdPassing.MaxDescriptors + 1)]));
    }

    [Fact]
    public void A_pair_names_its_maker_as_peer()
    {
        var peer = UnixSockets.GetPeerCredentials(_ours);

        Assert.Equal(Environment.ProcessId, peer.Pid);
        Assert.Equal(UnixSockets.CurrentUserId, peer.Uid);
    }

    public void Dispose()
    {
        _ours.Dispose();
        _theirs.Dispose();
        _received.ForEach(descriptor => descriptor.Dispose());
    }
}
