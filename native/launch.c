// The launcher: parent and supervisor of one VMM. One thread, one run directory, one control socket.
//
//   launch supervise --run-dir PATH [--rlimit-nofile N] [--rlimit-fsize BYTES] [--cgroup PATH] [--env NAME=VALUE]...
//                    [--cage-read PATH]... [--cage-device PATH]... [--cage-processes N] [--cage-address-space BYTES]
//                    [--cage-cgroup PATH [--cage-cgroup-set FILE=VALUE]...]... -- VMM ARG...
//   launch tsc-khz
//
// With --cage-read, what the VMM may read of this machine, it is put into a cage (cage.h).
//
// `supervise` outlives every kind of death of dh, so that the VMM and its run directory do not:
//
//   starting --exec--> running --VMM ends--> reaped --end of file--> run directory removed, exit 0
//      |                  |                    |
//      +--- end of file on control, SIGTERM, SIGINT, SIGHUP, any failure: kill, reap, remove, exit
//
// Descriptors it is started with:
//   0-2   replaced by /dev/null: a pipe that reads dh's output must not stay open while the launcher cleans up after dh
//   3     control, AF_UNIX SOCK_SEQPACKET, one message per packet
//   4-9   the launcher's own: whatever is there is closed
//   10-   the VMM's, under the same numbers. The launcher closes its copies, or their peers would not see the VMM end.
//
// Control, launcher to dh:
//   started PID [LAYER]...       the VMM was executed; carries its pidfd. With a cage, what it is made of: `+NAME`, and
//                                `-NAME:STEP:ERRNO` for what this machine did not grant
//   joined LAYER                 the same of its cgroups, which it joins while it starts
//   exited CODE | signaled N     the VMM was reaped; the run directory stays for dh to read, until end of file
//   failed STEP ERRNO OBJECT     the last message: nothing is left running, and the run directory is gone if it can be
// Control, dh to launcher:
//   kill                         SIGKILL to the VMM
//   hold                         keep the descriptors that come with it (4 in all) open until the VMM is reaped: a
//                                userfaultfd that closes before its guest is gone kills or hangs that guest
//   end of file                  the end. With shutdown(SHUT_WR) dh can still read what follows, and end of file from here.

#include "cage.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum {
    CONTROL = 3,
    OWN_FIRST = 4,
    OWN_LAST = 9,
    VMM_FIRST = 10,
    HELD_MAX = 4,
    SWEEP_PATIENCE_MS = 5000,
    SWEEP_POLL_MS = 2,
};

static struct {
    const char *run_dir;
    const char *cgroup; // that the VMM makes for itself: nobody else would remove it
    rlim_t nofile, fsize; // RLIM_INFINITY: not given
    char **env;
    char **vmm;
} options = {.nofile = RLIM_INFINITY, .fsize = RLIM_INFINITY};

static struct {
    int parent; // the directory that holds the run directory
    const char *name;
    bool created;
} run_dir;

static struct {
    pid_t pid; // 0: none, or reaped
    int pidfd;
    bool started;
} vmm;

static struct {
    int descriptors[HELD_MAX];
    int count;
} held;

// Self-contained, because the child sends it through a pipe; shorter than PIPE_BUF, so that it goes in one piece (pipe(7)).
static struct {
    int error; // 0: nothing failed
    char step[32];
    char object[1024];
} failure;

// Where a failed step goes: in the child to the launcher; -1 in the launcher, which finishes.
static int child_steps = -1;

static _Noreturn void finish(void);

// Only the first failure is kept: the others follow from it.
static void record_failure(const char *step, int error, const char *object)
{
    if (failure.error)
        return;
    failure.error = error;
    snprintf(failure.step, sizeof failure.step, "%s", step);
    snprintf(failure.object, sizeof failure.object, "%s", object);
}

static _Noreturn void fail(const char *step, int error, const char *object)
{
    record_failure(step, error, object);
    if (child_steps < 0)
        finish();
    // A write that fails has nobody to tell: the launcher is gone.
    ssize_t ignored = write(child_steps, &failure, sizeof failure);
    (void)ignored;
    _exit(EXIT_FAILURE);
}

static void must(bool done, const char *step, const char *object)
{
    if (!done)
        fail(step, errno, object);
}

// ---- control ------------------------------------------------------------------------------------------------------

