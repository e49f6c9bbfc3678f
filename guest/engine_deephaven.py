"""The engine of the `deephaven` template: a Deephaven server and the interpreter that it lives in.

A process with a JVM in it must not fork, so code runs in place: in this process, one exec after the other, each in a
namespace of its own. To the runner it looks as with the python engine (engine_python.py): for each run this engine is
sent descriptors, and answers with a process id and a stdin listener; but the process id is its own, and the process is
there for the next run as well, unless the code ends it.
"""

import ctypes
import gc
import glob
import inspect
import json
import marshal
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types

sys.path[0] = os.path.dirname(os.path.abspath(__file__))
import stdin_demand  # noqa: E402
from execution import (  # noqa: E402
    EXIT_INTERRUPTED, EXIT_NOT_RUN, WORKSPACE, NotRun, Rehearsal, Report, RestoreHook, cut, failure, flush, keep_private,
    log, look_up_generators, new_main_module, read_message, release_globals, reseed, run, write,
)
from java_random import JVM_ARGUMENTS, JavaRandom  # noqa: E402

CONTROL = 3
SETTINGS = "/usr/lib/dh/engine.json"
WARM_UP = "/usr/lib/dh/warmup.py"
RESTORE = "/usr/lib/dh/restore.py"
RUN_CGROUP = "/sys/fs/cgroup/run/cgroup.procs"
PORT = 10_000  # inside the guest, which has no network but its loopback interface
EXIT_FLUSH_FAILED = 120
PREVIEW_ROWS = 10
MAX_TABLES = 100
WARM_UP_ROUNDS = 25
MAX_PREVIEW = 16_384  # characters
REHEARSALS = 140  # with the template's 1600 calls until a method is compiled: what a run calls 12 times or more
TABLE_CODE = b"from deephaven import empty_table\nt = empty_table(5).update(['x = i'])\nprint(t.to_string())\nt"
SETTLING_ROUNDS = 3  # Python's object, the JVM's, and what that has held
HURRIED_CYCLE_MS, HURRY_TIME = 10, 5  # of the update graph, and seconds: some hundred cycles
UPDATE_CYCLE = 1.5  # seconds; the update graph's is one
QUIET_TIME, MAX_QUIET_WAIT = 15, 90  # seconds without a compilation, and for it to come

_libc = ctypes.PyDLL(None)
_stdout, _stderr = sys.stdout, sys.stderr
_system_path = sys.path[1:]


