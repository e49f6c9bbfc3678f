// Prints, as the C headers have them, every number, size and offset that src/Dh.Linux/Abi declares: `NAME VALUE` per line.
// AbiTests compares the lines with the C# side, both ways.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>

#define NUMBER(name) printf(#name " %llu\n", (unsigned long long)(name))
#define SIZE(managed, native) printf(#managed " %zu\n", sizeof(native))
#define FIELD(managed, native, member) printf(#managed ".offset %zu\n" #managed ".size %zu\n", offsetof(native, member), sizeof(((native *)0)->member))

int main(void)
{
    NUMBER(O_RDONLY);
    NUMBER(O_RDWR);
    NUMBER(O_CREAT);
    NUMBER(O_NONBLOCK);
    NUMBER(O_DIRECTORY);
    NUMBER(O_NOFOLLOW);
    NUMBER(O_CLOEXEC);
    NUMBER(F_GETFL);
    NUMBER(F_SETFL);
    NUMBER(F_DUPFD_CLOEXEC);
    NUMBER(SEEK_DATA);
    NUMBER(SEEK_HOLE);
    NUMBER(FALLOC_FL_KEEP_SIZE);
    NUMBER(FALLOC_FL_PUNCH_HOLE);
    NUMBER(POSIX_FADV_WILLNEED);
    NUMBER(POSIX_FADV_DONTNEED);
    NUMBER(LOCK_SH);
    NUMBER(LOCK_EX);
    NUMBER(LOCK_NB);
    NUMBER(PROT_READ);
    NUMBER(PROT_WRITE);
    NUMBER(MAP_SHARED);
    NUMBER(MAP_PRIVATE);
    NUMBER(MAP_ANONYMOUS);
    NUMBER(MAP_NORESERVE);
    NUMBER(MFD_CLOEXEC);
    NUMBER(RWF_NOWAIT);
    NUMBER(PRIO_PROCESS);
    NUMBER(MADV_WILLNEED);
    NUMBER(MADV_DONTNEED);
    NUMBER(MADV_POPULATE_READ);
    NUMBER(F_OK);
    NUMBER(POLLIN);
    NUMBER(POLLOUT);
    NUMBER(POLLERR);
    NUMBER(POLLHUP);
    NUMBER(EFD_CLOEXEC);
    NUMBER(EFD_NONBLOCK);
    NUMBER(AF_UNIX);
    NUMBER(SOCK_STREAM);
    NUMBER(SOCK_SEQPACKET);
    NUMBER(SOCK_CLOEXEC);
    NUMBER(SOL_SOCKET);
    NUMBER(SCM_RIGHTS);
    NUMBER(SO_PEERCRED);
    NUMBER(SO_SNDTIMEO);
#ifndef SO_PEERPIDFD /* Linux 6.5: newer than Debian 12's headers */
#define SO_PEERPIDFD 77
#endif
    NUMBER(SO_PEERPIDFD);
    NUMBER(MSG_CTRUNC);
    NUMBER(MSG_DONTWAIT);
    NUMBER(MSG_NOSIGNAL);
    NUMBER(MSG_CMSG_CLOEXEC);
    NUMBER(POSIX_SPAWN_SETSIGDEF);
    NUMBER(POSIX_SPAWN_SETSIGMASK);
    NUMBER(POSIX_SPAWN_SETSID);
    NUMBER(P_PIDFD);
    NUMBER(WEXITED);
    NUMBER(SYS_userfaultfd);
    NUMBER(SYS_pidfd_send_signal);
    NUMBER(SYS_pidfd_open);
    NUMBER(UFFD_API);
    NUMBER(UFFDIO_API);
    NUMBER(UFFDIO_REGISTER);
    NUMBER(UFFDIO_UNREGISTER);
    NUMBER(UFFDIO_WAKE);
    NUMBER(UFFDIO_COPY);
    NUMBER(UFFDIO_ZEROPAGE);
    NUMBER(USERFAULTFD_IOC_NEW);
    NUMBER(UFFDIO_REGISTER_MODE_MISSING);
    NUMBER(UFFDIO_COPY_MODE_DONTWAKE);
    NUMBER(UFFD_FEATURE_EVENT_REMOVE);
    NUMBER(UFFD_PAGEFAULT_FLAG_WRITE);
    NUMBER(UFFD_EVENT_PAGEFAULT);
    NUMBER(UFFD_EVENT_FORK);
    NUMBER(UFFD_EVENT_REMAP);
    NUMBER(UFFD_EVENT_REMOVE);
    NUMBER(UFFD_EVENT_UNMAP);

    SIZE(PollFd, struct pollfd);
    FIELD(PollFd.Fd, struct pollfd, fd);
    FIELD(PollFd.Events, struct pollfd, events);
    FIELD(PollFd.Revents, struct pollfd, revents);
    SIZE(IoVec, struct iovec);
    FIELD(IoVec.Base, struct iovec, iov_base);
    FIELD(IoVec.Length, struct iovec, iov_len);
    SIZE(MsgHdr, struct msghdr);
    FIELD(MsgHdr.Name, struct msghdr, msg_name);
    FIELD(MsgHdr.NameLength, struct msghdr, msg_namelen);
    FIELD(MsgHdr.Iov, struct msghdr, msg_iov);
    FIELD(MsgHdr.IovLength, struct msghdr, msg_iovlen);
    FIELD(MsgHdr.Control, struct msghdr, msg_control);
    FIELD(MsgHdr.ControlLength, struct msghdr, msg_controllen);
    FIELD(MsgHdr.Flags, struct msghdr, msg_flags);
    SIZE(CMsgHdr, struct cmsghdr);
    FIELD(CMsgHdr.Length, struct cmsghdr, cmsg_len);
    FIELD(CMsgHdr.Level, struct cmsghdr, cmsg_level);
    FIELD(CMsgHdr.Type, struct cmsghdr, cmsg_type);
    SIZE(UCred, struct ucred);
    FIELD(UCred.Pid, struct ucred, pid);
    FIELD(UCred.Uid, struct ucred, uid);
    FIELD(UCred.Gid, struct ucred, gid);
    SIZE(UffdioApi, struct uffdio_api);
    FIELD(UffdioApi.Api, struct uffdio_api, api);
    FIELD(UffdioApi.Features, struct uffdio_api, features);
    FIELD(UffdioApi.Ioctls, struct uffdio_api, ioctls);
    SIZE(UffdioRange, struct uffdio_range);
    FIELD(UffdioRange.Start, struct uffdio_range, start);
    FIELD(UffdioRange.Length, struct uffdio_range, len);
    SIZE(UffdioRegister, struct uffdio_register);
    FIELD(UffdioRegister.Range, struct uffdio_register, range);
    FIELD(UffdioRegister.Mode, struct uffdio_register, mode);
    FIELD(UffdioRegister.Ioctls, struct uffdio_register, ioctls);
    SIZE(UffdioCopy, struct uffdio_copy);
    FIELD(UffdioCopy.Destination, struct uffdio_copy, dst);
    FIELD(UffdioCopy.Source, struct uffdio_copy, src);
    FIELD(UffdioCopy.Length, struct uffdio_copy, len);
    FIELD(UffdioCopy.Mode, struct uffdio_copy, mode);
    FIELD(UffdioCopy.Copied, struct uffdio_copy, copy);
    SIZE(UffdioZeroPage, struct uffdio_zeropage);
    FIELD(UffdioZeroPage.Range, struct uffdio_zeropage, range);
    FIELD(UffdioZeroPage.Mode, struct uffdio_zeropage, mode);
    FIELD(UffdioZeroPage.Zeroed, struct uffdio_zeropage, zeropage);
    SIZE(UffdMsg, struct uffd_msg);
    FIELD(UffdMsg.Event, struct uffd_msg, event);
    FIELD(UffdMsg.PageFaultFlags, struct uffd_msg, arg.pagefault.flags);
    FIELD(UffdMsg.PageFaultAddress, struct uffd_msg, arg.pagefault.address);
    FIELD(UffdMsg.RemoveStart, struct uffd_msg, arg.remove.start);
    FIELD(UffdMsg.RemoveEnd, struct uffd_msg, arg.remove.end);

    SIZE(ChildProcess.FileActionsSize, posix_spawn_file_actions_t);
    SIZE(ChildProcess.AttributesSize, posix_spawnattr_t);
    SIZE(ChildProcess.SignalSetSize, sigset_t);
    SIZE(siginfo_t, siginfo_t);
    // sun_path holds the path and its terminating NUL.
    printf("UnixSockets.MaxPathLength %zu\n", sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
    return 0;
}