// A report that cannot be sent is dropped: dh is gone, and end of file says so. Four reports never fill the socket.
static void report(int descriptor, const char *format, ...)
{
    char text[sizeof failure + 64];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);

    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof descriptor)];
    } rights = {.header = {.cmsg_len = CMSG_LEN(sizeof descriptor), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&rights.header), &descriptor, sizeof descriptor);

    struct msghdr message = {.msg_iov = &(struct iovec){text, (size_t)length}, .msg_iovlen = 1};
    if (descriptor >= 0) {
        message.msg_control = &rights;
        message.msg_controllen = sizeof rights;
    }
    sendmsg(CONTROL, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void release_held(void)
{
    while (held.count > 0)
        close(held.descriptors[--held.count]);
}

// Each descriptor gets an owner before anything is checked. Returns false when there were more than the launcher keeps.
static bool own_descriptors(struct msghdr *message)
{
    bool complete = !(message->msg_flags & MSG_CTRUNC);
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int descriptor;
            memcpy(&descriptor, CMSG_DATA(header) + i * sizeof descriptor, sizeof descriptor);
            if (held.count < HELD_MAX) {
                held.descriptors[held.count++] = descriptor;
            } else {
                close(descriptor);
                complete = false;
            }
        }
    }
    return complete;
}

static void kill_vmm(void)
{
    if (vmm.pid == 0)
        return;
    // Not reaped yet, so neither number can be anybody else's. The process group exists once the child has its session.
    kill(vmm.pid, SIGKILL);
    kill(-vmm.pid, SIGKILL);
}

// Returns false at end of file.
static bool obey(void)
{
    char text[32];
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof held.descriptors)];
    } rights;
    struct msghdr message = {
        .msg_iov = &(struct iovec){text, sizeof text - 1},
        .msg_iovlen = 1,
        .msg_control = &rights,
        .msg_controllen = sizeof rights,
    };
    ssize_t length = recvmsg(CONTROL, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    // ECONNRESET is end of file too: dh died with a report unread (unix(7)). Its last packets stay queued on the open
    // socket, and with them the descriptors of a `hold` that was not read.
    if (length <= 0)
        return false;
    text[length] = '\0';

    if (!own_descriptors(&message))
        fail("hold", EMFILE, "more descriptors than the launcher keeps");
    if (strcmp(text, "kill") == 0)
        kill_vmm();
    else if (strcmp(text, "hold") != 0)
        fail("control", EPROTO, text);
    if (vmm.pid == 0)
        release_held();
    return true;
}

// ---- run directory ------------------------------------------------------------------------------------------------

