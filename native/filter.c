#include "filter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#define X32_BIT 0x40000000u
// What glibc's pthread_create asks of clone(2); clone3 is refused (its flags are in memory, where a filter cannot look) and glibc falls back.
#define THREAD_FLAGS \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
// linux/kvm.h: the type of its ioctls. Those of the device that make new machines are below 0x40; 0x41 makes a virtual CPU, 0xe0 a device.
#define KVM_TYPE 0xae
#define KVM_CHECK_EXTENSION_NR 0x03
#define KVM_FIRST_OF_MACHINE 0x40
#define KVM_CREATE_VCPU_NR 0x41
#define KVM_CREATE_DEVICE_NR 0xe0

// QEMU 7.2 makes these while it runs a restored machine with virtio-blk, virtio-serial and a balloon, or glibc does for it.
static const int running[] = {
    SYS_read, SYS_readv, SYS_pread64, SYS_preadv, SYS_write, SYS_writev, SYS_sendmsg, SYS_recvmsg, SYS_poll, SYS_ppoll, SYS_close,
    SYS_futex, SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait, SYS_restart_syscall, SYS_clock_nanosleep, SYS_clock_gettime, SYS_gettimeofday,
    SYS_set_robust_list, SYS_rseq, SYS_sched_yield, SYS_gettid, SYS_getpid, SYS_exit, SYS_exit_group,
};

// What it asks of the descriptor that the device state goes to.
static const int saving[] = {SYS_getsockopt};

static const int starting[] = {
    // The dynamic loader and the C library.
    SYS_execve, SYS_arch_prctl, SYS_set_tid_address, SYS_prlimit64, SYS_getrandom, SYS_mmap, SYS_mprotect, SYS_uname, SYS_sysinfo, SYS_time,
    SYS_clock_getres, SYS_nanosleep, SYS_rt_sigaction, SYS_sigaltstack, SYS_tgkill, SYS_getppid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
    SYS_getpgrp, SYS_membarrier,
    // Files.
    SYS_open, SYS_openat, SYS_stat, SYS_fstat, SYS_lstat, SYS_newfstatat, SYS_statx, SYS_statfs, SYS_fstatfs, SYS_access, SYS_faccessat,
    SYS_faccessat2, SYS_readlink, SYS_readlinkat, SYS_getdents64, SYS_getcwd, SYS_chdir, SYS_fchdir, SYS_lseek, SYS_pwrite64, SYS_pwritev,
    SYS_ftruncate, SYS_fallocate, SYS_fadvise64, SYS_fsync, SYS_fdatasync, SYS_fcntl, SYS_dup, SYS_dup2, SYS_dup3, SYS_pipe2, SYS_umask,
    SYS_memfd_create, SYS_ioctl,
    // Events and inherited sockets; new ones cannot be made.
    SYS_eventfd2, SYS_signalfd4, SYS_timerfd_create, SYS_timerfd_settime, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait,
    SYS_getsockopt, SYS_setsockopt, SYS_getsockname, SYS_getpeername, SYS_sendto, SYS_recvfrom, SYS_shutdown,
    // Threads and what QEMU makes of itself.
    SYS_prctl, SYS_seccomp, SYS_sched_getaffinity, SYS_get_mempolicy, SYS_set_mempolicy, SYS_mbind,
};

static void add(struct filter *filter, struct sock_filter instruction)
{
    if (filter->length == FILTER_MAX)
        abort(); // the lists above have outgrown the program
    filter->code[filter->length++] = instruction;
}

static void load(struct filter *filter, uint32_t offset)
{
    add(filter, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset));
}

static void answer(struct filter *filter, uint32_t action)
{
    add(filter, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action));
}

// Skips instructions unless the accumulator is the value.
static void unless_equal(struct filter *filter, uint32_t value, uint8_t skip)
{
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip));
}

// The low half of an argument: flags and commands have no high half, and what does is refused by the kernel.
static void load_argument(struct filter *filter, int number)
{
    load(filter, (uint32_t)(offsetof(struct seccomp_data, args) + (size_t)number * sizeof(uint64_t)));
}

