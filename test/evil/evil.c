// A VMM whose guest has taken it over: 40 attempts to reach something of the host, one in each process.
//
//   As part of the preload library (native/vmm_preload.c), in a directory `evil-N`: attempt N is made once, on the thread
//   that says that the machine runs, and its outcome written to the VMM's log.
//   As a program (-DALONE), `evil N`: the same attempt without a cage; exit code 0 when it has succeeded. This shows what
//   the attempts are worth on this machine.
//
// An attempt returns 0 when it has got something; else errno says why not. Most kill the VMM instead.

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/perf_event.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, DESCRIPTORS = 256 };

static long check(long result)
{
    return result < 0 ? -1 : 0;
}

// A child that exists is an attempt that has succeeded.
static long child(long pid)
{
    if (pid == 0)
        _exit(0);
    if (pid > 0)
        waitpid((pid_t)pid, NULL, 0);
    return check(pid);
}

static long make_socket(int family, int type, int protocol)
{
    return check(socket(family, type, protocol));
}

static long open_passwd(void) { return check(open("/etc/passwd", O_RDONLY)); }
static long open_root(void) { return check(open("/", O_RDONLY | O_DIRECTORY)); }
static int open_of_parent(const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", getppid(), name);
    return open(path, O_RDONLY);
}

static long open_environment(void) { return check(open_of_parent("environ")); }
static long open_memory_of_process(void) { return check(open("/proc/self/mem", O_RDWR)); }
static long open_device(void) { return check(open("/dev/userfaultfd", O_RDWR)); }
static long create_file(void) { return check(open("/tmp/dh-evil", O_WRONLY | O_CREAT | O_TRUNC, 0600)); }
static long create_in_working_directory(void) { return check(open("dh-evil", O_WRONLY | O_CREAT | O_TRUNC, 0600)); }

// Of what is inherited only sockets, and the log at its end, can be written: state, memory and root disk are files that cannot be mapped so.
static long map_descriptor_writable(void)
{
    for (int descriptor = 3; descriptor < DESCRIPTORS; descriptor++)
        if (mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0) != MAP_FAILED)
            return 0;
    return -1;
}

static long truncate_log(void) { return check(ftruncate(STDERR_FILENO, 0)); }
static long overwrite_descriptor(void)
{
    for (int descriptor = 3; descriptor < DESCRIPTORS; descriptor++)
        if (pwrite(descriptor, "evil", 4, 0) == 4)
            return 0;
    return -1;
}

static long connect_unix(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/dbus/system_bus_socket"};
    int descriptor = socket(AF_UNIX, SOCK_STREAM, 0);
    return descriptor >= 0 && (connect(descriptor, (struct sockaddr *)&address, sizeof address) == 0 || errno == ENOENT) ? 0 : -1;
}

static long socket_inet(void) { return make_socket(AF_INET, SOCK_STREAM, 0); }
static long socket_netlink(void) { return make_socket(AF_NETLINK, SOCK_RAW, 0); }
static long socket_packet(void) { return make_socket(AF_PACKET, SOCK_RAW, 0); }
static long socket_vsock(void) { return make_socket(AF_VSOCK, SOCK_STREAM, 0); }

// In a program of its own a child does it, which says how it went.
static long execute(void)
{
#ifdef ALONE
    if (fork() > 0) {
        int status;
        return wait(&status) > 0 && status == 0 ? 0 : -1;
    }
#endif
    return execl("/bin/true", "true", NULL);
}

static long execute_descriptor(void)
{
    int descriptor = open("/bin/true", O_RDONLY);
#ifdef ALONE
    if (fork() > 0) {
        int status;
        return wait(&status) > 0 && status == 0 ? 0 : -1;
    }
#endif
    return syscall(SYS_execveat, descriptor, "", (char *[]){"true", NULL}, NULL, AT_EMPTY_PATH);
}

static long fork_child(void) { return child(syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL)); }
static long fork_by_clone3(void)
{
    unsigned long long arguments[8] = {[4] = SIGCHLD};
    return child(syscall(SYS_clone3, arguments, sizeof arguments));
}

static long leave_namespace(void) { return check(unshare(CLONE_NEWUSER)); }
static long enter_namespace(void)
{
    int descriptor = open_of_parent("ns/net");
    return descriptor < 0 ? -1 : setns(descriptor, CLONE_NEWNET);
}

static long trace_me(void) { return check(ptrace(PTRACE_TRACEME, 0, NULL, NULL)); }
static long read_parent(void)
{
    char byte;
    struct iovec local = {&byte, 1}, remote = {(void *)0x400000, 1};
    return process_vm_readv(getppid(), &local, 1, &remote, 1, 0) >= 0 || errno == EFAULT ? 0 : -1;
}

static long kill_parent(void) { return check(kill(getppid(), 0)); }
static long signal_other_thread_group(void) { return syscall(SYS_tgkill, 2, 2, 0) == 0 || errno == ESRCH ? 0 : -1; }
static long open_process(void) { return check(syscall(SYS_pidfd_open, 1, 0)); }

