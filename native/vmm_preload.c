// LD_PRELOADed into QEMU: decides what guest memory is made of. QEMU knows no page server, and its memory-backend-file
// opens the memory file for writing even with share=off. So it is started with memory-backend-ram, and gets from here,
// in place of plain anonymous memory, what one of three groups of variables says:
//
//   Uffd  DH_HANDSHAKE_FD + DH_USERFAULTFD_FD: the memory is registered with a new userfaultfd, which goes to the page
//         server on the connected stream socket, byte for byte as Firecracker sends it. The device is opened by dh and
//         inherited, since the VMM may not open it. The socket stays open: its end of file tells the page server that
//         the VMM is dead.
//         Or DH_UFFD_SOCKET: the path of a page server's socket, for a QEMU that is started by hand.
//   File  DH_MEMORY_FD: a private mapping of the memory file, opened O_RDONLY; with DH_PREFAULT_FD, a file of pairs of
//         64-bit numbers (offset, length), those stretches of it are copied while QEMU sets up the machine: what a run is
//         known to write need not be a fault for each page then.
//   Boot  DH_BOOT_MEMORY_FD: a shared mapping of the file that becomes a snapshot's memory file.
//
// and DH_RAM_SIZE in bytes. With DH_LOCK_FD it also has a thread that takes the VMM's system calls away (late_lock.h).
// Anything wrong ends QEMU with exit code 71 and one line on stderr: a guest must not run on memory that is not its snapshot's. One thing cannot be seen from here: a QEMU that never maps its memory this way
// (another version, another backend, another size). dh sees it: with Uffd no handshake comes, with File the memory file
// is missing in /proc/PID/maps; and it gives up in bounded time.
//
// How QEMU 7.2 maps guest memory (util/mmap-alloc.c, qemu_ram_mmap): it reserves address space with PROT_NONE, then
// activates the aligned part with MAP_FIXED, readable and writable, private and anonymous, MAP_NORESERVE if asked for.
// ROMs and video memory come the same way; the size tells them apart, and guest memory comes first.

#include "late_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

// The library is built with hidden symbols: these alone are seen by QEMU.
#define INTERPOSED __attribute__((visibility("default")))

enum { EXIT_WRONG_MEMORY = 71 }; // EX_OSERR (sysexits.h); QEMU's own failures end it with 1

static const char *const variables[] = {"LD_PRELOAD", "DH_RAM_SIZE", "DH_HANDSHAKE_FD", "DH_USERFAULTFD_FD", "DH_UFFD_SOCKET",
                                        "DH_BOOT_MEMORY_FD", "DH_MEMORY_FD", "DH_PREFAULT_FD"};

// The shared mapping of DH_BOOT_MEMORY_FD; empty without one.
static uintptr_t shared_from, shared_to;

static _Noreturn void fail(const char *step, int error, const char *advice)
{
    char line[512];
    int length = snprintf(line, sizeof line, "dh preload: %s: %s: %s\n", step, strerrorname_np(error), advice);
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)length);
    (void)ignored;
    _exit(EXIT_WRONG_MEMORY); // not exit(): QEMU's handlers must not run on half a machine
}

static void must(bool done, const char *step, const char *advice)
{
    if (!done)
        fail(step, errno, advice);
}

// The kernel's mmap. Not dlsym's: this is called before the C library is ready to look anything up.
static void *map(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, length, prot, flags, fd, offset);
}

static unsigned long configured(const char *variable, unsigned long max)
{
    const char *text = getenv(variable);
    char *end = NULL;
    errno = 0;
    unsigned long value = text ? strtoul(text, &end, 10) : 0;
    if (!text || *text < '0' || *text > '9' || *end != '\0' || errno != 0 || value > max)
        fail(variable, EINVAL, "dh sets it to a decimal number; start QEMU through dh");
    return value;
}

static int configured_descriptor(const char *variable)
{
    int descriptor = (int)configured(variable, INT_MAX);
    must(fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0, variable, "dh must let QEMU inherit this descriptor");
    return descriptor;
}

