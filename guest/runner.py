"""The runner: supervises all that runs in the microVM, and speaks the guest protocol (docs/guest-protocol.md).

    init ─ runner ─┬─ engine    warm; forks children, and runs none of the user's code itself
                   └─ child     forked in advance; runs the code of one exec

An engine that must not fork (`IN_PLACE`) is its own child: it runs the code of one exec after the other, and what is said
here of a child's end is then said of the end of its run.

One thread, one loop, and nothing waits but the loop. What is done before `ready` is in the snapshot, what is done after it
is what somebody waits for, and is emulated code that runs for the first time: so all that can be done early is, whole execs
are rehearsed before the runner says `ready`, and what remains keeps to few and plain operations.
"""

import ctypes
import fcntl
import gc
import json
import marshal
import os
import select
import signal
import socket
import struct
import sys
import termios
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -I leaves it out
import stdin_demand  # noqa: E402
from channel import Channel, Gone, Malformed  # noqa: E402
from machine import Machine  # noqa: E402

PROTOCOL = 2
PORT_NAME = "dh.channel"
VSOCK_PORT = 25_704  # 0x6468, "dh"
DEVICE_WAIT_S = 10
PYTHON = "/usr/bin/python3"
SETTINGS = "/usr/lib/dh/engine.json"  # what the image's template says of the engine
IN_PLACE = ("deephaven",)
SHARED_CPU = 0  # see Runner._fork
ENGINE_CONTROL = 3  # the descriptor by which an engine knows its runner

NO_JOB_YET = bytes(4)  # the length of an empty one

MAX_OUTPUT = 65_536  # bytes of one stdout or stderr frame
MAX_CREDIT = 65_536
MAX_UNSENT = 262_144  # bytes; beyond them the code's output is not read, and the code waits for the host
MAX_HEADER = 1_048_576
MAX_TEXT = 65_536  # characters of a text in a result
MAX_NAME = 1_024  # characters of a name in it
MAX_REPORT = 4_194_304  # bytes; more than four such texts can take in JSON
DEFAULT_GRACE_MS = 2_000
DRAIN_S = 2.0  # for the pipes to end once all of a run's processes have been killed

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9  # linux/vm_sockets.h
IN_OPEN = 0x20  # linux/inotify.h

_libc = ctypes.CDLL(None, use_errno=True)
_to_json = json.JSONEncoder(ensure_ascii=False).encode


class Fatal(Exception):
    """The machine is of no use any more."""


class Refused(Exception):
    """A request that cannot be taken; the sandbox stays usable."""


class Writer:
    """What waits to go into a pipe."""

    def __init__(self, descriptor):
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.ending = False  # nothing comes after what waits
        self._waiting = b""
        self._written = 0  # of it

    @property
    def waiting(self):
        """How many bytes wait."""
        return len(self._waiting) - self._written

    def add(self, data):
        self._waiting = self._waiting[self._written :] + data
        self._written = 0

    def write(self):
        """Writes what the pipe takes now. Returns whether nothing waits any more."""
        try:
            while self._written < len(self._waiting):
                rest = memoryview(self._waiting)[self._written :] if self._written else self._waiting
                self._written += os.write(self.descriptor, rest)
        except BlockingIOError:
            return False
        except BrokenPipeError:  # nobody is left to read it
            self.ending = True
        self._waiting, self._written = b"", 0
        return True