// A sweep removes the directories that nobody has locked, and holds `.lock` exclusively while it does. The shared lock
// here keeps it away until the new directory is locked. The launcher never closes the directory: that lock is its sign of life.
static void create_run_dir(void)
{
    const char *parent = dirname(strdup(options.run_dir));
    run_dir.name = basename(strdup(options.run_dir));
    run_dir.parent = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
    must(run_dir.parent >= 0, "open", parent);

    char lock[PATH_MAX];
    snprintf(lock, sizeof lock, "%s/.lock", parent);
    int sweep = openat(run_dir.parent, ".lock", O_RDONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    must(sweep >= 0, "open", lock);
    for (int waited_ms = 0; flock(sweep, LOCK_SH | LOCK_NB) != 0; waited_ms += SWEEP_POLL_MS) {
        must(errno == EWOULDBLOCK && waited_ms < SWEEP_PATIENCE_MS, "flock", lock);
        // No events asked for: only a peer that has gone ends this early.
        if (poll(&(struct pollfd){.fd = CONTROL}, 1, SWEEP_POLL_MS) > 0)
            finish();
    }

    must(mkdirat(run_dir.parent, run_dir.name, 0700) == 0, "mkdir", options.run_dir);
    run_dir.created = true;
    int directory = openat(run_dir.parent, run_dir.name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    must(directory >= 0, "open", options.run_dir);
    must(flock(directory, LOCK_EX | LOCK_NB) == 0, "flock", options.run_dir);
    must(fchdir(directory) == 0, "fchdir", options.run_dir);
    close(sweep);
}

// Never follows a symbolic link. What cannot be removed is recorded, and the rest is removed all the same.
static void remove_tree(int parent, const char *name)
{
    int descriptor = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = descriptor < 0 ? NULL : fdopendir(descriptor);
    if (!directory) {
        record_failure("remove", errno, name);
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (unlinkat(descriptor, entry->d_name, 0) == 0 || errno == ENOENT)
            continue;
        if (errno == EISDIR) // unlink(2): what Linux says of a directory
            remove_tree(descriptor, entry->d_name);
        else
            record_failure("remove", errno, entry->d_name);
    }
    closedir(directory);
    if (unlinkat(parent, name, AT_REMOVEDIR) != 0 && errno != ENOENT)
        record_failure("remove", errno, name);
}

// ---- the VMM ------------------------------------------------------------------------------------------------------

static void limit(__rlimit_resource_t resource, rlim_t value, const char *name)
{
    must(setrlimit(resource, &(struct rlimit){value, value}) == 0, "setrlimit", name);
}

// The signal is asked for after the cage has changed the user, which clears it (prctl(2), PR_SET_PDEATHSIG). A launcher that died before
// has left no reader of the pipe; its number would not tell in a pid namespace.
static void die_with_launcher(void)
{
    must(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0, "prctl", "PR_SET_PDEATHSIG");
    if (poll(&(struct pollfd){.fd = child_steps}, 1, 0) > 0)
        _exit(EXIT_FAILURE);
}

// The child, step by step, until it is the VMM.
static _Noreturn void become_vmm(void)
{
    must(setsid() >= 0, "setsid", options.vmm[0]);

    int log = open("vmm.log", O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    must(log >= 0, "open", "vmm.log");
    must(dup2(log, STDOUT_FILENO) >= 0 && dup2(log, STDERR_FILENO) >= 0, "dup2", "vmm.log");
    // Closed by exec, not now: the pipe that reports a failed step is one of them.
    must(close_range(CONTROL, OWN_LAST, CLOSE_RANGE_CLOEXEC) == 0, "close_range", "3-9");

    limit(RLIMIT_CORE, 0, "RLIMIT_CORE"); // a core file would hold the guest's memory
    if (options.nofile != RLIM_INFINITY)
        limit(RLIMIT_NOFILE, options.nofile, "RLIMIT_NOFILE");
    if (options.fsize != RLIM_INFINITY) {
        limit(RLIMIT_FSIZE, options.fsize, "RLIMIT_FSIZE");
        // A write past the limit is an error that the VMM can report (EFBIG), not its death (setrlimit(2)).
        signal(SIGXFSZ, SIG_IGN);
    }
    cage_enter();
    die_with_launcher();
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "prctl", "PR_SET_NO_NEW_PRIVS");

    sigset_t none;
    sigemptyset(&none);
    must(sigprocmask(SIG_SETMASK, &none, NULL) == 0, "sigprocmask", options.vmm[0]);
    environ = options.env;
    cage_lock();
    execvp(options.vmm[0], options.vmm);
    fail("execvp", errno, options.vmm[0]);
}

// Returns the descriptor that reads end of file once the VMM is executed, or the step that failed.
static int start_vmm(void)
{
    int steps[2];
    must(pipe2(steps, O_CLOEXEC) == 0, "pipe2", options.vmm[0]);
    pid_t pid = cage_fork();
    must(pid >= 0, "fork", options.vmm[0]);
    if (pid == 0) {
        close(steps[0]);
        child_steps = steps[1];
        become_vmm();
    }
    vmm.pid = pid;
    close(steps[1]);
    must(close_range(VMM_FIRST, UINT_MAX, 0) == 0, "close_range", "10-");
    vmm.pidfd = pidfd_open(pid, 0);
    must(vmm.pidfd >= 0, "pidfd_open", options.vmm[0]);
    return steps[0];
}

static void finish_start(int steps)
{
    ssize_t length = read(steps, &failure, sizeof failure);
    must(length >= 0, "read", "steps");
    if (length > 0)
        finish();
    close(steps);
    vmm.started = true;
    char layers[512];
    cage_report(layers, sizeof layers);
    report(vmm.pidfd, "started %d%s", vmm.pid, layers);
    cage_join(vmm.pid, layers, sizeof layers);
    if (*layers)
        report(-1, "joined%s", layers);
}

static void reap_vmm(void)
{
    // What it started in its own process group goes with it, while the unreaped pid still keeps the group's number ours.
    pid_t pid = vmm.pid;
    int status;
    kill(-pid, SIGKILL);
    vmm.pid = 0;
    must(waitpid(pid, &status, 0) == pid, "waitpid", options.vmm[0]);
    release_held();
    if (!vmm.started)
        return;
    if (WIFEXITED(status))
        report(-1, "exited %d", WEXITSTATUS(status));
    else
        report(-1, "signaled %d", WTERMSIG(status));
}

// ---- supervision --------------------------------------------------------------------------------------------------

static void watch(int steps, int signals)
{
    enum { STEPS, VMM, COMMANDS, SIGNALS, COUNT };
    struct pollfd on[COUNT] = {
        [STEPS] = {.fd = steps, .events = POLLIN},
        [VMM] = {.fd = -1, .events = POLLIN}, // not before `started` was said
        [COMMANDS] = {.fd = CONTROL, .events = POLLIN},
        [SIGNALS] = {.fd = signals, .events = POLLIN},
    };
    for (;;) {
        if (poll(on, COUNT, -1) < 0) {
            must(errno == EINTR, "poll", options.vmm[0]);
            continue;
        }
        if (on[STEPS].revents) {
            finish_start(steps);
            on[STEPS].fd = -1;
            on[VMM].fd = vmm.pidfd;
        }
        if (on[VMM].revents) {
            reap_vmm();
            on[VMM].fd = -1;
        }
        if (on[SIGNALS].revents || (on[COMMANDS].revents && !obey()))
            return;
    }
}

// The one way out. The order matters: kill, reap, close what is held, remove; a cgroup is removed only when it is empty.
static _Noreturn void finish(void)
{
    if (vmm.pid != 0) {
        kill_vmm();
        reap_vmm(); // unbounded on purpose: while the VMM cannot die, its directory must stay, locked
    }
    // What dh sent and nobody read would turn its end of file, and a last report before it, into ECONNRESET (unix(7)).
    shutdown(CONTROL, SHUT_RD);
    while (recv(CONTROL, &(char){0}, 1, MSG_DONTWAIT) > 0)
        ;
    if (options.cgroup && rmdir(options.cgroup) != 0 && errno != ENOENT)
        record_failure("rmdir", errno, options.cgroup);
    // A cgroup that is left is found by the name of its run directory: the next run's sweep removes both.
    if (cage_remove(record_failure) && run_dir.created)
        remove_tree(run_dir.parent, run_dir.name);
    if (failure.error)
        report(-1, "failed %s %s %s", failure.step, strerrorname_np(failure.error), failure.object);
    exit(failure.error ? EXIT_FAILURE : EXIT_SUCCESS);
}

// A clean process, whatever state dh was in: a background job, say, has SIGINT ignored, and exec keeps that (signal(7)).
// Returns the signals that end the launcher, as a descriptor.
static int begin(void)
{
    setsid(); // EPERM: the session is ours already
    umask(077);
    fcntl(CONTROL, F_SETFD, FD_CLOEXEC);
    must(close_range(OWN_FIRST, OWN_LAST, 0) == 0, "close_range", "4-9");
    int null = open("/dev/null", O_RDWR); // without O_CLOEXEC: when descriptor 0 was closed, this is the one to keep
    must(null >= 0, "open", "/dev/null");
    for (int descriptor = STDIN_FILENO; descriptor <= STDERR_FILENO; descriptor++)
        must(dup2(null, descriptor) == descriptor, "dup2", "/dev/null");
    if (null > STDERR_FILENO)
        close(null);

    // By system call: signal(3) refuses the C library's own two signals, and posix_spawn(3) leaves those ignored.
    // SIGCHLD matters most: were it ignored, nothing could be reaped (wait(2)). SIGPIPE needs no care: every send has MSG_NOSIGNAL.
    static const unsigned long default_action[4]; // the kernel's struct sigaction: SIG_DFL, no flags, no restorer, empty mask
    for (int number = 1; number < NSIG; number++)
        syscall(SYS_rt_sigaction, number, default_action, NULL, NSIG / 8); // fails for SIGKILL and SIGSTOP
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGHUP);
    must(sigprocmask(SIG_SETMASK, &ends, NULL) == 0, "sigprocmask", "launcher");
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);
    must(signals >= 0, "signalfd", "launcher");
    return signals;
}

