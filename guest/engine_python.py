"""The engine of the `python` template: a warm interpreter, forked once for each run.

The runner starts it with one end of a socket pair as descriptor 3. It runs the template's warm-up, says `ready VERSION`,
and then forks a child whenever it is sent the descriptors for one. The child gets ready to the last detail, hands over its
process id and its stdin listener, and waits for its job in a read: forked before the snapshot, it runs code right after
the restore.

The child is forked twice, so that it becomes the runner's own: when it ends, the kernel tells the runner, and no process
has to be woken to pass that on.
"""

import ast
import atexit
import builtins
import ctypes
import fcntl
import gc
import importlib.machinery
import json
import linecache
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

CONTROL = 3
WARM_UP = "/usr/lib/dh/warmup.py"
WORKSPACE = "/workspace"
RUN_CGROUP = "/sys/fs/cgroup/run/cgroup.procs"
PRIVATE_DESCRIPTOR = 1000  # where the child keeps what is not the code's: above what code opens, below the soft limit
MAX_TEXT = 65_536  # characters of a text in the report
EXIT_FLUSH_FAILED = 120  # as python itself ends when its standard output cannot be flushed
EXIT_INTERRUPTED = 130
CODE = "<string>"  # what tracebacks call the code that has no file

_libc = ctypes.PyDLL(None)  # holds on to the interpreter's lock: other threads do not come in between
_stdout = sys.stdout
_bare_modules = None  # how many there are in an interpreter that nothing has been done with; None if something has


def main():
    control = socket.socket(fileno=CONTROL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # they were pipes while python made its streams of them; the warm-up talks to nobody
        os.dup2(null, descriptor)
    os.close(null)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(WORKSPACE)
    try:
        warm_up()
    except BaseException:
        log(f"the warm-up failed\n{traceback.format_exc()}")
        sys.exit(1)
    gc.collect()
    gc.freeze()  # a child's collector leaves these objects alone, and so their pages
    control.send(b"ready " + sys.version.split()[0].encode())
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 16, 5)
        if not descriptors:
            return  # the runner has ended
        fork_child(control, descriptors)


def warm_up():
    global _bare_modules
    with Rehearsal() as rehearsal:
        for source in (
            b"print('output')\n[len('value')]",
            b"def f(): 1 / 0\ntry: f()\nexcept Exception as e: raise ValueError('text') from e",
            b"value = 1",
            b"1 +",
            b"raise SystemExit('text')",
        ):
            rehearsal.run(source)
    del sys.modules["stdin_demand"]  # the name is the code's again
    if os.path.exists(WARM_UP):
        with open(WARM_UP, "rb") as file:
            code = compile(file.read(), WARM_UP, "exec", dont_inherit=True)
        exec(code, {"__name__": "__warmup__", "__file__": WARM_UP})
        sys.stdout.flush()
    else:
        # What C code has in its buffers has to be asked for; but in a bare interpreter there is none, and there will be
        # none before another module has been imported. So that this shows, what the engine has imported goes.
        for name in ("ctypes", "ctypes._endian", "_ctypes"):
            del sys.modules[name]
        _bare_modules = len(sys.modules)


def log(text):
    """Writes to the machine's console: what the engine itself has to say goes nowhere else."""
    with open("/dev/console", "w", encoding="utf-8", errors="backslashreplace") as console:
        print("dh engine:", text.rstrip(), file=console)


def fork_child(control, descriptors):
    between = os.fork()
    if between == 0:
        if os.fork() == 0:
            child(control, descriptors)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    os.waitpid(between, 0)
    control.send(b"forked")


def child(control, descriptors):
    """From the fork to the end of one run."""
    try:
        jobs, report, listener, rehearsal = get_ready(*descriptors)
    except BaseException:
        log(f"a child failed\n{traceback.format_exc()}")
        control.send(b"failed")
        os._exit(1)
    code, result_repr, error, module = EXIT_INTERRUPTED, None, None, new_main_module()
    try:
        try:
            socket.send_fds(control, [b"child %d" % os.getpid()], [] if listener is None else [listener])
            control.close()
            if listener is not None:
                os.close(listener)
            while not (job := read_message(jobs)):  # none yet: but the machine has been restored, and there will be one
                rehearsal.run_once()
            reseed()
            code, result_repr, error = run(module, *marshal.loads(job))
        except KeyboardInterrupt as interrupt:  # a cancel that came before the code
            code, result_repr, error = failure(interrupt)
        end(code, result_repr, error, module, report)
    finally:
        os._exit(code)


