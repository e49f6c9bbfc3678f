// Lists of the system calls that a VMM may make, as seccomp filters (seccomp(2)).

#pragma once

#include <linux/filter.h>
#include <stdbool.h>

enum { FILTER_MAX = 512 };

struct filter {
    struct sock_filter code[FILTER_MAX];
    unsigned short length;
};

// What a VMM may do from its execution on. Anything else does not exist (ENOSYS), which programs know how to live with.
void build_start_filter(struct filter *filter);

// What it may do once its machine is set up, and its state loaded: nothing that opens, connects, executes or forks, and no new executable memory.
// Anything else kills it. With `kvm` also the virtual machine's own ioctls, with `save` what saving its state takes. `pid`: its own number, the only one it may signal.
void build_late_filter(struct filter *filter, bool kvm, bool save, int pid);