static void begin(struct filter *filter)
{
    filter->length = 0;
    load(filter, offsetof(struct seccomp_data, arch));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0));
    answer(filter, SECCOMP_RET_KILL_PROCESS);
    load(filter, offsetof(struct seccomp_data, nr));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1));
    answer(filter, SECCOMP_RET_KILL_PROCESS);
}

static void allow(struct filter *filter, const int *calls, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        unless_equal(filter, (uint32_t)calls[i], 1);
        answer(filter, SECCOMP_RET_ALLOW);
    }
}

// Allows a call whose argument has one value, and nothing else of it.
static void allow_with(struct filter *filter, int call, int argument, uint32_t value, uint32_t refusal)
{
    unless_equal(filter, (uint32_t)call, 4);
    load_argument(filter, argument);
    unless_equal(filter, value, 1);
    answer(filter, SECCOMP_RET_ALLOW);
    answer(filter, refusal);
}

// Allows a call whose argument has none of these bits.
static void allow_without(struct filter *filter, int call, int argument, uint32_t bits, uint32_t refusal)
{
    unless_equal(filter, (uint32_t)call, 4);
    load_argument(filter, argument);
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bits, 1, 0));
    answer(filter, SECCOMP_RET_ALLOW);
    answer(filter, refusal);
}

// The flags of a descriptor, and nothing that has signals sent.
static void allow_descriptor_flags(struct filter *filter)
{
    unless_equal(filter, SYS_fcntl, 4);
    load_argument(filter, 1);
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, F_SETFL, 1, 0));
    answer(filter, SECCOMP_RET_ALLOW);
    answer(filter, SECCOMP_RET_KILL_PROCESS);
}

static void allow_kvm(struct filter *filter)
{
    enum { BODY = 12 };
    static const int doorbells[] = {SYS_eventfd2}; // that KVM rings for a virtio device; they are made when the machine runs
    allow(filter, doorbells, 1);
    unless_equal(filter, SYS_ioctl, BODY);
    load_argument(filter, 1);
    add(filter, (struct sock_filter)BPF_STMT(BPF_ALU | BPF_RSH | BPF_K, 8));
    add(filter, (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff));
    unless_equal(filter, KVM_TYPE, 6);
    load_argument(filter, 1);
    add(filter, (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_CHECK_EXTENSION_NR, 4, 0));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_CREATE_VCPU_NR, 2, 0));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_CREATE_DEVICE_NR, 1, 0));
    add(filter, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, KVM_FIRST_OF_MACHINE, 1, 0));
    answer(filter, SECCOMP_RET_KILL_PROCESS);
    answer(filter, SECCOMP_RET_ALLOW);
}

void build_start_filter(struct filter *filter)
{
    begin(filter);
    allow(filter, running, sizeof running / sizeof *running);
    allow(filter, starting, sizeof starting / sizeof *starting);
    allow_with(filter, SYS_clone, 0, THREAD_FLAGS, SECCOMP_RET_ERRNO | EPERM);
    answer(filter, SECCOMP_RET_ERRNO | ENOSYS);
}

void build_late_filter(struct filter *filter, bool kvm, bool save, int pid)
{
    begin(filter);
    allow(filter, running, sizeof running / sizeof *running);
    if (save)
        allow(filter, saving, sizeof saving / sizeof *saving);
    allow_without(filter, SYS_mmap, 2, PROT_EXEC, SECCOMP_RET_KILL_PROCESS);
    allow_without(filter, SYS_mprotect, 2, PROT_EXEC, SECCOMP_RET_KILL_PROCESS);
    allow_with(filter, SYS_clone, 0, THREAD_FLAGS, SECCOMP_RET_KILL_PROCESS);
    allow_with(filter, SYS_prctl, 0, PR_SET_NAME, SECCOMP_RET_KILL_PROCESS);
    allow_with(filter, SYS_tgkill, 0, (uint32_t)pid, SECCOMP_RET_KILL_PROCESS);
    allow_descriptor_flags(filter);
    if (kvm)
        allow_kvm(filter);
    unless_equal(filter, SYS_clone3, 1);
    answer(filter, SECCOMP_RET_ERRNO | ENOSYS);
    answer(filter, SECCOMP_RET_KILL_PROCESS);
}