static long make_uring(void)
{
    struct io_uring_params parameters = {0};
    return check(syscall(SYS_io_uring_setup, 4, &parameters));
}

static long make_userfaultfd(void) { return check(syscall(SYS_userfaultfd, O_CLOEXEC)); }

static long map_executable(void)
{
    return mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
}

static long make_executable(void)
{
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mprotect(page, PAGE, PROT_READ | PROT_EXEC);
}

static long make_all_executable(void) { return check(personality(READ_IMPLIES_EXEC)); }
static long make_memory_file(void) { return check(syscall(SYS_memfd_create, "evil", 0)); }
static long make_shared_memory(void) { return check(shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0600)); }
static long mount_something(void)
{
#ifdef ALONE
    unshare(CLONE_NEWNS); // to be gone with the program
    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
#endif
    return mount("evil", "/usr", "tmpfs", 0, NULL);
}
static long change_root(void) { return check(chroot("/")); }
static long load_bpf(void)
{
    union bpf_attr map = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return check(syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map));
}

static long open_performance_counter(void)
{
    struct perf_event_attr attributes = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attributes, .config = PERF_COUNT_SW_CPU_CLOCK};
    return check(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0));
}

static long join_keyring(void) { return check(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL, 0, 0, 0)); }
static long signal_by_descriptor(void) { return fcntl(STDERR_FILENO, F_SETOWN, getpid()); }
static long control_device(void) { return ioctl(STDIN_FILENO, FIONREAD, &(int){0}) == 0 || errno == ENOTTY ? 0 : -1; }

static const struct {
    const char *name;
    long (*run)(void);
} attempts[] = {
    {"open /etc/passwd", open_passwd},
    {"open the root directory", open_root},
    {"open another process's environment", open_environment},
    {"open its own memory", open_memory_of_process},
    {"open /dev/userfaultfd", open_device},
    {"create a file", create_file},
    {"create a file where it works", create_in_working_directory},
    {"map what it inherited to write", map_descriptor_writable},
    {"cut off its log", truncate_log},
    {"write over what it inherited", overwrite_descriptor},
    {"connect to a unix socket", connect_unix},
    {"make an internet socket", socket_inet},
    {"make a netlink socket", socket_netlink},
    {"make a packet socket", socket_packet},
    {"make a vsock", socket_vsock},
    {"execute a program", execute},
    {"execute a descriptor", execute_descriptor},
    {"fork", fork_child},
    {"fork by clone3", fork_by_clone3},
    {"make a user namespace", leave_namespace},
    {"enter a namespace", enter_namespace},
    {"have itself traced", trace_me},
    {"read another process's memory", read_parent},
    {"signal its parent", kill_parent},
    {"signal another process's thread", signal_other_thread_group},
    {"open a process", open_process},
    {"io_uring", make_uring},
    {"userfaultfd", make_userfaultfd},
    {"map executable memory", map_executable},
    {"make memory executable", make_executable},
    {"have all memory executable", make_all_executable},
    {"make a file in memory", make_memory_file},
    {"System V shared memory", make_shared_memory},
    {"mount", mount_something},
    {"chroot", change_root},
    {"bpf", load_bpf},
    {"performance counter", open_performance_counter},
    {"join a keyring", join_keyring},
    {"have signals sent", signal_by_descriptor},
    {"an ioctl", control_device},
};

enum { COUNT = sizeof attempts / sizeof *attempts };
static_assert(COUNT == 40);

// Returns whether it has succeeded.
static bool attempt(int number, char *line, size_t size)
{
    errno = 0;
    bool done = attempts[number].run() == 0;
    snprintf(line, size, "evil: %s: %s\n", attempts[number].name, done ? "succeeded" : strerrorname_np(errno));
    return done;
}

#ifdef ALONE

int main(int argc, char **argv)
{
    char line[128];
    int number = argc == 2 ? atoi(argv[1]) : -1;
    if (number < 0 || number >= COUNT)
        return 2;
    bool done = attempt(number, line, sizeof line);
    fputs(line, stdout);
    return done ? 0 : 1;
}

#else

static int chosen = -1;

__attribute__((constructor)) static void choose(void)
{
    const char *path = getenv("LD_PRELOAD"), *mark = path ? strstr(path, "/evil-") : NULL;
    if (mark)
        chosen = atoi(mark + strlen("/evil-"));
}

// QEMU says `RESUME` on its monitor when its machine runs.
__attribute__((visibility("default"))) ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags)
{
    if (chosen >= 0 && chosen < COUNT && memmem(message->msg_iov[0].iov_base, message->msg_iov[0].iov_len, "RESUME", strlen("RESUME"))) {
        char line[128];
        int number = chosen;
        chosen = -1;
        attempt(number, line, sizeof line);
        ssize_t ignored = write(STDERR_FILENO, line, strlen(line));
        (void)ignored;
    }
    return syscall(SYS_sendmsg, descriptor, message, flags);
}

#endif
