"""The engine of the `python` template: a warm interpreter, forked once for each run.

The runner starts it with one end of a socket pair as descriptor 3. It runs the template's warm-up, says `ready VERSION`,
and then forks a child whenever it is sent the descriptors for one. The child gets itself ready to the last detail, hands
over its process id and its stdin listener, and waits for its job in a read: forked before the snapshot, it runs code
right after the restore.

The child is forked twice, so that it becomes the runner's own: when it ends, the runner is told by the kernel, and no
process has to be woken to pass that on.
"""

import __future__
import ast
import atexit
import builtins
import ctypes
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
PRIVATE_DESCRIPTOR = 1000  # where the child keeps what is not the code's: above all that code opens, below the soft limit
MAX_TEXT = 65_536  # characters of a text in the report
FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag
EXIT_FLUSH_FAILED = 120  # as python itself ends when its standard output cannot be flushed
EXIT_INTERRUPTED = 130

_libc = ctypes.PyDLL(None)  # keeps the interpreter's lock: daemon threads stand still while the process ends


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
    del sys.modules["stdin_demand"]  # the name is the code's again
    gc.collect()
    gc.freeze()  # a child's collector leaves these objects, and so their pages, alone
    control.send(b"ready " + sys.version.split()[0].encode())
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 16, 5)
        if not descriptors:
            return  # the runner has ended
        fork_child(control, descriptors)


def warm_up():
    rehearse()
    if os.path.exists(WARM_UP):
        with open(WARM_UP, "rb") as file:
            code = compile(file.read(), WARM_UP, "exec", dont_inherit=True)
        exec(code, {"__name__": "__warmup__", "__file__": WARM_UP})
        sys.stdout.flush()


def log(text):
    """Writes to the machine's console: what the engine itself has to say goes nowhere else."""
    with open("/dev/console", "w", encoding="utf-8", errors="backslashreplace") as console:
        print("dh engine:", text.rstrip(), file=console)


def fork_child(control, descriptors):
    between = os.fork()
    if between == 0:
        if os.fork() == 0:
            try:
                child(control, *descriptors)
            except BaseException:
                log(f"a child failed\n{traceback.format_exc()}")
                control.send(b"failed")
            finally:
                os._exit(1)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    os.waitpid(between, 0)
    control.send(b"forked")


def child(control, stdin, stdout, stderr, job_pipe, report_pipe):
    """From the fork to the exit of one run. Returns its exit code only if it could not end the process itself."""
    os.setsid()
    for descriptor, source in enumerate((stdin, stdout, stderr)):
        os.dup2(source, descriptor)
        os.close(source)
    job_pipe, report_pipe = keep_private(job_pipe), keep_private(report_pipe)
    write("/proc/self/oom_score_adj", "0")
    write(RUN_CGROUP, "0")
    # A cancel that comes early waits until the code runs.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)

    rehearse()  # writes to the pages now that a run writes to: their copies are made before the snapshot, not after
    listener = stdin_demand.install()
    socket.send_fds(control, [b"child %d" % os.getpid()], [] if listener is None else [listener])
    if listener is not None:
        os.close(listener)
    control.close()

    report = Report(report_pipe)
    job = marshal.loads(read_message(job_pipe))
    os.close(job_pipe)
    reseed()
    code, result_repr, error = run(*job)
    report.send(result_repr, error)
    return end(code)


def keep_private(descriptor):
    import fcntl

    private = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, PRIVATE_DESCRIPTOR)
    os.close(descriptor)
    return private


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read_message(pipe):
    """One message: its length in four bytes, then itself."""
    return read_exactly(pipe, int.from_bytes(read_exactly(pipe, 4), "little"))


def read_exactly(pipe, size):
    data = os.read(pipe, size)
    while len(data) < size:
        more = os.read(pipe, size - len(data))
        if not more:
            os._exit(0)  # the runner has ended
        data += more
    return data