static void send_handshake(int handshake, int userfaultfd, const void *address, size_t length)
{
    char json[160];
    int size = snprintf(json, sizeof json,
                        "[{\"base_host_virt_addr\":%lu,\"size\":%zu,\"offset\":0,\"page_size\":4096,\"page_size_kib\":4096}]",
                        (unsigned long)address, length);
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof userfaultfd)];
    } rights = {.header = {.cmsg_len = CMSG_LEN(sizeof userfaultfd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&rights.header), &userfaultfd, sizeof userfaultfd);
    struct msghdr message = {
        .msg_iov = &(struct iovec){json, (size_t)size},
        .msg_iovlen = 1,
        .msg_control = &rights,
        .msg_controllen = sizeof rights,
    };

    ssize_t sent;
    do
        sent = sendmsg(handshake, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    must(sent >= 0, "sendmsg DH_HANDSHAKE_FD", "the page server is gone or its socket is not a connected one; look for its error");
    if (sent != size) // the rest could only come as a second message, and Firecracker never sends one
        fail("sendmsg DH_HANDSHAKE_FD", EMSGSIZE, "the page server's socket took part of the handshake; it must be empty and a stream");
}

static int connect_page_server(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        fail("DH_UFFD_SOCKET", ENAMETOOLONG, "a unix socket's path has at most 107 bytes");
    strcpy(address.sun_path, path);
    int handshake = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(handshake >= 0 && connect(handshake, (struct sockaddr *)&address, sizeof address) == 0, "connect DH_UFFD_SOCKET",
         "start dh page-server first");
    return handshake;
}

static int open_userfaultfd_device(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    must(device >= 0, "open /dev/userfaultfd", "this user may not, or the kernel has none");
    return device;
}

static void *map_boot_memory(void *address, size_t length, int prot, int flags)
{
    int file = configured_descriptor("DH_BOOT_MEMORY_FD");
    struct stat status;
    must(fstat(file, &status) == 0, "fstat DH_BOOT_MEMORY_FD", "the descriptor is broken");
    if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size != length)
        fail("DH_BOOT_MEMORY_FD", EINVAL, "the file is not as long as guest memory");
    void *memory = map(address, length, prot, (flags & ~(MAP_ANONYMOUS | MAP_PRIVATE)) | MAP_SHARED, file, 0);
    must(memory != MAP_FAILED, "mmap DH_BOOT_MEMORY_FD", "the host has not enough memory for this guest; prepare it with less --memory");
    close(file);
    shared_from = (uintptr_t)memory;
    shared_to = shared_from + length;
    return memory;
}

static void *map_userfaultfd(void *address, size_t length, int prot, int flags)
{
    const char *path = getenv("DH_UFFD_SOCKET");
    int handshake = path ? connect_page_server(path) : configured_descriptor("DH_HANDSHAKE_FD");
    int device = path ? open_userfaultfd_device() : configured_descriptor("DH_USERFAULTFD_FD");

    void *memory = map(address, length, prot, flags, -1, 0);
    must(memory != MAP_FAILED, "mmap guest memory", "the host has not enough memory for this guest; prepare it with less --memory");
    // O_NONBLOCK as Firecracker's: the page server polls, and reads until EAGAIN.
    int userfaultfd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    must(userfaultfd >= 0, "USERFAULTFD_IOC_NEW", "DH_USERFAULTFD_FD must be an open /dev/userfaultfd; DH_VM_NO_UFFD=1 does without");
    // EVENT_REMOVE: pages that the balloon gives back must read as zeros, not come from the snapshot again.
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    must(ioctl(userfaultfd, UFFDIO_API, &api) == 0, "UFFDIO_API",
         "the kernel has no UFFD_FEATURE_EVENT_REMOVE; DH_VM_NO_UFFD=1 does without");
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)memory, .len = length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    must(ioctl(userfaultfd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER",
         "the kernel refuses guest memory; DH_VM_NO_UFFD=1 does without");

    send_handshake(handshake, userfaultfd, memory, length);
    close(userfaultfd); // the page server's alone: whoever takes over the VMM cannot serve itself, nor close it early
    close(device);
    return memory;
}

static struct {
    char *memory;
    size_t length;
    int file;
} work; // of the thread below, which outlives the call that starts it