class Run:
    """One exec: from the fork of its process, long before its code is known, to the end of that process."""

    def __init__(self, engine, in_place, hello, cpu):
        """Has the engine fork the process, or become it. `hello`: the number of the last one, whose entropy is in what the
        process draws; `cpu`: where the process waits, or None for anywhere."""
        self.in_place, self.hello = in_place, hello
        stdin, to_stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        job, to_job = os.pipe()
        self.report, report = os.pipe()
        self.stdin_opens = watch_opens(stdin)
        theirs = (stdin, stdout, stderr, job, report)
        socket.send_fds(engine, [b"fork" if cpu is None else b"fork %d" % cpu], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.stdin, self.job = Writer(to_stdin), Writer(to_job)
        self.forked = False
        self.pid = self.pidfd = self.listener = None
        self.descriptors = {to_stdin, to_job, self.stdout, self.stderr, self.report, self.stdin_opens}
        self.unended = {self.stdout, self.stderr, self.report}  # of the pipes that come from the process

        self.id = self.started_ns = self.ended_ns = None
        self.headers = {}  # of the frames for what comes out of stdout and stderr
        self.credit = 0  # bytes that the host may send in its next frame
        self.wants_continuously = False
        self.reported = b""
        self.exit_code = None  # that the process has said it is about to end with
        self.status = None  # that it has ended with
        self.deadline = None  # of a cancel's grace; then of the pipes' end
        self.answered = False

    @property
    def ready(self):
        return self.forked and self.pid is not None

    def arrived(self, pid, listener):
        """The process is ready, and has told what it is known by."""
        self.pid, self.pidfd = pid, os.pidfd_open(pid)
        self.descriptors.add(self.pidfd)
        if listener is not None:
            self.listener = stdin_demand.Listener(listener, self.stdin.descriptor)

    def begin(self, identifier, job):
        self.started_ns = time.monotonic_ns()
        self.id = identifier
        self.headers[self.stdout] = f'{{"type":"stdout","id":{identifier}}}'.encode()
        self.headers[self.stderr] = f'{{"type":"stderr","id":{identifier}}}'.encode()
        self.job.add(len(job).to_bytes(4, "little") + job)
        self.job.ending = True

    def told(self, data):
        """More of the report: a line that may be empty, when the code has ended, and a byte, the exit code, as the last
        act of the process."""
        self.reported += data
        end_of_line = self.reported.find(b"\n")
        if end_of_line >= 0 and end_of_line + 2 == len(self.reported):
            self.exit_code = self.reported[-1]

    @property
    def has_ended_in_place(self):
        return self.in_place and self.exit_code is not None

    def result(self, out_of_memory):
        """The header of the result's frame."""
        exit_code, signal_number = self.exit_code, None
        if exit_code is None:
            exit_code = self.status.si_status
            if self.status.si_code != os.CLD_EXITED:
                exit_code, signal_number = 128 + exit_code, exit_code
        head = (
            f'{{"type":"result","id":{self.id},"outcome":"{"exited" if signal_number is None else "signaled"}",'
            f'"exit_code":{exit_code},"signal":{signal_number or "null"},'
            f'"out_of_memory":{"true" if out_of_memory else "false"},'
            f'"run_ms":{self.ended_ns - self.started_ns}e-6,'
        ).encode()
        return head + read_report(self.reported, MAX_HEADER - len(head))


class Runner:
    def __init__(self, engine, name, channel):
        self._engine = engine  # None when it has ended
        self._engine_name = name
        self._channel = channel
        self._channel_events = select.EPOLLIN
        self._listener = None  # of a vsock
        self._ready_header = b""
        self._machine = Machine()
        self._epoll = select.epoll()
        self._handlers = {}  # by descriptor; called with it, and with what epoll says of it
        self._requests = {"hello": self._hello, "clock": self._clock, "exec": self._exec, "stdin": self._stdin, "cancel": self._cancel}
        self._asleep = False  # no host has been heard of since `ready`
        self._greeted = False
        self._hellos = 0  # the rehearsal's, and that of each host; a restored machine hears of a new one
        self._next = None  # the run whose process waits for code
        self._run = None
        self._last_begun = False  # the host ends the machine when it has the result of this run
        self._postponed = []  # frames for a run whose process is not ready yet
        self._output_paused = False
        self._watch(engine.fileno(), self._on_engine)
        self._watch(channel.descriptor, self._on_channel)
        self._fork()

    @property
    def ready(self):
        return self._next is not None and self._next.ready

    def say_ready(self, host, engine_version):
        """Changes over from the rehearsal's channel to the host's, or to the socket at which the host may come."""
        self._forget(self._channel.descriptor)
        self._asleep, self._greeted = True, False
        self._ready_header = _to_json({
            "type": "ready", "protocol": PROTOCOL, "engine": self._engine_name, "engine_version": engine_version,
            "stdin_on_demand": self._next.listener is not None,
        }).encode()
        if isinstance(host, Channel):
            self._watch(host.descriptor, self._on_channel)
            self._begin(host)
        else:
            self._listener = host
            host.listen(1)  # not before now: until then a host is refused at once, and tries again
            self._watch(host.fileno(), self._on_host)

    def _begin(self, channel):
        self._channel, self._channel_events = channel, select.EPOLLIN
        self._send(self._ready_header)

    # The loop

    def step(self):
        """Waits for something to happen, and sees to it."""
        run = self._run
        deadline = timeout = None
        if run is not None and run.deadline is not None:
            deadline = run.deadline
            timeout = max(0.0, deadline - time.monotonic())
        for descriptor, events in self._epoll.poll(timeout, 16):
            handler = self._handlers.get(descriptor)
            if handler is not None:  # what came before it in the batch may have done away with it
                handler(descriptor, events)
        if deadline is not None and run is self._run and run.deadline == deadline <= time.monotonic():
            self._on_deadline(run)

    def _watch(self, descriptor, handler, events=select.EPOLLIN):
        if descriptor in self._handlers:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def _forget(self, descriptor):
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _close(self, run, descriptor):
        self._forget(descriptor)
        run.descriptors.discard(descriptor)
        run.unended.discard(descriptor)
        os.close(descriptor)

    # The channel

    def _on_host(self, *_):
        """A host has come by vsock. The next one waits until it has gone: a restore resets its connection."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        self._forget(self._listener.fileno())
        channel = Channel(connection.detach(), ends=True)
        self._watch(channel.descriptor, self._on_connection)
        self._begin(channel)

    def _on_connection(self, descriptor, events):
        try:
            frames = self._channel.receive()
        except Gone:
            if self._postponed or self._run is not None and not self._run.answered:
                raise Fatal("the host has gone while its code ran") from None
            self._greeted = self._output_paused = False
            self._forget(descriptor)
            os.close(descriptor)
            self._watch(self._listener.fileno(), self._on_host)
            return
        if self._asleep and frames:
            self._wake()
        for header, body in frames:
            self._take(header, body)
        if events != select.EPOLLIN or self._channel_events != select.EPOLLIN:
            self._flush()

    def _wake(self):
        """At the first sign of a host, mostly after a restore: while it says hello, the process that waits for code goes on
        another CPU through what it is going to do."""
        self._asleep = False
        os.write(self._next.job.descriptor, NO_JOB_YET)

    def _on_channel(self, _, events):
        if self._asleep:
            self._wake()
        gone = events & select.EPOLLHUP != 0
        if gone:
            self._channel.start_anew()
        if events & select.EPOLLIN:
            for header, body in self._channel.receive():
                self._take(header, body)
        if events != select.EPOLLIN or self._channel_events != select.EPOLLIN:
            self._flush(gone)

    def _take(self, header, body):
        handle = self._requests.get(header.get("type"))
        if handle is None:
            return
        try:
            handle(header, body)
        except Refused as reason:
            self._send(_to_json({"type": "error", "message": str(reason)}).encode(), urgent=True)

    def _send(self, header, body=b"", urgent=False):
        self._channel.send(header, body, urgent)
        if self._channel.unsent:
            self._flush()

    def _flush(self, gone=False):
        """Sends what waits for the host, and holds the code's output back as long as too much does.

        A port without a host is always ready, and says so (EPOLLHUP). Edge-triggered, it says so once."""
        channel = self._channel
        channel.flush()
        events = select.EPOLLIN | (select.EPOLLOUT if channel.unsent else 0) | (select.EPOLLET if gone else 0)
        if events != self._channel_events:
            self._channel_events = events
            self._watch(channel.descriptor, self._handlers[channel.descriptor], events)
        pause = channel.unsent > MAX_UNSENT
        if pause != self._output_paused:
            self._output_paused = pause
            if self._run is not None:
                self._watch_output(self._run)

    def _watch_output(self, run):
        for descriptor in (run.stdout, run.stderr):
            if descriptor in run.unended:
                if self._output_paused:
                    self._forget(descriptor)
                else:
                    self._watch(descriptor, self._on_output)

    # Requests

    def _hello(self, header, entropy):
        if header.get("protocol") != PROTOCOL:
            raise Refused(f"hello: this is protocol {PROTOCOL}")
        if not 64 <= len(entropy) <= 4096:
            raise Refused("hello: 64 to 4096 bytes of entropy are needed")
        wall_clock_ns, hostname = header.get("wall_clock_ns"), header.get("hostname")
        machine_id, boot_id = header.get("machine_id"), header.get("boot_id")
        if type(wall_clock_ns) is not int or wall_clock_ns <= 0:
            raise Refused("hello: wall_clock_ns is not a time")
        if type(hostname) is not str or not 0 < len(hostname) <= 64:
            raise Refused("hello: hostname is not a name")
        if type(machine_id) is not str or len(machine_id) != 32:
            raise Refused("hello: machine_id is not 32 hex digits")
        if type(boot_id) is not str or len(boot_id) != 36:
            raise Refused("hello: boot_id is not a UUID")
        self._machine.refresh(wall_clock_ns, entropy, hostname, machine_id, boot_id)
        self._greeted = True
        self._hellos += 1
        self._send(f'{{"type":"hello","protocol":{PROTOCOL},"wall_clock_ns":{time.time_ns()}}}'.encode(), urgent=True)

    def _clock(self, header, _):
        if not self._greeted:
            raise Refused("clock before hello")
        wall_clock_ns = header.get("wall_clock_ns")
        if type(wall_clock_ns) is not int or wall_clock_ns <= 0:
            raise Refused("clock: wall_clock_ns is not a time")
        self._machine.correct_clock(wall_clock_ns)
        self._send(f'{{"type":"clock","wall_clock_ns":{time.time_ns()}}}'.encode(), urgent=True)

    def _exec(self, header, source):
        if not self._greeted:
            raise Refused("exec before hello")
        if self._postponed or self._run is not None and not self._run.answered:
            raise Refused("exec while another one runs")
        if self._last_begun:
            raise Refused("exec after the last one")
        job = make_job(header, source)
        if self._run is not None or not self.ready:
            if self._engine is None:
                raise Refused("exec after the engine has ended")
            self._postponed.append((header, source))
            return
        self._machine.correct_clock(header["wall_clock_ns"])
        run, self._run, self._next = self._next, self._next, None
        self._last_begun = header.get("last") is True
        # The process was perhaps forked before the snapshot was taken: then other clones have the same one.
        run.begin(header["id"], marshal.dumps((run.hello != self._hellos, self._last_begun, *job)))
        self._write(run, run.job)
        if self._output_paused:
            self._watch_output(run)
        if run.listener is None:
            self._want_continuously(run)

    def _stdin(self, header, body):
        run = self._run
        if run is None or header.get("id") != run.id or run.answered:
            return  # it has ended meanwhile
        if len(body) > run.credit:
            raise Refused(f"{len(body)} bytes of stdin against a credit of {run.credit}")
        run.credit = 0  # the host reads once for each grant, and what it has not got by then it may not send later
        if not run.stdin.ending:
            run.stdin.add(body)
            run.stdin.ending = header.get("eof") is True
            if run.stdin.ending and run.listener is not None:
                run.listener.is_satisfied = True
            self._write_stdin(run)

    def _cancel(self, header, _):
        run, grace_ms = self._run, header.get("grace_ms", DEFAULT_GRACE_MS)
        if type(grace_ms) is not int or grace_ms < 0:
            raise Refused("cancel: grace_ms is not a time")
        if self._postponed and header.get("id") == self._postponed[0][0]["id"]:
            self._postponed.append((header, b""))
        elif run is not None and header.get("id") == run.id and run.status is None and not run.answered:
            run.deadline = time.monotonic() + grace_ms / 1000
            interrupt(run.pid)

    # The next run's process

    def _fork(self):
        """Once a host has been served, the process waits on the CPU of this one, and may go anywhere when it has code: under
        emulation, to wake up a CPU takes longer than most of what it is woken up for. Before that, the two go on at the
        same time when the machine has been restored, on two CPUs."""
        cpu = None
        if self._hellos > 1 and self._engine_name not in IN_PLACE:
            cpu = SHARED_CPU
            os.sched_setaffinity(0, {cpu})
        # While this lasts, orphans come to the runner: so the child becomes its own. All others are for init to reap.
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._next = Run(self._engine, self._engine_name in IN_PLACE, self._hellos, cpu)

    def _on_engine(self, *_):
        message, descriptors, _, _ = socket.recv_fds(self._engine, 64, 1)
        what, _, pid = message.partition(b" ")
        run = self._next
        if what == b"child":
            run.arrived(int(pid), *descriptors or [None])
        elif what == b"forked":
            run.forked = True
        elif what == b"failed" or not self._greeted:
            raise Fatal("the engine could not fork a child")  # and has said why
        else:  # what runs may go on, but nothing comes after it
            self._forget(self._engine.fileno())
            self._engine = None
            self._take_postponed()
            return
        if run.ready:
            prctl(PR_SET_CHILD_SUBREAPER, 0)
            self._watch_output(run)
            self._watch(run.report, self._on_report)
            self._watch(run.pidfd, self._on_exit)
            self._watch(run.stdin_opens, self._on_stdin_opened)
            if run.listener is not None:
                self._watch(run.listener.descriptor, self._on_stdin_wanted)
            self._take_postponed()

    def _take_postponed(self):
        postponed, self._postponed = self._postponed, []
        for header, body in postponed:
            self._take(header, body)

    # The run

    def _on_output(self, descriptor, _):
        run = self._run
        data = os.read(descriptor, MAX_OUTPUT)
        if data:
            self._send(run.headers[descriptor], data)
        else:
            self._close(run, descriptor)
        if run.ended_ns is not None:
            self._answer_if_drained(run)

    def _on_report(self, descriptor, _):
        run = self._run
        data = os.read(descriptor, MAX_OUTPUT)
        if data and len(run.reported) < MAX_REPORT:
            run.told(data)
            if run.exit_code is not None:
                run.ended_ns = time.monotonic_ns()
        else:
            self._close(run, descriptor)
        if run.ended_ns is not None:
            self._answer_if_drained(run)

    def _on_exit(self, pidfd, _):
        run = self._run
        if run is None:
            raise Fatal("the process that waited for code has ended")
        run.status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        self._close(run, pidfd)
        if run.ended_ns is None:
            run.ended_ns = time.monotonic_ns()
        if run.in_place and self._engine is not None:  # it has ended with the run
            self._forget(self._engine.fileno())
            self._engine = None
        if not run.answered:
            self._machine.kill_run()  # what it leaves behind, and what may hold its pipes
        run.deadline = time.monotonic() + DRAIN_S
        self._answer_if_drained(run)

    def _answer_if_drained(self, run):
        """Sends the result when all that the code has put out is sent, and clears up when its process has been reaped.

        A process that has said its exit code does nothing more that anybody could see: nobody waits until the kernel
        has taken it apart. Of one that ends in another way the pipes must have ended first."""
        if not run.answered:
            for descriptor in (run.stdout, run.stderr):
                if descriptor in run.unended and (run.exit_code is None or unread(descriptor)):
                    if run.exit_code is not None:
                        self._kill_leftovers(run)  # one of them may write for ever
                    return
            if run.exit_code is None and run.unended:
                return
            killed = run.exit_code is None and run.status.si_code != os.CLD_EXITED and run.status.si_status == signal.SIGKILL
            self._send(run.result(out_of_memory=killed and self._machine.ran_out_of_memory()))
            run.answered = True
            run.deadline = None
            for descriptor in run.descriptors:
                if descriptor != run.pidfd:
                    self._forget(descriptor)
            if run.listener is not None:
                self._forget(run.listener.descriptor)
            if not self._last_begun:  # if it was, all ends with the machine: until then it would be in the way of the host
                self._kill_leftovers(run)
        if run.status is not None or run.has_ended_in_place:
            self._run = None
            for descriptor in list(run.descriptors):
                self._close(run, descriptor)
            if run.listener is not None:
                run.listener.close()
            if self._engine is not None and not self._last_begun:
                self._fork()

    def _kill_leftovers(self, run):
        if run.has_ended_in_place:
            self._machine.kill_all_but(run.pid)
        elif run.status is None:
            self._machine.kill_run()

    def _on_deadline(self, run):
        if run.status is None:  # the grace is over
            run.deadline = None
            self._machine.kill_run()
        elif self._output_paused:  # it is the host that takes its time
            run.deadline = time.monotonic() + DRAIN_S
        else:  # a process has fled from the cgroup, and holds a pipe: nobody waits for it
            for descriptor in list(run.unended):
                self._close(run, descriptor)
            self._answer_if_drained(run)

    def _write(self, run, writer):
        if not writer.write():
            self._watch(writer.descriptor, self._on_writable, select.EPOLLOUT)
        elif writer.ending:
            self._close(run, writer.descriptor)
        elif writer.descriptor in self._handlers:
            self._forget(writer.descriptor)

    def _on_writable(self, descriptor, _):
        run = self._run
        if descriptor == run.stdin.descriptor:
            self._write_stdin(run)
        else:
            self._write(run, run.job)

    # Standard input

    def _write_stdin(self, run):
        self._write(run, run.stdin)
        if run.wants_continuously:
            self._top_up(run)

    def _on_stdin_wanted(self, *_):
        run = self._run
        wanted = run.listener.wanted()
        if wanted == stdin_demand.CONTINUOUSLY:
            self._want_continuously(run)
        elif wanted and not run.stdin.ending:
            missing = min(wanted, MAX_CREDIT) - run.stdin.waiting - unread(run.stdin.descriptor)
            if missing > 0 and not run.credit:
                self._grant(run, missing)

    def _on_stdin_opened(self, descriptor, _):
        run = self._run
        self._close(run, descriptor)
        self._want_continuously(run)

    def _want_continuously(self, run):
        run.wants_continuously = True
        if run.listener is not None:
            run.listener.is_satisfied = True
        self._top_up(run)

    def _top_up(self, run):
        """Keeps the host sending, as long as the code takes what it sends out of the pipe."""
        if not run.stdin.ending and not run.stdin.waiting and not run.credit:
            self._grant(run, MAX_CREDIT)

    def _grant(self, run, size):
        run.credit = size
        self._send(f'{{"type":"stdin-credit","id":{run.id},"bytes":{size}}}'.encode(), urgent=True)


def make_job(header, source):
    """The exec as its process takes it, if it is as the protocol has it."""
    identifier, wall_clock_ns = header.get("id"), header.get("wall_clock_ns")
    mode, filename, argv, env = header.get("mode"), header.get("filename"), header.get("argv"), header.get("env")
    if type(identifier) is not int or identifier <= 0:
        raise Refused("exec: id is not a positive number")
    if type(wall_clock_ns) is not int or wall_clock_ns <= 0:
        raise Refused("exec: wall_clock_ns is not a time")
    if mode != "code" and mode != "script":
        raise Refused("exec: mode is neither code nor script")
    if type(argv) is not list or not argv or type(env) is not dict:
        raise Refused("exec: argv is not a list, or env is not an object")
    for text in (filename, *argv, *env, *env.values()):
        if type(text) is not str or "\0" in text:
            raise Refused("exec: filename, argv and env are made of texts")
    if mode == "script" and filename.rpartition("/")[2] in ("", ".", ".."):
        raise Refused("exec: filename names no file")
    for name in env:
        if not name or "=" in name:
            raise Refused("exec: env has an impossible name")
    return header.get("show_tables") is True, mode, filename, argv, env, header.get("show_result") is True, source


def read_report(data, limit):
    """The last members of a result's header, from what a process has reported of its code. If that is missing or not in
    order (the code can have interfered) there is neither a repr nor an error nor a table."""
    line, _, _ = data.partition(b"\n")
    nothing = b'"result_repr":null,"error":null,"tables":[]}'
    if not line:
        return nothing
    try:
        report = json.loads(line)
        result_repr, error = report["result_repr"], report["error"]
        tables = [read_table(table) for table in report.get("tables", ())]
        size = MAX_TEXT
        while True:
            members = {
                "result_repr": None if result_repr is None else cut(result_repr, size),
                "error": None if error is None else {
                    name: cut(error[name], size) for name in ("type", "message", "traceback")
                },
                "tables": tables,
            }
            if report.get("not_run") is True:
                members["not_run"] = True
            members = _to_json(members).encode()[1:]
            if len(members) <= limit:
                return members
            if tables:
                tables.pop()
            else:
                size //= 2  # four texts of control characters: JSON makes six bytes of each
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return nothing


def read_table(table):
    """What is known of a table, as the protocol has it."""
    name, row_count, preview, error = table["name"], table["row_count"], table["preview"], table["error"]
    return {
        "name": None if name is None else cut(name, MAX_NAME),
        "row_count": None if row_count is None else int(row_count),
        "is_refreshing": bool(table["is_refreshing"]),
        "columns": [{"name": cut(column["name"], MAX_NAME), "type": cut(column["type"], MAX_NAME)} for column in table["columns"]],
        "preview": None if preview is None else cut(preview, MAX_TEXT),
        "error": None if error is None else cut(error, MAX_TEXT),
    }


def cut(text, size):
    """A text within its limit, and without the half characters that UTF-8 does not have."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= size else text[: size - 3] + "..."


def interrupt(pid):
    """What Ctrl-C does: to the code, and to what it waits for."""
    try:
        os.killpg(pid, signal.SIGINT)
    except ProcessLookupError:
        pass


def unread(pipe):
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), "little")


