// Runs a command and makes one chosen system call of one of its programs fail: the n-th one with this name and this object, counted over all
// threads of the program. (strace counts each thread's calls by themselves, and knows objects only by path.)
//
//     inject [--fail KEY --error ERRNO] [--occurrence N[+]] [--after KEY] --log FILE -- COMMAND ARG...
//
// With N+ those that follow fail as well. A key is `program name object`: `dh openat /home/u/.dh/run`, `dh ioctl /dev/userfaultfd 0xaa00`,
// `qemu-system-x86_64 sendmsg socket: 12`.
// The program is the base name of what the process executes; the child of a posix_spawn(3) has its parent's until it executes another. What
// differs from run to run is `*`: run identifiers, process numbers, addresses. Sockets and pipes are told apart by their descriptors' numbers.
//
// The log has a line for each call that is not in the list of `left_out`, from the one with --after's key on: the key, and `!` before the
// one that was made to fail. Its last line is `left` when a process goes on a second after the command has ended; else, when a call was made to
// fail, `ended MS`: so many milliseconds later none of the processes was left.
//
// By seccomp_unotify(2): the kernel stops a call, and this program says whether it is made (SECCOMP_USER_NOTIF_FLAG_CONTINUE) or fails. What
// the caged programs' own filters refuse is refused before it comes here.

#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_KEY = 1024, NO_ARGUMENT = -1 };

// Not stopped: the runtime's own memory, threads and signals (what it does when these fail is not dh's), what waits or only looks at a
// clock, what ends a thread or a process, and close, which gives the descriptor up whatever it returns: a failure made up here would not.
static const int left_out[] = {
    SYS_mmap /* but of a file: see below */, SYS_munmap, SYS_mprotect, SYS_madvise, SYS_mremap, SYS_brk, SYS_futex, SYS_membarrier,
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait, SYS_sigaltstack, SYS_tgkill, SYS_mlock, SYS_get_mempolicy,
    SYS_set_robust_list, SYS_rseq, SYS_set_tid_address, SYS_arch_prctl, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_yield,
    SYS_gettid, SYS_getpid, SYS_getppid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep,
    SYS_restart_syscall, SYS_exit, SYS_exit_group, SYS_close, SYS_close_range,
};

// What a call's object is: a path, a descriptor, or a number that says what is done.
static const struct call {
    int number;
    const char *name;
    int path, descriptor, option;
} calls[] = {
#define PATH(name, path) {SYS_##name, #name, path, NO_ARGUMENT, NO_ARGUMENT},
#define AT(name, descriptor, path) {SYS_##name, #name, path, descriptor, NO_ARGUMENT},
#define FD(name) {SYS_##name, #name, NO_ARGUMENT, 0, NO_ARGUMENT},
#define FD_OPTION(name, descriptor, option) {SYS_##name, #name, NO_ARGUMENT, descriptor, option},
#define OPTION(name) {SYS_##name, #name, NO_ARGUMENT, NO_ARGUMENT, 0},
#define PLAIN(name) {SYS_##name, #name, NO_ARGUMENT, NO_ARGUMENT, NO_ARGUMENT},
    PATH(open, 0) PATH(stat, 0) PATH(lstat, 0) PATH(access, 0) PATH(readlink, 0) PATH(mkdir, 0) PATH(rmdir, 0) PATH(unlink, 0) PATH(rename, 0)
    PATH(symlink, 1) PATH(chmod, 0) PATH(chown, 0) PATH(chdir, 0) PATH(statfs, 0) PATH(mount, 1) PATH(umount2, 0) PATH(pivot_root, 0)
    PATH(execve, 0) PATH(memfd_create, 0) PATH(truncate, 0)
    AT(openat, 0, 1) AT(newfstatat, 0, 1) AT(statx, 0, 1) AT(unlinkat, 0, 1) AT(mkdirat, 0, 1) AT(readlinkat, 0, 1) AT(faccessat, 0, 1)
    AT(faccessat2, 0, 1) AT(renameat, 0, 1) AT(renameat2, 0, 1) AT(fchownat, 0, 1) AT(fchmodat, 0, 1) AT(utimensat, 0, 1) AT(inotify_add_watch, 0, 1)
    FD(read) FD(write) FD(pread64) FD(pwrite64) FD(readv) FD(writev) FD(preadv) FD(preadv2) FD(pwritev) FD(fstat) FD(fstatfs) FD(lseek) FD(flock) FD(fallocate)
    FD(ftruncate) FD(fsync) FD(fdatasync) FD(getdents64) FD(fchmod) FD(fchown) FD(fadvise64) FD(readahead) FD(sendmsg) FD(recvmsg) FD(sendto)
    FD(recvfrom) FD(shutdown) FD(bind) FD(listen) FD(accept) FD(accept4) FD(connect) FD(getsockname) FD(getpeername) FD(dup) FD(dup2) FD(dup3)
    FD(epoll_wait) FD(pidfd_send_signal) FD(copy_file_range) FD(landlock_restrict_self) FD(landlock_add_rule) FD(timerfd_settime)
    FD_OPTION(ioctl, 0, 1) FD_OPTION(fcntl, 0, 1) FD_OPTION(setsockopt, 0, 2) FD_OPTION(getsockopt, 0, 2) FD_OPTION(epoll_ctl, 2, 1)
    FD_OPTION(mmap, 4, NO_ARGUMENT)
    OPTION(prctl) OPTION(seccomp) OPTION(unshare) OPTION(setpriority) OPTION(prlimit64) OPTION(waitid) OPTION(kill) OPTION(sched_setscheduler)
    PLAIN(socket) PLAIN(socketpair) PLAIN(pipe) PLAIN(pipe2) PLAIN(eventfd2) PLAIN(epoll_create1) PLAIN(userfaultfd) PLAIN(pidfd_open) PLAIN(clone)
    PLAIN(clone3) PLAIN(vfork) PLAIN(poll) PLAIN(ppoll) PLAIN(select) PLAIN(getrandom) PLAIN(sysinfo) PLAIN(uname) PLAIN(setsid) PLAIN(getcwd)
    PLAIN(getrlimit) PLAIN(setrlimit) PLAIN(setgroups) PLAIN(setresuid) PLAIN(setresgid) PLAIN(capset) PLAIN(capget) PLAIN(sethostname)
    PLAIN(landlock_create_ruleset) PLAIN(wait4) PLAIN(umask) PLAIN(inotify_init1) PLAIN(signalfd4) PLAIN(timerfd_create) PLAIN(sched_get_priority_max)
    PLAIN(sched_getscheduler) PLAIN(sched_getparam) PLAIN(process_vm_readv) PLAIN(getrusage) PLAIN(setitimer) PLAIN(timer_create) PLAIN(timer_settime)
};