// An aid only: a kernel before 5.14 does not know the advice, and a machine short of memory may refuse it. What the guest writes first, the kernel
// copies then, as it does without this.
static void *prefault_runs(void *unused)
{
    (void)unused;
    uint64_t runs[64][2];
    bool going = true;
    off_t at = 0;
    for (ssize_t size; going && (size = pread(work.file, runs, sizeof runs, at)) > 0; at += size)
        for (size_t i = 0; going && i < (size_t)size / sizeof *runs; i++)
            going = runs[i][0] < work.length && runs[i][1] <= work.length - runs[i][0] &&
                    madvise(work.memory + runs[i][0], runs[i][1], MADV_POPULATE_WRITE) == 0;
    close(work.file);
    return NULL;
}

// On a thread of its own, while QEMU sets up the machine.
static void prefault(char *memory, size_t length)
{
    work.memory = memory;
    work.length = length;
    work.file = configured_descriptor("DH_PREFAULT_FD");
    sigset_t all, before; // QEMU's signals are for its own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    if (pthread_create(&thread, NULL, prefault_runs, NULL) == 0)
        pthread_detach(thread);
    else
        close(work.file);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void *map_memory_file(void *address, size_t length, int prot, int flags)
{
    int file = configured_descriptor("DH_MEMORY_FD");
    struct stat status;
    must(fstat(file, &status) == 0, "fstat DH_MEMORY_FD", "the memory file's descriptor is broken");
    if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size != length)
        fail("DH_MEMORY_FD", EINVAL, "the memory file is not as long as guest memory: the snapshot is damaged, prepare it again");
    if ((fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY)
        fail("DH_MEMORY_FD", EPERM, "the memory file must be opened O_RDONLY: no VMM may hold a snapshot writable");

    void *memory = map(address, length, prot, flags & ~MAP_ANONYMOUS, file, 0);
    must(memory != MAP_FAILED, "mmap DH_MEMORY_FD", "the host has not enough memory for this guest; prepare it with less --memory");
    close(file);
    if (getenv("DH_PREFAULT_FD"))
        prefault(memory, length);
    return memory;
}

// The configuration is read here and not in a constructor: QEMU may be started through a shell script (Debian's `kvm`
// is one), which loads this library too and must hand all of it on.
static bool is_guest_memory(size_t length, int prot, int flags, int fd)
{
    static atomic_bool done;

    return fd == -1 && prot == (PROT_READ | PROT_WRITE) &&
           (flags & ~(MAP_NORESERVE | MAP_PRIVATE | MAP_SHARED)) == (MAP_FIXED | MAP_ANONYMOUS) &&
           !done && length == configured("DH_RAM_SIZE", ULONG_MAX) && !atomic_exchange(&done, true);
}

static void *map_guest_memory(void *address, size_t length, int prot, int flags)
{
    bool file = getenv("DH_MEMORY_FD");
    if (file && (getenv("DH_USERFAULTFD_FD") || getenv("DH_UFFD_SOCKET")))
        fail("DH_MEMORY_FD", EINVAL, "a userfaultfd is configured too: the memory backend is either File or Uffd");
    void *memory = getenv("DH_BOOT_MEMORY_FD") ? map_boot_memory(address, length, prot, flags)
                   : file                      ? map_memory_file(address, length, prot, flags)
                                               : map_userfaultfd(address, length, prot, flags);
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
        unsetenv(variables[i]);
    await_late_lock();
    return memory;
}

static void *interposed(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    if (is_guest_memory(length, prot, flags, fd))
        return map_guest_memory(address, length, prot, flags);
    return map(address, length, prot, flags, fd, offset);
}

// Two names of one function where off_t has 64 bits; QEMU is built with large files and calls the second.
INTERPOSED void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    return interposed(address, length, prot, flags, fd, offset);
}

INTERPOSED void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    return interposed(address, length, prot, flags, fd, offset);
}

// QEMU takes guest memory for anonymous, and gives back what the balloon hands it with MADV_DONTNEED. In a shared mapping
// that only forgets where the pages are; MADV_REMOVE frees them, after which they read as zeros.
INTERPOSED int madvise(void *address, size_t length, int advice)
{
    bool is_shared = (uintptr_t)address >= shared_from && (uintptr_t)address < shared_to;
    return (int)syscall(SYS_madvise, address, length, is_shared && advice == MADV_DONTNEED ? MADV_REMOVE : advice);
}