class Engine:
    def __init__(self, control, settings):
        self._control = control
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._listener = None
        start_server(settings["jvm_args"])
        import deephaven
        import jpy

        self._names = {name: getattr(deephaven, name) for name in deephaven.__all__}
        self._names["deephaven"] = deephaven
        self._jpy, self._deephaven = jpy, deephaven
        self._table_type = deephaven.table.Table
        self._system = jpy.get_type("java.lang.System")
        self._compilation = jpy.get_type("java.lang.management.ManagementFactory").getCompilationMXBean()
        self._java_random = JavaRandom()
        self.version = deephaven.__version__
        self._environment = dict(os.environ)
        look_at_frames_only()

    def warm_up(self):
        with open(WARM_UP, "rb") as file:
            code = compile(file.read(), WARM_UP, "exec", dont_inherit=True)
        namespace = {**self._names, "__name__": "__warmup__", "__file__": WARM_UP}
        exec(code, namespace)
        self._restore_hook = RestoreHook(RESTORE, namespace)
        sys.stdout.flush()
        # A table that ticks is shown another way than those of the warm-up.
        ticking = self._names["time_table"]("PT1S")
        for _ in range(WARM_UP_ROUNDS):
            describe("x", ticking)
        del ticking
        self._hurry_updates()
        self._rehearse()
        self._settle()
        look_up_generators()
        self._reseed()

    def _settle(self):
        """Lets the JVM drop what the warm-up has left. A table that ticks would, in each restored machine, make up for all the time since.

        Then waits for a time without compilations."""
        for _ in range(SETTLING_ROUNDS):
            gc.collect()
            self._system.gc()
            time.sleep(UPDATE_CYCLE)
        quiet_since = start = time.monotonic()
        last = self._compilation.getTotalCompilationTime()
        while (now := time.monotonic()) - quiet_since < QUIET_TIME and now - start < MAX_QUIET_WAIT:
            time.sleep(1)
            total = self._compilation.getTotalCompilationTime()
            if total != last:
                last, quiet_since = total, time.monotonic()

    def _hurry_updates(self):
        """Has the update graph go round some hundred times, which it does once in a second. What it calls most, the JVM would
        compile after some minutes otherwise, and in each restored machine if the snapshot was taken just before: that takes
        an emulated one 0.3 s of a processor, and 30 MiB."""
        try:
            graph = self._jpy.cast(
                self._deephaven.execution_context.get_exec_ctx().update_graph.j_update_graph,
                self._jpy.get_type("io.deephaven.engine.updategraph.impl.PeriodicUpdateGraph"),
            )
            graph.setTargetCycleDurationMillis(HURRIED_CYCLE_MS)
        except Exception:  # a version whose update graph is another
            log(f"the update graph keeps its pace\n{traceback.format_exc()}")
            return
        time.sleep(HURRY_TIME)
        graph.resetTargetCycleDuration()

    def _rehearse(self):
        """Goes through whole runs, until the JVM has compiled what a run calls often. In a run, the compiler of an emulated
        machine would take a processor for longer than the code does; what a run calls a few times, it is to interpret."""
        with Rehearsal() as rehearsal:
            for _ in range(REHEARSALS):
                rehearsal.run(TABLE_CODE, self._repr, self._tables)
        self._value = None

    def serve(self):
        """One run."""
        _, descriptors, _, _ = socket.recv_fds(self._control, 16, 5)
        if not descriptors:
            sys.exit()  # the runner has ended
        jobs, report = self._get_ready(*descriptors)
        self._java_random.look_around()
        self._reseed()  # for good if the host has said hello
        rehearsal = Rehearsal()
        listeners = [] if self._listener is None else [self._listener]
        socket.send_fds(self._control, [b"child %d" % os.getpid()], listeners)
        self._control.send(b"forked")
        module = self._new_namespace()
        code, result_repr, error, not_run, is_last, tables = EXIT_INTERRUPTED, None, None, False, False, []
        try:
            while not (job := read_message(jobs)):
                rehearsal.run_once()
                self._reseed()  # for practice: the kernel may not have its entropy yet
            is_copy, is_last, show_tables, *job = marshal.loads(job)
            if is_copy:
                self._reseed()
            self._restore_hook.run()
            code, result_repr, error = self._run(module, *job)
            if show_tables:
                tables = self._tables(module)
            code = self._end(code)
        except NotRun as reason:
            _, _, error = failure(reason.__cause__)
            code, not_run = EXIT_NOT_RUN, True
            flush(sys.stderr)
        except BaseException as interrupt:  # a cancel that came before the code or behind it
            code, result_repr, error = failure(interrupt)
            flush(sys.stderr)
        if result_repr is not None or error is not None or tables:
            report.send(json.dumps({"result_repr": result_repr, "error": error, "not_run": not_run, "tables": tables}).encode())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the next run
        self._leave()
        report.send(b"\n" + bytes((code,)))
        if is_last:
            _libc.pause()  # with the interpreter's lock: no thread of the code goes on; the host ends the machine
        report.close()
        os.close(jobs)
        self._clear(module)

    def _get_ready(self, stdin, stdout, stderr, jobs, report):
        for descriptor, source in enumerate((stdin, stdout, stderr)):
            os.dup2(source, descriptor)
            os.close(source)
        jobs, report = keep_private(jobs), Report(keep_private(report))
        os.chdir(WORKSPACE)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._listener is None:
            write("/proc/self/oom_score_adj", "0")
            write(RUN_CGROUP, "0")
            listener = stdin_demand.install()
            self._listener = None if listener is None else keep_private(listener)
        return jobs, report

    def _new_namespace(self):
        """The main module of a run: it starts the same each time, with the names that Deephaven offers in its console."""
        module = new_main_module()
        module.__dict__.update(self._names)
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = _stdout, _stderr
        sys.path[:] = ["", *_system_path]
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        return module

    def _run(self, module, mode, filename, argv, env, show_result, source):
        """As `run`, but the value of a last expression that is a table comes as one."""
        self._value = None
        if not show_result:
            return run(module, mode, filename, argv, env, False, source)
        return run(module, mode, filename, argv, env, True, source, self._repr)

    def _repr(self, value):
        if isinstance(value, self._table_type):
            self._value = value
            return None
        return repr(value)

    def _tables(self, module):
        """The tables that the code has assigned, in the order of assignment, and that of its last expression."""
        found = [
            (name, value) for name, value in module.__dict__.items()
            if isinstance(value, self._table_type) and not name.startswith("_")
        ]
        if self._value is not None and all(value is not self._value for _, value in found):
            found.append((None, self._value))
        return [describe(name, table) for name, table in found[:MAX_TABLES]]

    def _end(self, code):
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon and not _is_javas(thread):
                thread.join()
        return code if flush(sys.stdout) and flush(sys.stderr) and flush(_stdout) else EXIT_FLUSH_FAILED

    def _leave(self):
        """Lets go of the run's pipes: they end when nobody else holds them."""
        _libc.fflush(None)
        for descriptor in (0, 1, 2):
            os.dup2(self._null, descriptor)

    def _clear(self, module):
        self._value = None
        sys.modules["__main__"] = module
        try:
            release_globals(module)
        except BaseException:
            log(f"what a run left behind could not be cleared\n{traceback.format_exc()}")
        sys.argv = [""]

    def _reseed(self):
        reseed()
        self._java_random.reseed()


