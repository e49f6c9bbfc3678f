// The cage around a VMM: what the launcher's child takes from itself before it becomes the VMM.
//
// Each layer that this machine does not grant is left out and reported; none is fatal. What hides files (LAYER_ROOT) comes before the
// user is changed, because the files that the VMM reads are opened through it whoever owns the directories above them.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

enum layer {
    LAYER_USER,         // a user number that nothing else on this machine has, or a user namespace
    LAYER_CAPABILITIES, // none, and none to be had
    LAYER_PRIVILEGES,   // no_new_privs: execution grants nothing
    LAYER_PIDS,         // a pid namespace: no other process can be named
    LAYER_NETWORK,      // a network namespace with a loopback interface that is down
    LAYER_IPC,          // an ipc namespace
    LAYER_UTS,          // a uts namespace: the host's name is not seen
    LAYER_ROOT,         // a mount namespace whose root has the files that the VMM reads, and nothing that can be written
    LAYER_LIMITS,       // descriptors, processes, written bytes, address space
    LAYER_CGROUP,       // joined last, in the launcher: memory without swap, processes, processor weight
    LAYER_LANDLOCK,     // the same files once more, by Landlock
    LAYER_CALLS,        // the system calls that a VMM needs to start
    LAYERS,
};

// Takes an option of the cage; false when it is none.
bool cage_option(const char *name, char *value);

// fork(2) into the namespaces that a process can only be born into. Returns 0 in the child.
pid_t cage_fork(void);

// The layers, in the child.
void cage_enter(void);

// The last step before execution: a parent's death is a signal, which a change of user would have cleared (prctl(2)).
// Seccomp comes last of all, because it forbids most of what is done before.
void cage_lock(void);

// What became of the layers, in the launcher, once the child was executed: ` +LAYER` and ` -LAYER:STEP:ERRNO`. Nothing without a cage.
void cage_report(char *text, size_t size);

// Puts the VMM into its cgroups, and says what became of that in the same way; nothing where there are none. After its execution, because
// joining takes as long as the kernel takes to see all processors idle once (some milliseconds), in which the VMM starts.
void cage_join(pid_t pid, char *text, size_t size);

// Kills what is left in the cage's cgroups, and removes them; called when the VMM was reaped. False when one is left.
bool cage_remove(void (*failed)(const char *step, int error, const char *object));