def get_ready(stdin, stdout, stderr, jobs, report):
    os.setsid()
    for descriptor, source in enumerate((stdin, stdout, stderr)):
        os.dup2(source, descriptor)
        os.close(source)
    jobs, report = keep_private(jobs), Report(keep_private(report))
    write("/proc/self/oom_score_adj", "0")
    write(RUN_CGROUP, "0")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rehearsal = Rehearsal()
    rehearsal.run_once()  # writes to the pages that a run writes to: their copies are made before the snapshot
    return jobs, report, stdin_demand.install(), rehearsal


def keep_private(descriptor):
    private = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, PRIVATE_DESCRIPTOR)
    os.close(descriptor)
    return private


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read_message(pipe):
    """One message: its length in four bytes, then itself."""
    length = int.from_bytes(read_exactly(pipe, 4), "little")
    return read_exactly(pipe, length) if length else b""


def read_exactly(pipe, size):
    data = os.read(pipe, size)
    while len(data) < size:
        more = os.read(pipe, size - len(data))
        if not more:
            os._exit(0)  # the runner has ended
        data += more
    return data


def reseed():
    """Makes this process unlike its copies in other clones. The kernel has been given fresh entropy before."""
    loaded = sys.modules
    if "random" in loaded:
        loaded["random"].seed()
    if "numpy.random" in loaded:
        loaded["numpy.random"].seed()
    if "tempfile" in loaded:
        loaded["tempfile"]._name_sequence = None
    if "uuid" in loaded:
        loaded["uuid"]._node = loaded["uuid"]._last_timestamp = None
    if "ssl" in loaded:
        loaded["ssl"].RAND_add(os.urandom(32), 32.0)


class Report:
    """What the runner is told of a run: a line when the code has ended, which may be empty, and a byte, the exit code, as
    the last act of the process."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._process = os.getpid()

    def send(self, data):
        # The code may have forked and come to its end twice, or have closed the pipe and opened a file in its place.
        try:
            if os.getpid() == self._process:
                fcntl.fcntl(self._pipe, fcntl.F_GETPIPE_SZ)  # an error if it is none
                while data:
                    data = data[os.write(self._pipe, data) :]
        except Exception:
            pass  # the runner goes by the exit status


def new_main_module():
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins
    module.__annotations__ = {}
    module.__loader__ = importlib.machinery.BuiltinImporter
    return module


def run(module, mode, filename, argv, env, show_result, source):
    """Runs the code as the main module. Returns its exit code, the repr of its result, and its error."""
    sys.modules["__main__"] = module
    try:
        for name, value in env.items():
            os.environ[name] = value
        if "TZ" in env:
            time.tzset()
        sys.argv = argv
        sys.orig_argv = [sys.executable, *argv]
        if mode == "script":
            return run_script(module, filename, source)
        value = run_code(module, source, show_result)
        return 0, None if value is None else cut(repr(value)), None
    except SystemExit as request:
        return exit_code(request), None, None
    except BaseException as error:
        return failure(error)


def run_code(module, source, show_result):
    """As `python -c`, but the value of a last expression statement is returned."""
    sys.path[0] = ""
    text = source.decode()
    linecache.cache[CODE] = len(source), None, text.splitlines(True), CODE  # no file whose time could make it stale
    statements, expression = compile_code(text, show_result)
    if statements is not None:
        exec(statements, module.__dict__)
    return None if expression is None else eval(expression, module.__dict__)


def compile_code(text, show_result):
    """The code to execute, and the expression that it ends with; either may be None. Nothing has run yet: an error in
    the last line comes before the first has any effect."""
    if not show_result:
        return compile(text, CODE, "exec", 0, True), None
    # Mostly the last line is the expression. It is when it is one by itself, and what comes before it is complete
    # without it; blank lines keep its number right.
    last = text.rstrip().rfind("\n") + 1
    if text[last : last + 1].strip():  # it is not indented
        try:
            expression = compile("\n" * text.count("\n", 0, last) + text[last:], CODE, "eval", 0, True)
            return compile(text[:last], CODE, "exec", 0, True) if last else None, expression
        except SyntaxError:
            pass
    # The general case goes by the syntax tree, whose objects take much longer to make than the code.
    tree = compile(text, CODE, "exec", ast.PyCF_ONLY_AST, True)
    expression = None
    if tree.body and type(tree.body[-1]) is ast.Expr:
        expression = compile(ast.Expression(tree.body.pop().value), CODE, "eval", 0, True)
    return compile(tree, CODE, "exec", 0, True), expression


def run_script(module, filename, source):
    """As `python script.py args`."""
    path = f"{WORKSPACE}/{os.path.basename(filename)}"
    with open(path, "wb") as file:
        file.write(source)
    sys.path[0] = WORKSPACE
    module.__file__ = path
    module.__cached__ = None
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", 0, True), module.__dict__)
    return 0, None, None


def exit_code(request):
    """What python makes of SystemExit's value."""
    code = request.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 0xFF
    show(f"{code}\n")
    return 1