def start_server(jvm_args):
    java = sorted(glob.glob("/usr/lib/jvm/java-*-openjdk-amd64"))
    if not java:
        raise RuntimeError("the template's packages bring no Java: add openjdk-17-jre-headless to them")
    os.environ.setdefault("JAVA_HOME", java[-1])
    from deephaven_server import Server

    Server(host="localhost", port=PORT, jvm_args=[*jvm_args, *JVM_ARGUMENTS]).start()
    sys.stdout, sys.stderr = _stdout, _stderr  # the server has put its own in their place, which write to its log as well


def look_at_frames_only():
    """Each table operation looks for the frame that has called it, and has `inspect` look for the source of all of them
    (deephaven/_query_scope.py; before, deephaven/table.py), which it does not want: files are read, and 900 modules gone
    through for code that is in none. That would take a guest 60 ms in the first operation, and 20 in each of the others."""
    frames_only = types.SimpleNamespace(**{**vars(inspect), "getouterframes": outer_frames})
    for name in ("deephaven._query_scope", "deephaven.table"):
        module = sys.modules.get(name)
        if getattr(module, "inspect", None) is inspect:
            module.inspect = frames_only


def outer_frames(frame, context=1):
    """As `inspect.getouterframes`, but without source."""
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


def describe(name, table):
    """What is shown of a table. One that cannot be shown says so, and is no failure of the code."""
    about = {"name": name, "row_count": None, "is_refreshing": None, "columns": [], "preview": None, "error": None}
    try:
        about["is_refreshing"] = bool(table.is_refreshing)
        about["columns"] = columns_of(table)
        head = table.head(PREVIEW_ROWS)
        if about["is_refreshing"]:
            head = head.snapshot()
        about["row_count"] = int(table.size)
        about["preview"] = head.to_string(PREVIEW_ROWS)[:MAX_PREVIEW] if about["columns"] else ""
    except Exception as error:
        about["error"] = cut(str(error) or type(error).__name__)
    return about


def columns_of(table):
    definition = table.j_table.getDefinition()
    # Before 0.37 an array came of getColumns.
    columns = definition.getColumnsArray() if hasattr(definition, "getColumnsArray") else definition.getColumns()
    return [{"name": column.getName(), "type": column.getDataType().getSimpleName()} for column in columns]


def _is_javas(thread):
    return isinstance(thread, threading._DummyThread)


def main():
    control = socket.socket(fileno=CONTROL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.setsid()
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(WORKSPACE)
    try:
        with open(SETTINGS) as file:
            settings = json.load(file)
        engine = Engine(control, settings)
        engine.warm_up()
    except BaseException:
        log(f"the engine could not be started\n{traceback.format_exc()}")
        sys.exit(1)
    for name in ("execution", "java_random", "stdin_demand"):  # the names are the code's again
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    control.send(b"ready " + engine.version.encode())
    while True:
        engine.serve()


main()