static const struct {
    const char *name;
    int number;
} errors[] = {{"EINTR", EINTR}, {"EAGAIN", EAGAIN}, {"ENOMEM", ENOMEM}, {"EMFILE", EMFILE}, {"ENOSPC", ENOSPC}, {"EIO", EIO}};

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "inject: %s: %s\n", what, strerror(errno));
    exit(126);
}

// The child: is stopped at its calls from here on, and becomes the command. Its listener has the lowest free number.
static _Noreturn void become(char **command) {
    enum { CALLS = sizeof left_out / sizeof *left_out };
    struct sock_filter filter[2 * CALLS + 8];
    unsigned short n = 0;
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (unsigned i = 0; i < CALLS; i++) {
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)left_out[i], 0, 1);
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    // mmap(2): anonymous memory is the runtime's.
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[4]));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, UINT32_MAX, 0, 1);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    struct sock_fprog program = {n, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0) fail("prctl");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &program) < 0) fail("seccomp");
    execve(command[0], command, environ);
    _exit(127);
}

static const char *log_path, *wanted, *after;
static FILE *log_file;
static int wanted_error, occurrence = 1, met;
static bool onward;
static int64_t failed_at_ms;

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void link_of(char *target, size_t size, const char *format, int pid, int number) {
    char path[64];
    snprintf(path, sizeof path, format, pid, number);
    ssize_t length = readlink(path, target, size - 1);
    target[length < 0 ? 0 : length] = 0;
}

// The object's name without what differs from run to run: numbers of more than three digits, and words of 32 or 36 hexadecimal digits.
static void append(char *key, const char *object) {
    size_t n = strlen(key);
    if (!*object) return;
    if (n < MAX_KEY - 1) key[n++] = ' ';
    while (*object && n < MAX_KEY - 1) {
        size_t digits = strspn(object, "0123456789"), hexadecimal = strspn(object, "0123456789abcdef-");
        if (hexadecimal == 32 || hexadecimal == 36 || digits > 3) {
            object += digits > 3 ? digits : hexadecimal;
            key[n++] = '*';
        } else {
            size_t word = digits ? digits : 1;
            for (size_t i = 0; i < word && n < MAX_KEY - 1; i++) key[n++] = *object++;
        }
    }
    key[n] = 0;
}

static void append_descriptor(char *key, int pid, int descriptor) {
    char target[MAX_KEY], number[16];
    if (descriptor == AT_FDCWD) return;
    link_of(target, sizeof target, "/proc/%d/fd/%d", pid, descriptor);
    if (*target == '/' || strncmp(target, "anon_inode:", 11) == 0) {
        append(key, target);
        return;
    }
    target[strcspn(target, "[")] = 0; // socket:[...], pipe:[...]
    snprintf(number, sizeof number, "%d", descriptor);
    append(key, *target ? target : "descriptor");
    append(key, number);
}