static rlim_t number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0)
        fail("arguments", EINVAL, text);
    return value;
}

static void parse(int argc, char **argv)
{
    int variables = 0;
    options.env = calloc((size_t)argc + 1, sizeof *options.env);
    must(options.env != NULL, "calloc", "environment");
    options.env[variables++] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

    int i = 2;
    for (; i + 1 < argc && strcmp(argv[i], "--") != 0; i += 2) {
        char *value = argv[i + 1];
        if (strcmp(argv[i], "--run-dir") == 0)
            options.run_dir = value;
        else if (strcmp(argv[i], "--cgroup") == 0)
            options.cgroup = value;
        else if (strcmp(argv[i], "--rlimit-nofile") == 0)
            options.nofile = number(value);
        else if (strcmp(argv[i], "--rlimit-fsize") == 0)
            options.fsize = number(value);
        else if (strcmp(argv[i], "--env") == 0 && *value != '=' && strchr(value, '='))
            options.env[variables++] = value;
        else if (!cage_option(argv[i], value))
            fail("arguments", EINVAL, argv[i]);
    }
    if (!options.run_dir)
        fail("arguments", EINVAL, "--run-dir");
    if (i + 1 >= argc)
        fail("arguments", EINVAL, "-- VMM");
    options.vmm = argv + i + 1;
    // Relative to what? The VMM starts in its run directory.
    if (options.vmm[0][0] != '/' && strchr(options.vmm[0], '/'))
        fail("arguments", EINVAL, options.vmm[0]);
}

