// The late lock: once a machine is set up, and its state loaded, its VMM opens, connects, executes and forks nothing more, whoever owns it then.
//
// A thread in the VMM waits on a socket that it inherited (DH_LOCK_FD), and installs the list of filter.h for all threads:
//
//   dh: "lock tcg" | "lock kvm"     before the machine runs; with " save" if its state will be saved
//   VMM: "locked" | "failed ERRNO"
//   end of file                     dh is gone: the VMM ends, even if its launcher was killed too

#pragma once

// Starts the thread, where the variable is set.
void await_late_lock(void);