static void describe(char *key, const struct seccomp_notif *request) {
    int pid = (int)request->pid;
    char program[MAX_KEY], text[MAX_KEY];
    link_of(program, sizeof program, "/proc/%d/exe", pid, 0);
    char *name = strrchr(program, '/');
    snprintf(key, MAX_KEY, "%s", name ? name + 1 : "?");
    const struct call *call = calls, *end = calls + sizeof calls / sizeof *calls;
    while (call < end && call->number != request->data.nr) call++;
    if (call == end) {
        snprintf(text, sizeof text, "call-%d", request->data.nr);
        append(key, text);
        return;
    }
    append(key, call->name);
    const uint64_t *arguments = (const uint64_t *)request->data.args;
    if (call->path != NO_ARGUMENT) {
        // Up to the end of its page at least: a read over it may fail as a whole.
        struct iovec ours = {text, sizeof text - 1}, theirs = {(void *)arguments[call->path], 4096 - arguments[call->path] % 4096};
        if (theirs.iov_len < 256) theirs.iov_len += 4096;
        ssize_t length = process_vm_readv(pid, &ours, 1, &theirs, 1, 0);
        text[length < 0 ? 0 : length] = 0;
        append(key, text);
        if (*text == '/') return;
    }
    if (call->descriptor != NO_ARGUMENT) append_descriptor(key, pid, (int)arguments[call->descriptor]);
    if (call->option != NO_ARGUMENT) {
        snprintf(text, sizeof text, "0x%x", (unsigned)arguments[call->option]);
        append(key, text);
    }
}

static void answer(int listener) {
    struct seccomp_notif request = {0};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request) < 0) {
        if (errno == ENOENT || errno == EINTR) return; // the thread was killed
        fail("SECCOMP_IOCTL_NOTIF_RECV");
    }
    char key[MAX_KEY];
    describe(key, &request);
    struct seccomp_notif_resp response = {.id = request.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    if (after && strcmp(key, after) == 0) after = NULL;
    bool hit = wanted && !after && strcmp(key, wanted) == 0 && (++met == occurrence || (onward && met > occurrence));
    if (hit) {
        response.flags = 0;
        response.error = -wanted_error;
        if (!failed_at_ms) failed_at_ms = now_ms();
    }
    if (!after) fprintf(log_file, "%s%s\n", hit ? "!" : "", key);
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response) < 0 && errno != ENOENT) fail("SECCOMP_IOCTL_NOTIF_SEND");
}

int main(int argc, char **argv) {
    int i = 1;
    for (; i + 1 < argc && strcmp(argv[i], "--") != 0; i += 2) {
        if (strcmp(argv[i], "--log") == 0) log_path = argv[i + 1];
        if (strcmp(argv[i], "--fail") == 0) wanted = argv[i + 1];
        if (strcmp(argv[i], "--after") == 0) after = argv[i + 1];
        if (strcmp(argv[i], "--occurrence") == 0) {
            occurrence = atoi(argv[i + 1]);
            onward = strchr(argv[i + 1], '+') != NULL;
        }
        for (unsigned k = 0; strcmp(argv[i], "--error") == 0 && k < sizeof errors / sizeof *errors; k++) {
            if (strcmp(errors[k].name, argv[i + 1]) == 0) wanted_error = errors[k].number;
        }
    }
    if (!log_path || i + 1 >= argc || !wanted != !wanted_error) {
        fprintf(stderr, "usage: inject [--fail KEY --error ERRNO] [--occurrence N[+]] [--after KEY] --log FILE -- COMMAND ARG...\n");
        return 2;
    }
    log_file = fopen(log_path, "we");
    if (!log_file) fail(log_path);
    int number = open("/dev/null", O_RDONLY | O_CLOEXEC);
    close(number);
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) become(argv + i + 1);
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0), listener = -1;
    for (int tries = 0; tries < 5000 && (listener = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0)) < 0; tries++) usleep(1000);
    if (listener < 0) fail("pidfd_getfd");

    // Until nobody is left who could make a call, or the command has ended and others do not follow.
    struct pollfd polled[] = {{.fd = listener, .events = POLLIN}, {.fd = pidfd, .events = POLLIN}};
    int left_ms = -1;
    while (true) {
        int ready = poll(polled, left_ms < 0 ? 2 : 1, left_ms);
        if (ready < 0 && errno != EINTR) fail("poll");
        if (ready == 0) {
            fprintf(log_file, "left\n");
            break;
        }
        if (polled[0].revents & POLLIN) answer(listener);
        else if (polled[0].revents) {
            if (failed_at_ms) fprintf(log_file, "ended %lld\n", (long long)(now_ms() - failed_at_ms));
            break;
        }
        if (left_ms < 0 && polled[1].revents) left_ms = 1000;
    }
    fclose(log_file);
    int status;
    if (waitpid(child, &status, 0) < 0) fail("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
