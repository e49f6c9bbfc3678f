"""Finds out that code waits for its standard input, before it gets any.

The host reads its own input only against credit, and credit may be asked for only when code really wants input: `dh` in a
shell loop must leave the loop's input alone. So the child that is to run code carries a seccomp filter, which stops every
system call that may read descriptor 0 and notifies the runner (seccomp_unotify(2)). The runner looks at what was asked
for, asks the host for as much, and lets the call go on in the kernel as if nothing had been.

The filter sees numbers, not files: whether descriptor 0 is the run's own pipe is for the runner to find out. Where code
makes another name for its input (dup, epoll, /dev/stdin), later reads cannot be seen any more; from then on its input is
wanted continuously, as if it read without end. A read through io_uring is not seen at all.
"""

import ctypes
import fcntl
import os
import struct
import sys

CONTINUOUSLY = sys.maxsize
"""What `Listener.wanted` says when no single read tells any more how much is wanted."""

# System call numbers of x86-64 (asm/unistd_64.h). pread64, sendfile and copy_file_range are not among them: on a pipe
# they only fail.
READ, POLL, READV, SELECT, DUP, DUP2, FCNTL, EPOLL_CTL = 0, 7, 19, 23, 32, 33, 72, 233
PSELECT6, PPOLL, SPLICE, TEE, VMSPLICE, DUP3, PREADV2 = 270, 271, 275, 276, 278, 292, 327

F_DUPFD, F_DUPFD_CLOEXEC = 0, 1030
SHELL_DESCRIPTORS = 10  # from here on, shells put descriptor 0 aside while a command reads something else: not to be read
EPOLL_CTL_ADD = 1
POLLIN, POLLRDNORM = 0x001, 0x040

# linux/seccomp.h, linux/audit.h, linux/filter.h
AUDIT_ARCH_X86_64 = 0xC000003E
SYS_SECCOMP = 317
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 2, 1 << 3
SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, nr, arch, instruction pointer, args
NO_NOTIFICATION = bytes(NOTIFICATION.size)
RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06

NUMBER, ARCHITECTURE = 0, 4  # offsets into struct seccomp_data


def argument(index, high=False):
    """The offset of one half of a system call's argument in struct seccomp_data."""
    return 16 + 8 * index + 4 * high


# One line is a label, or (operation, operand, label if so, label if not); no label means the next line.
FILTER = (
    (LOAD, ARCHITECTURE),
    (JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, None, "allow"),
    (LOAD, NUMBER),
    *((JUMP_IF_EQUAL, number, "descriptor is 0", None)
      for number in (READ, READV, PREADV2, DUP, DUP2, DUP3, SPLICE, TEE, VMSPLICE)),
    *((JUMP_IF_EQUAL, number, "has descriptors", None) for number in (POLL, PPOLL)),
    *((JUMP_IF_EQUAL, number, "has a read set", None) for number in (SELECT, PSELECT6)),
    (JUMP_IF_EQUAL, FCNTL, "duplicates", None),
    (JUMP_IF_EQUAL, EPOLL_CTL, "adds", "allow"),
    "duplicates",
    (LOAD, argument(1)),
    (JUMP_IF_EQUAL, F_DUPFD, "duplicates to be read", None),
    (JUMP_IF_EQUAL, F_DUPFD_CLOEXEC, "duplicates to be read", "allow"),
    "duplicates to be read",
    (LOAD, argument(2)),
    (JUMP_IF_AT_LEAST, SHELL_DESCRIPTORS, "allow", "descriptor is 0"),
    "adds",
    (LOAD, argument(1)),
    (JUMP_IF_EQUAL, EPOLL_CTL_ADD, None, "allow"),
    (LOAD, argument(2)),
    (JUMP_IF_EQUAL, 0, "notify", "allow"),
    "has descriptors",
    (LOAD, argument(1)),
    (JUMP_IF_EQUAL, 0, "allow", "notify"),
    "has a read set",
    (LOAD, argument(0)),
    (JUMP_IF_EQUAL, 0, "allow", None),
    (LOAD, argument(1)),
    (JUMP_IF_EQUAL, 0, None, "notify"),
    (LOAD, argument(1, high=True)),
    (JUMP_IF_EQUAL, 0, "allow", "notify"),
    "descriptor is 0",
    (LOAD, argument(0)),
    (JUMP_IF_EQUAL, 0, "notify", "allow"),
    "notify",
    (RETURN, SECCOMP_RET_USER_NOTIF),
    "allow",
    (RETURN, SECCOMP_RET_ALLOW),
)


