"""The runner: supervises all that runs in the microVM, and speaks the guest protocol (docs/guest-protocol.md).

    init ─ runner ─┬─ engine    warm; forks children, and runs none of the user's code itself
                   └─ child     forked in advance; runs the code of one exec

One thread, one loop, and nothing waits but the loop. What is done before `ready` is in the snapshot, what is done after it
is what somebody waits for: so all that can be done early is, and execs are rehearsed, from the first frame to the last,
before the runner says `ready`.
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
from channel import Channel, Malformed  # noqa: E402
from machine import Machine  # noqa: E402

PROTOCOL = 1
PORT_NAME = "dh.channel"
PORT_WAIT_S = 10
PYTHON = "/usr/bin/python3"
ENGINE = "python"
ENGINE_CONTROL = 3  # the descriptor by which an engine knows its runner

MAX_OUTPUT = 65_536  # bytes of one stdout or stderr frame
MAX_CREDIT = 65_536
MAX_UNSENT = 262_144  # bytes; beyond them the code's output is not read, and the code waits for the host
MAX_HEADER = 1_048_576
MAX_TEXT = 65_536  # characters of a text in a result
MAX_REPORT = 4_194_304  # bytes; more than four such texts can take in JSON
DEFAULT_GRACE_MS = 2_000
DRAIN_S = 2.0  # for the pipes to end once all of a run's processes have been killed

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
IN_OPEN = 0x20  # linux/inotify.h

_libc = ctypes.CDLL(None, use_errno=True)
_to_json = json.JSONEncoder(ensure_ascii=False).encode


class Fatal(Exception):
    """The machine is of no use any more."""


class Refused(Exception):
    """A request that cannot be taken; the sandbox stays usable."""


def require(condition, otherwise):
    if not condition:
        raise Refused(otherwise)


class Writer:
    """What waits to go into a pipe."""

    def __init__(self, descriptor):
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.waiting = bytearray()
        self.ending = False  # nothing follows what waits

    def write(self):
        """Writes what the pipe takes now. Returns whether nothing is left."""
        try:
            while self.waiting:
                del self.waiting[: os.write(self.descriptor, self.waiting)]
        except BlockingIOError:
            return False
        except BrokenPipeError:  # nobody is left to read it
            self.waiting.clear()
            self.ending = True
        return True


class Run:
    """One exec: from the fork of its process, long before its code is known, to its result."""

    def __init__(self, engine):
        """Has the engine fork its process."""
        stdin, to_stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        job, to_job = os.pipe()
        self.report, report = os.pipe()
        self.stdin_opens = watch_opens(stdin)
        theirs = (stdin, stdout, stderr, job, report)
        socket.send_fds(engine, [b"fork"], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.stdin, self.job = Writer(to_stdin), Writer(to_job)
        self.forked = False
        self.pid = self.pidfd = self.listener = None
        self.descriptors = {to_stdin, to_job, self.stdout, self.stderr, self.report, self.stdin_opens}
        self.unended = {self.stdout, self.stderr, self.report}  # what has to end before the run has

        self.id = self.started_ns = None
        self.headers = {}  # of the frames for what comes out of stdout and stderr
        self.credit = 0  # bytes that the host may still send
        self.wants_continuously = False
        self.reported = bytearray()
        self.deadline = None  # of a cancel's grace; then of the pipes' end
        self.status = self.ended_ns = None

    def arrived(self, pid, listener):
        """The process is ready, and has told what it is known by."""
        self.pid, self.pidfd = pid, os.pidfd_open(pid)
        self.descriptors.add(self.pidfd)
        if listener is not None:
            self.listener = stdin_demand.Listener(listener, self.stdin.descriptor)
            self.descriptors.add(listener)

    @property
    def ready(self):
        return self.forked and self.pid is not None

    def begin(self, identifier, job):
        self.started_ns = time.monotonic_ns()
        self.id = identifier
        self.headers = {
            self.stdout: b'{"type":"stdout","id":%d}' % identifier,
            self.stderr: b'{"type":"stderr","id":%d}' % identifier,
        }
        self.job.waiting += len(job).to_bytes(4, "little") + job
        self.job.ending = True

    def result(self, out_of_memory):
        """The header of the result's frame."""
        exited = self.status.si_code == os.CLD_EXITED
        result_repr, error = read_report(self.reported)
        result = {
            "type": "result",
            "id": self.id,
            "outcome": "exited" if exited else "signaled",
            "exit_code": self.status.si_status if exited else 128 + self.status.si_status,
            "signal": None if exited else self.status.si_status,
            "out_of_memory": out_of_memory,
            "result_repr": result_repr,
            "error": error,
            "run_ms": (self.ended_ns - self.started_ns) / 1e6,
            "tables": [],
        }
        header = _to_json(result).encode()
        limit = MAX_TEXT
        while len(header) > MAX_HEADER:  # four texts of control characters: JSON makes six bytes of each
            limit //= 2
            result["result_repr"] = result_repr and cut(result_repr, limit)
            result["error"] = error and {name: cut(text, limit) for name, text in error.items()}
            header = _to_json(result).encode()
        return header