def failure(error):
    """Shows an exception as python does. Returns what `run` does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("__main__", "builtins"):
        name = f"{kind.__module__}.{name}"
    try:
        message = str(error)
    except Exception:
        message = "<exception str() failed>"
    text = "".join(traceback.format_exception(error))
    if sys.excepthook is sys.__excepthook__:
        show(text)
    else:
        try:
            sys.excepthook(kind, error, trace)
        except SystemExit as request:
            code = exit_code(request)
        except BaseException as hook_error:
            hook_text = "".join(traceback.format_exception(hook_error))
            show(f"Error in sys.excepthook:\n{hook_text}\nOriginal exception was:\n{text}")
    return code, None, {"type": cut(name), "message": cut(message), "traceback": cut(text)}


def show(text):
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except Exception:
        pass  # the code has closed it, or put something else in its place


def cut(text):
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def end(code, result_repr, error, module, report):
    """Ends the process as the interpreter does, except that it does not take itself apart: that would be felt, and
    nothing of it seen."""
    try:
        if result_repr is not None or error is not None:
            report.send(json.dumps({"result_repr": result_repr, "error": error}).encode())
        for step in (wait_for_threads, atexit._run_exitfuncs, lambda: release_globals(module)):
            try:
                step()
            except BaseException as error:
                if failure(error)[0] == EXIT_INTERRUPTED:
                    code = EXIT_INTERRUPTED
        if not (flush(sys.stdout) and flush(sys.stderr) and flush(_stdout)):
            code = EXIT_FLUSH_FAILED
        if len(sys.modules) != _bare_modules:
            _libc.fflush(None)
        report.send(b"\n" + bytes((code,)))
    finally:
        os._exit(code)


def wait_for_threads():
    if threading._shutdown_locks or threading._threading_atexits:
        threading._shutdown()


def release_globals(module):
    """Lets go of what the code's globals hold: files are flushed, `__del__` is called."""
    namespace = module.__dict__
    names = [name for name in namespace if name[:2] != "__"]
    # Code that has left no name behind has left nothing to collect. Daemon threads would see their globals vanish.
    if names and len(sys._current_frames()) == 1:
        for name in names:
            namespace[name] = None
        gc.collect()


def flush(stream):
    try:
        if stream is not None and not stream.closed:
            stream.flush()
        return True
    except BaseException:
        show(traceback.format_exc())
        return False


class Rehearsal:
    """Runs code for nothing, so that what a run needs is imported, in memory, and the process's own."""

    def __init__(self):
        self._null = open(os.devnull, "w", 1, opener=lambda path, flags: keep_private(os.open(path, flags)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._null.close()

    def run_once(self):
        self.run(b"print('output')\n'value'")

    def run(self, source):
        kept = sys.stdout, sys.stderr, sys.argv, sys.orig_argv, sys.path[0], sys.modules["__main__"]
        sys.stdout = sys.stderr = self._null
        module = new_main_module()
        try:
            code, _, _ = run(module, "code", CODE, ["-c"], {}, True, source)
            if code == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            release_globals(module)
            flush(sys.stdout)
        finally:
            sys.stdout, sys.stderr, sys.argv, sys.orig_argv, sys.path[0], sys.modules["__main__"] = kept


main()
