"""What the runner does to the machine as a whole: its identity after a restore, and the limits of a run."""

import fcntl
import os
import signal
import socket
import struct
import time

RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h

CGROUPS = "/sys/fs/cgroup"
RUN = CGROUPS + "/run"
MAX_PROCESSES = 512
RESERVED_MEMORY = 8 << 20  # what the runner may yet need; the kernel keeps a reserve of its own


class Machine:
    def __init__(self):
        # Opened now: after the restore there is nothing to look up any more. init has bound a file on tmpfs over each
        # of the two, of the length that it will keep.
        self._random = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
        self._machine_id = os.open("/etc/machine-id", os.O_WRONLY | os.O_CLOEXEC)
        self._boot_id = os.open("/proc/sys/kernel/random/boot_id", os.O_WRONLY | os.O_CLOEXEC)
        self._limit_runs()
        self._kill = os.open(RUN + "/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        self._events = os.open(RUN + "/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        self._oom_kills = 0

    # Identity

    def refresh(self, wall_clock_ns, entropy, hostname, machine_id, boot_id):
        """Makes this clone unlike any other. The clock comes first: the rules of other things depend on it."""
        time.clock_settime_ns(time.CLOCK_REALTIME, wall_clock_ns)
        # struct rand_pool_info: the entropy that is credited (bits), the size of what follows.
        fcntl.ioctl(self._random, RNDADDENTROPY, struct.pack("=ii", 8 * len(entropy), len(entropy)) + entropy)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)
        socket.sethostname(hostname)
        os.pwrite(self._machine_id, machine_id.encode() + b"\n", 0)
        os.pwrite(self._boot_id, boot_id.encode() + b"\n", 0)

    def correct_clock(self, wall_clock_ns, tolerance_ns=1_000_000, latest_ns=5_000_000_000):
        """The host's time when it sent this, which may have been a while ago: a clock behind it is wrong, one that is
        somewhat ahead is the better one."""
        if not -tolerance_ns < time.time_ns() - wall_clock_ns < latest_ns:
            time.clock_settime_ns(time.CLOCK_REALTIME, wall_clock_ns)

    # Runs: all of a run's processes are in one cgroup, which is empty between two runs

    def _limit_runs(self):
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":") for line in meminfo)
        available = int(fields["MemAvailable"].split()[0]) << 10
        _write(CGROUPS + "/cgroup.subtree_control", "+memory +pids")
        os.mkdir(RUN)
        _write(RUN + "/pids.max", str(MAX_PROCESSES))
        _write(RUN + "/memory.max", str(available - RESERVED_MEMORY))
        _write(RUN + "/memory.oom.group", "1")  # a run that has lost one process at random is of no use to anybody

    def kill_run(self):
        """Kills every process of the run, also those that fork."""
        os.write(self._kill, b"1")

    def kill_all_but(self, pid):
        """Kills the processes of the run that are not the engine's own."""
        with open(RUN + "/cgroup.procs") as processes:
            for other in map(int, processes.read().split()):
                if other != pid:
                    try:
                        os.kill(other, signal.SIGKILL)
                    except ProcessLookupError:
                        pass

    def ran_out_of_memory(self):
        """Whether the kernel has killed a process of the run for memory since this was asked last."""
        before = self._oom_kills
        for line in os.pread(self._events, 4096, 0).splitlines():
            name, count = line.split()
            if name == b"oom_kill":
                self._oom_kills = int(count)
        return self._oom_kills > before


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)