class Runner:
    def __init__(self, engine, channel):
        self._engine = engine  # None when it has ended
        self._channel = channel
        self._channel_events = select.EPOLLIN
        self._machine = Machine()
        self._epoll = select.epoll()
        self._handlers = {}  # by descriptor; called with it, and with what epoll says of it
        self._requests = {"hello": self._hello, "exec": self._exec, "stdin": self._stdin, "cancel": self._cancel}
        self._greeted = False
        self._next = None  # the run whose process waits for code
        self._run = None
        self._postponed = []  # frames for a run whose process is not ready yet
        self._output_paused = False
        self._watch(engine.fileno(), self._on_engine)
        self._watch(channel.descriptor, self._on_channel)
        self._fork()

    @property
    def ready(self):
        return self._next is not None and self._next.ready

    def say_ready(self, channel, engine_version):
        """Changes over from the rehearsal's channel to the host's."""
        self._forget(self._channel.descriptor)
        self._channel = channel
        self._greeted = False
        self._watch(channel.descriptor, self._on_channel)
        self._send({
            "type": "ready", "protocol": PROTOCOL, "engine": ENGINE, "engine_version": engine_version,
            "stdin_on_demand": self._next.listener is not None,
        })

    # The loop

    def step(self):
        """Waits for something to happen, and sees to it."""
        deadline = None if self._run is None else self._run.deadline
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        for descriptor, events in self._epoll.poll(timeout, 16):
            handler = self._handlers.get(descriptor)
            if handler is not None:  # what came before it in the batch may have done away with it
                handler(descriptor, events)
        if deadline is not None and time.monotonic() >= deadline:
            self._on_deadline()

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

    def _on_channel(self, _, events):
        gone = bool(events & select.EPOLLHUP)
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
            self._send({"type": "error", "message": str(reason)}, urgent=True)

    def _send(self, header, body=b"", urgent=False):
        self._channel.send(header if isinstance(header, bytes) else _to_json(header).encode(), body, urgent)
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
            self._watch(channel.descriptor, self._on_channel, events)
        pause = channel.unsent > MAX_UNSENT
        if pause != self._output_paused:
            self._output_paused = pause
            if self._run is not None:
                self._watch_output(self._run)

    def _watch_output(self, run):
        for descriptor in run.headers.keys() & run.unended:
            if self._output_paused:
                self._forget(descriptor)
            else:
                self._watch(descriptor, self._on_output)

    # Requests

    def _hello(self, header, entropy):
        require(header.get("protocol") == PROTOCOL, f"hello: this is protocol {PROTOCOL}")
        wall_clock_ns, hostname = header.get("wall_clock_ns"), header.get("hostname")
        machine_id, boot_id = header.get("machine_id"), header.get("boot_id")
        require(is_whole(wall_clock_ns, 1), "hello: wall_clock_ns is not a time")
        require(isinstance(hostname, str) and 0 < len(hostname) <= 64 and hostname.isascii(), "hello: hostname is no name")
        require(is_hex(machine_id, (32,)), "hello: machine_id is not 32 hex digits")
        require(is_hex(boot_id, (8, 4, 4, 4, 12)), "hello: boot_id is not a UUID")
        require(64 <= len(entropy) <= 4096, f"hello: {len(entropy)} bytes of entropy, not 64 to 4096")
        self._machine.become(wall_clock_ns, entropy, hostname, machine_id, boot_id)
        self._greeted = True
        self._send({"type": "hello", "protocol": PROTOCOL, "wall_clock_ns": time.time_ns()}, urgent=True)

    def _exec(self, header, source):
        require(self._greeted, "exec before hello")
        require(self._run is None and not self._postponed, "exec while another one runs")
        job = make_job(header, source)
        if not self.ready:
            require(self._engine is not None, "exec after the engine has ended")
            self._postponed.append((header, source))
            return
        self._machine.correct_clock(header["wall_clock_ns"])
        run, self._run, self._next = self._next, self._next, None
        run.begin(header["id"], job)
        self._write(run.job)
        if self._output_paused:
            self._watch_output(run)
        if run.listener is None:
            self._want_continuously()

    def _stdin(self, header, body):
        run = self._run
        if run is None or header.get("id") != run.id:
            return  # it has ended meanwhile
        require(len(body) <= run.credit, f"{len(body)} bytes of stdin against a credit of {run.credit}")
        run.credit -= len(body)
        if not run.stdin.ending:
            run.stdin.waiting += body
            run.stdin.ending = header.get("eof") is True
            self._write_stdin()

    def _cancel(self, header, _):
        run, grace_ms = self._run, header.get("grace_ms", DEFAULT_GRACE_MS)
        require(is_whole(grace_ms, 0), "cancel: grace_ms is not a time")
        if self._postponed and header.get("id") == self._postponed[0][0]["id"]:
            self._postponed.append((header, b""))
        elif run is not None and header.get("id") == run.id and run.status is None:
            run.deadline = time.monotonic() + grace_ms / 1000
            interrupt(run.pid)

    # The next run's process

    def _fork(self):
        # While this lasts, orphans come to the runner: so the child becomes its own. All others are for init to reap.
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._next = Run(self._engine)

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
        else:  # what is running may go on; the next exec is refused
            self._forget(self._engine.fileno())
            self._engine = None
            self._take_postponed()
            return
        if run.ready:
            prctl(PR_SET_CHILD_SUBREAPER, 0)
            for descriptor in (run.stdout, run.stderr):
                self._watch(descriptor, self._on_output)
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
        data = os.read(descriptor, MAX_OUTPUT)
        if data:
            self._send(self._run.headers[descriptor], data)
        else:
            self._on_end(descriptor)

    def _on_report(self, descriptor, _):
        data = os.read(descriptor, MAX_OUTPUT)
        if data and len(self._run.reported) <= MAX_REPORT:
            self._run.reported += data
        else:
            self._on_end(descriptor)

    def _on_end(self, descriptor):
        self._close(self._run, descriptor)
        self._finish_if_over()

    def _on_exit(self, pidfd, _):
        run = self._run
        if run is None:
            raise Fatal("the child that waited for code has ended")
        run.ended_ns = time.monotonic_ns()
        run.status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        self._close(run, pidfd)
        self._machine.kill_run()  # what it leaves behind, and what may hold its pipes
        run.deadline = time.monotonic() + DRAIN_S
        self._finish_if_over()

    def _on_deadline(self):
        run = self._run
        if run is None or run.deadline is None:
            return
        if run.status is None:  # the grace is over
            run.deadline = None
            self._machine.kill_run()
        elif self._output_paused:  # it is the host that takes its time
            run.deadline = time.monotonic() + DRAIN_S
        else:  # a process has fled from the cgroup, and holds a pipe: nobody waits for it
            for descriptor in list(run.unended):
                self._close(run, descriptor)
            self._finish_if_over()

    def _finish_if_over(self):
        run = self._run
        if run.status is None or run.unended:
            return
        killed = run.status.si_code != os.CLD_EXITED and run.status.si_status == signal.SIGKILL
        self._send(run.result(out_of_memory=killed and self._machine.ran_out_of_memory()))
        self._run = None
        for descriptor in list(run.descriptors):
            self._close(run, descriptor)
        if self._engine is not None:
            self._fork()

    def _write(self, writer):
        if not writer.write():
            self._watch(writer.descriptor, self._on_writable, select.EPOLLOUT)
        elif writer.ending:
            self._close(self._run, writer.descriptor)
        else:
            self._forget(writer.descriptor)

    def _on_writable(self, descriptor, _):
        if descriptor == self._run.stdin.descriptor:
            self._write_stdin()
        else:
            self._write(self._run.job)

    # Standard input

    def _write_stdin(self):
        self._write(self._run.stdin)
        if self._run.wants_continuously:
            self._top_up()

    def _on_stdin_wanted(self, *_):
        run = self._run
        wanted = run.listener.wanted()
        if wanted == stdin_demand.CONTINUOUSLY:
            self._want_continuously()
        elif wanted and not run.stdin.ending and not run.wants_continuously:
            self._grant(min(wanted, MAX_CREDIT) - run.credit - len(run.stdin.waiting) - unread(run.stdin.descriptor))

    def _on_stdin_opened(self, descriptor, _):
        self._close(self._run, descriptor)
        self._want_continuously()

    def _want_continuously(self):
        self._run.wants_continuously = True
        self._top_up()

    def _top_up(self):
        """Keeps the host sending, as long as the code takes what it sends out of the pipe."""
        run = self._run
        if not run.stdin.ending and not run.stdin.waiting and run.credit < MAX_CREDIT // 2:
            self._grant(MAX_CREDIT - run.credit)

    def _grant(self, size):
        if size > 0:
            self._run.credit += size
            self._send({"type": "stdin-credit", "id": self._run.id, "bytes": size}, urgent=True)