static _Noreturn void supervise(int argc, char **argv)
{
    int signals = begin();
    parse(argc, argv);
    create_run_dir();
    watch(start_vmm(), signals);
    finish();
}

// ---- time stamp counter -------------------------------------------------------------------------------------------

struct instant {
    uint64_t tsc;
    int64_t ns;
};

static uint64_t read_tsc(void)
{
    _mm_lfence(); // rdtsc does not wait for what stands before it, nor what stands after it for rdtsc (Intel SDM 2B, RDTSC)
    uint64_t tsc = __rdtsc();
    _mm_lfence();
    return tsc;
}

// The clock read between two counter reads; of many tries the tightest, where no interrupt and no hypervisor came between.
static struct instant read_instant(void)
{
    struct instant best = {0};
    uint64_t tightest = UINT64_MAX;
    for (int i = 0; i < 200; i++) {
        struct timespec now;
        uint64_t before = read_tsc();
        clock_gettime(CLOCK_MONOTONIC_RAW, &now); // RAW: NTP does not slew it
        uint64_t width = read_tsc() - before;
        if (width < tightest) {
            tightest = width;
            best = (struct instant){before + width / 2, now.tv_sec * INT64_C(1000000000) + now.tv_nsec};
        }
    }
    return best;
}

static int print_tsc_khz(void)
{
    struct instant start = read_instant();
    nanosleep(&(struct timespec){.tv_nsec = 50 * 1000 * 1000}, NULL);
    struct instant end = read_instant();

    uint64_t ticks = end.tsc - start.tsc;
    uint64_t ns = (uint64_t)(end.ns - start.ns);
    printf("%llu\n", (unsigned long long)((ticks * 1000000 + ns / 2) / ns));
    return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "tsc-khz") == 0)
        return print_tsc_khz();

    int type = 0;
    socklen_t size = sizeof type;
    if (argc >= 2 && strcmp(argv[1], "supervise") == 0 &&
        getsockopt(CONTROL, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET)
        supervise(argc, argv);

    fputs("usage: launch tsc-khz\n"
          "       launch supervise --run-dir PATH [--rlimit-nofile N] [--rlimit-fsize BYTES] [--cgroup PATH] [--env NAME=VALUE]...\n"
          "              [--cage-read PATH]... [--cage-device PATH]... [--cage-processes N] [--cage-address-space BYTES]\n"
          "              [--cage-cgroup PATH [--cage-cgroup-set FILE=VALUE]...]... -- VMM ARG...\n"
          "`supervise` is dh's to start: descriptor 3 must be its control socket (AF_UNIX, SOCK_SEQPACKET).\n",
          stderr);
    return 2;
}