def watch_opens(pipe):
    """Tells when somebody opens a pipe by a name, as /dev/stdin is: the filter on descriptor 0 does not see it read."""
    watch = _libc.inotify_init1(os.O_CLOEXEC)
    if watch < 0 or _libc.inotify_add_watch(watch, b"/proc/self/fd/%d" % pipe, IN_OPEN) < 0:
        raise OSError(ctypes.get_errno(), "inotify on a pipe")
    return watch


def prctl(option, value):
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def open_port():
    """The virtio port that leads to the host. There is no udev: its name is in sysfs only, a moment after the device."""
    ports = "/sys/class/virtio-ports"
    deadline = time.monotonic() + DEVICE_WAIT_S
    while time.monotonic() < deadline:
        for port in os.listdir(ports) if os.path.isdir(ports) else ():
            try:
                with open(f"{ports}/{port}/name") as file:
                    if file.read().strip() == PORT_NAME:
                        return os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                pass
        time.sleep(0.01)
    raise Fatal(f"no virtio port is named {PORT_NAME}")


def open_vsock():
    """The socket at which the host may come, when there is a vsock that leads to it."""
    cid = bytearray(4)
    deadline = time.monotonic() + DEVICE_WAIT_S
    with open("/dev/vsock", "rb") as device:
        while fcntl.ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, cid) or int.from_bytes(cid, "little") == socket.VMADDR_CID_ANY:
            if time.monotonic() > deadline:
                raise Fatal("this machine has no vsock device")
            time.sleep(0.01)
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
    return listener