def is_whole(value, least):
    return type(value) is int and least <= value < 2**63


def is_hex(text, group_sizes):
    return isinstance(text, str) and text.isascii() and all(map(str.isalnum, text.split("-"))) and (
        tuple(map(len, text.split("-"))) == group_sizes and set(text.lower()) <= set("0123456789abcdef-")
    )


def make_job(header, source):
    """The exec as its process takes it, if it is as the protocol has it."""
    mode, filename, argv, env = header.get("mode"), header.get("filename"), header.get("argv"), header.get("env")
    require(is_whole(header.get("id"), 1), "exec: id is not positive")
    require(is_whole(header.get("wall_clock_ns"), 1), "exec: wall_clock_ns is not a time")
    require(mode in ("code", "script"), "exec: mode is neither code nor script")
    require(is_text(filename), "exec: filename is no text")
    require(mode == "code" or os.path.basename(filename) not in ("", ".", ".."), "exec: filename names no file")
    require(isinstance(argv, list) and argv and all(map(is_text, argv)), "exec: argv is not a list of texts")
    require(isinstance(env, dict) and all(map(is_text, env.values())), "exec: env is not an object of texts")
    require(all(is_text(name) and name and "=" not in name for name in env), "exec: env has an impossible name")
    show_result = header.get("show_result") is True
    return marshal.dumps((mode, filename, argv, env, show_result, source))