def assemble(lines):
    """The filter as an array of struct sock_filter."""
    addresses, address = {}, 0
    for line in lines:
        if isinstance(line, str):
            addresses[line] = address
        else:
            address += 1
    program = []
    for line in lines:
        if not isinstance(line, str):
            operation, operand, *labels = line
            jumps = [addresses.get(label, len(program) + 1) - len(program) - 1 for label in labels] or [0, 0]
            program.append(struct.pack("=HBBI", operation, *jumps, operand))
    return b"".join(program)


PROGRAM = assemble(FILTER)


_libc = ctypes.CDLL(None)


class _Fprog(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install():
    """Puts this process and all that it will start under the filter.

    Returns the listener's descriptor, or None where the kernel cannot notify."""
    program = _Fprog(len(PROGRAM) // 8, PROGRAM)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    listener = _libc.syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    return None if listener < 0 else listener


class Listener:
    """The runner's end of a filter: what the code of one run wants to read from one pipe."""

    def __init__(self, descriptor, pipe):
        self.descriptor = descriptor
        self.is_satisfied = False  # it does not matter any more what is wanted
        self._link = f"pipe:[{os.fstat(pipe).st_ino}]"
        self._notification = bytearray(NOTIFICATION.size)
        self._memory = self._memory_pid = None  # of the last caller whose memory was looked into

    def close(self):
        os.close(self.descriptor)
        if self._memory is not None:
            os.close(self._memory)

    def wanted(self):
        """Takes one notification, lets its call go on, and returns how many bytes it wants: 0 to `CONTINUOUSLY`."""
        self._notification[:] = NO_NOTIFICATION  # the kernel insists
        try:
            fcntl.ioctl(self.descriptor, SECCOMP_IOCTL_NOTIF_RECV, self._notification)
        except OSError:  # ENOENT: a signal has taken the caller away
            return 0
        identifier, pid, _, number, _, _, *arguments = NOTIFICATION.unpack(self._notification)
        try:
            # The caller waits, but may be killed, and its pid be another's by now: then the answer is about another
            # process of the same run, and no worse than credit asked for too early.
            return 0 if self.is_satisfied else self._bytes_wanted(pid, number, arguments)
        except OSError:  # it was killed, or has passed a bad address
            return 0
        finally:
            try:
                response = RESPONSE.pack(identifier, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
                fcntl.ioctl(self.descriptor, SECCOMP_IOCTL_NOTIF_SEND, response)
            except OSError:  # ENOENT, as above
                pass

    def _bytes_wanted(self, pid, number, arguments):
        # That input is there is all that poll and select ask for: the read that follows says how much it wants. Most of
        # them are about other descriptors.
        if number in (POLL, PPOLL):
            entries = struct.iter_unpack("=ihh", self._peek(pid, arguments[0], 8, arguments[1]))
            if not any(fd == 0 and events & (POLLIN | POLLRDNORM) for fd, events, _ in entries):
                return 0
            wanted = 1
        elif number in (SELECT, PSELECT6):
            wanted = self._peek(pid, arguments[1], 1, 1)[0] & 1
        elif number == READ:
            wanted = arguments[2]
        elif number in (READV, PREADV2, VMSPLICE):
            vector = struct.iter_unpack("=QQ", self._peek(pid, arguments[1], 16, arguments[2]))
            wanted = sum(length for _, length in vector)
        elif number == SPLICE:
            wanted = arguments[4]
        elif number == TEE:
            wanted = arguments[2]
        else:  # dup and its like, epoll_ctl
            wanted = CONTINUOUSLY
        return wanted if wanted and os.readlink(f"/proc/{pid}/fd/0") == self._link else 0

    def _peek(self, pid, address, size, count):
        """Reads an array out of a process's memory. No reader has more than 1,024 entries."""
        length = size * min(count, 1024)
        data = os.pread(self._memory, length, address) if pid == self._memory_pid else b""
        if not data:  # of another one, or of a program that has ended
            self._open_memory(pid)
            data = os.pread(self._memory, length, address)
        if len(data) < length:
            raise OSError("nothing is mapped there")
        return data

    def _open_memory(self, pid):
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        if self._memory is not None:
            os.close(self._memory)
        self._memory, self._memory_pid = memory, pid