def reseed():
    """Makes this process unlike its copies in other clones. The kernel has got fresh entropy before."""
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
    """What the runner is told of a run beyond its exit status."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._inode = os.fstat(pipe).st_ino
        self._process = os.getpid()

    def send(self, result_repr, error):
        # The code may have forked and come to its end twice, or have closed the pipe and opened a file in its place.
        if os.getpid() != self._process:
            return
        data = json.dumps({"result_repr": result_repr, "error": error}).encode()
        try:
            if os.fstat(self._pipe).st_ino == self._inode:
                while data:
                    data = data[os.write(self._pipe, data):]
                os.close(self._pipe)
        except OSError:
            pass  # the runner goes by the exit status alone


def run(mode, filename, argv, env, show_result, source):
    """Runs the code. Returns its exit code, the repr of its result, and its error."""
    module = new_main_module()
    try:
        os.environ.update(env)
        if "TZ" in env:
            time.tzset()
        sys.argv = argv
        sys.orig_argv = [sys.executable, *argv]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if mode == "script":
            value = run_script(source, filename, module)
        else:
            value = run_code(source, show_result, module)
        return 0, None if value is None else cut(repr(value)), None
    except SystemExit as request:
        return exit_code(request), None, None
    except BaseException as error:
        return failure(error)


def new_main_module():
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins
    module.__annotations__ = {}
    module.__loader__ = importlib.machinery.BuiltinImporter
    sys.modules["__main__"] = module
    return module


def run_code(source, show_result, module):
    """As `python -c`, but the value of a last expression statement is kept."""
    sys.path[0] = ""
    name = "<string>"
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[name] = len(source), None, lines, name  # no file's time: nothing makes it stale
    tree = compile(source, name, "exec", ast.PyCF_ONLY_AST, True)
    last = tree.body[-1] if tree.body and show_result else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, name, "exec", 0, True), module.__dict__)
        return None
    del tree.body[-1]
    # Both are compiled before either runs: an error in the last line is one before the first line has any effect.
    body = compile(tree, name, "exec", 0, True)
    expression = compile(ast.Expression(last.value), name, "eval", body.co_flags & FUTURE_FLAGS, True)
    exec(body, module.__dict__)
    return eval(expression, module.__dict__)


def run_script(source, filename, module):
    """As `python script.py args`."""
    path = os.path.join(WORKSPACE, os.path.basename(filename))
    with open(path, "wb") as file:
        file.write(source)
    sys.path[0] = WORKSPACE
    module.__file__ = path
    module.__cached__ = None
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", 0, True), module.__dict__)


def exit_code(request):
    """What python makes of SystemExit's value."""
    code = request.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 0xFF
    sys.stdout.flush()
    print(code, file=sys.stderr)
    return 1


def failure(error):
    """Shows an exception as python does, and returns what `run` does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ in ("__main__", "builtins") else f"{kind.__module__}.{kind.__qualname__}"
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


def end(code):
    """Ends the process as the interpreter does, except that it does not take itself apart: that would be felt, and
    nothing of it seen."""
    for step in (threading._shutdown, atexit._run_exitfuncs, release_globals):
        try:
            step()
        except BaseException:
            show(traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            code = EXIT_FLUSH_FAILED
            show(traceback.format_exc())
    _libc.exit(code)  # not os._exit: what C code has buffered and registered has its turn
    return code


def release_globals():
    """Lets go of what the code's globals hold: files are flushed, `__del__` is called."""
    if len(sys._current_frames()) > 1:
        return  # daemon threads, which would see their globals vanish
    namespace = sys.modules["__main__"].__dict__
    for name in list(namespace):
        if name != "__builtins__":
            namespace[name] = None
    gc.collect()


def rehearse():
    """Runs every path that a run may take, so that all it needs is imported and in memory."""
    modules, arguments = sys.modules["__main__"], sys.argv
    error = sys.stderr
    for source in (b"value = [n for n in range(3)]\nvalue", b"def f(): 1 / 0\ntry: f()\nexcept Exception as e: raise ValueError() from e", b"1 +", b"raise SystemExit"):
        sys.stderr = None
        run("code", "<string>", ["-c"], {}, True, source)
    sys.stderr, sys.argv, sys.modules["__main__"] = error, arguments, modules
    linecache.cache.clear()


main()