def is_text(value):
    return isinstance(value, str) and "\0" not in value


def read_report(data):
    """The repr and the error that a process has reported: of a report that is missing or not in order, neither. The
    code can have interfered."""
    try:
        report = json.loads(data)
        result_repr, error = report["result_repr"], report["error"]
        if error is not None:
            error = {name: cut(error[name]) for name in ("type", "message", "traceback")}
        return None if result_repr is None else cut(result_repr), error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, None


def cut(text, limit=MAX_TEXT):
    """A text within its limit, and without the half characters that are no UTF-8."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def interrupt(pid):
    """What Ctrl-C does: to the code, and to what it waits for."""
    try:
        os.killpg(pid, signal.SIGINT)
    except ProcessLookupError:
        pass


def unread(pipe):
    """How many bytes wait in a pipe."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


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
    deadline = time.monotonic() + PORT_WAIT_S
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


def start_engine():
    """Returns the socket by which it is spoken to. It has one of its own interpreter: an ordinary one, not `python -I`."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # python asks of its standard streams what they are when it starts: as in a run, they are pipes.
    source, sink = os.pipe()
    places = ((source, 0), (sink, 1), (sink, 2), (its.fileno(), ENGINE_CONTROL))
    os.posix_spawn(
        PYTHON, [PYTHON, f"{sys.path[0]}/engine_{ENGINE}.py"], os.environ,
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

    identity = {"hostname": "localhost", "machine_id": "0" * 32, "boot_id": "00000000-0000-0000-0000-000000000000"}
    converse({"type": "hello", "protocol": PROTOCOL, "wall_clock_ns": time.time_ns(), **identity}, bytes(64), "hello")
    source = b"import sys\nprint(input(), file=sys.stderr)\nprint('output')\n'result'"
    for mode, filename in (("code", "<string>"), ("script", "rehearsal.py")) * 2:
        request = {"id": 1, "mode": mode, "filename": filename, "argv": ["-c"], "env": {"REHEARSAL": "1"}}
        result = converse({"type": "exec", "wall_clock_ns": time.time_ns(), "show_result": True, **request}, source, "result")
        if result["exit_code"] != 0:
            raise Fatal(f"the rehearsal failed: {result}")
    os.unlink("/workspace/rehearsal.py")
    while not runner.ready:
        runner.step()


def main():
    engine = start_engine()
    channel = Channel(open_port())
    what, _, version = engine.recv(64).decode().partition(" ")
    if what != "ready":
        raise Fatal("the engine has ended before it was ready")  # and has said why
    near, far = socket.socketpair()
    runner = Runner(engine, Channel(near.detach()))
    rehearse(runner, Channel(far.detach()))
    runner.say_ready(channel, version)
    gc.collect()
    gc.freeze()  # the collector leaves what is there alone, and so its pages
    while True:
        runner.step()


if __name__ == "__main__":
    try:
        main()
    except (Fatal, Malformed) as reason:
        sys.exit(f"dh runner: {reason}")