def start_engine(name):
    """Returns the socket by which it is spoken to. It is an ordinary interpreter, not `python -I`: code sees its flags."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # python asks of its standard streams what they are when it starts: as in a run, they are pipes.
    source, sink = os.pipe()
    places = ((source, 0), (sink, 1), (sink, 2), (its.fileno(), ENGINE_CONTROL))  # in this order: one may be at 3
    os.posix_spawn(
        PYTHON, [PYTHON, f"{sys.path[0]}/engine_{name}.py"], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, place) for descriptor, place in places],
    )
    for descriptor in (its.detach(), source, sink):
        os.close(descriptor)
    return ours


def rehearse(runner, host):
    """A session with a host of the runner's own: after it, everything that a run needs is in memory."""

    def converse(header, body, answer):
        host.send(json.dumps(header).encode(), body)
        while True:
            runner.step()
            for received, _ in host.receive():
                if received["type"] == "stdin-credit":
                    host.send(b'{"type":"stdin","id":%d,"eof":true}' % received["id"], b"input\n")
                if received["type"] == answer:
                    return received
                if received["type"] == "error":
                    raise Fatal(f"the rehearsal failed: {received}")

    identity = {"hostname": "localhost", "machine_id": "0" * 32, "boot_id": "00000000-0000-0000-0000-000000000000"}
    converse({"type": "hello", "protocol": PROTOCOL, "wall_clock_ns": time.time_ns(), **identity}, bytes(64), "hello")
    source = b"import sys\nprint(input(), file=sys.stderr)\nprint('output')\n'result'"
    for mode, filename in (("code", "<string>"), ("script", "rehearsal.py")) * 2:
        request = {"id": 1, "mode": mode, "filename": filename, "argv": ["-c"], "env": {"REHEARSAL": "1"}}
        result = converse({"type": "exec", "wall_clock_ns": time.time_ns(), "show_result": True, "show_tables": True, **request}, source, "result")
        if result["exit_code"] != 0:
            raise Fatal(f"the rehearsal failed: {result}")
    os.unlink("/workspace/rehearsal.py")
    while not runner.ready:
        runner.step()


def main():
    with open(SETTINGS) as file:
        name = json.load(file)["engine"]
    engine = start_engine(name)
    host = open_vsock() if sys.argv[1:] == ["vsock"] else Channel(open_port())
    what, _, version = engine.recv(64).decode().partition(" ")
    if what != "ready":
        raise Fatal("the engine has ended before it was ready")  # and has said why
    near, far = socket.socketpair()
    runner = Runner(engine, name, Channel(near.detach()))
    rehearse(runner, Channel(far.detach()))
    gc.collect()
    gc.freeze()  # the collector leaves what is there alone, and so its pages
    runner.say_ready(host, version)
    while True:
        runner.step()


if __name__ == "__main__":
    try:
        main()
    except (Fatal, Malformed) as reason:
        sys.exit(f"dh runner: {reason}")
