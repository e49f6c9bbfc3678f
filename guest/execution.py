"""Runs code as `python` does, in whatever process an engine wants it to run, and tells the runner how it went.

What is here touches nothing but that process. Engines decide which one it is: a fork of a warm interpreter
(engine_python.py), or the engine's own (engine_deephaven.py).
"""

import ast
import builtins
import ctypes
import fcntl
import gc
import importlib.machinery
import linecache
import os
import sys
import time
import traceback
import types

WORKSPACE = "/workspace"
PRIVATE_DESCRIPTOR = 1000  # where an engine keeps what is not the code's: above what code opens, below the soft limit
MAX_TEXT = 65_536  # characters of a text in the report
EXIT_INTERRUPTED = 130
EXIT_NOT_RUN = 125
CODE = "<string>"  # what tracebacks call the code that has no file
RESTORE_CODE = "<restore>"

_MT19937_WORDS = 624  # of state; behind them stands how many were used (numpy/random/src/mt19937/mt19937.h)

_forget_sqlites_seed = None
_numpys_generator = _numpys_state = None

_HERE = os.path.dirname(os.path.abspath(__file__)) + "/"


def log(text):
    """Writes to the machine's console: what the engine itself has to say goes nowhere else."""
    with open("/dev/console", "w", encoding="utf-8", errors="backslashreplace") as console:
        print("dh engine:", text.rstrip(), file=console)


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


def look_up_generators():
    """After the warm-up: finds what `reseed` has to call in libraries that may have drawn numbers by now."""
    global _forget_sqlites_seed, _numpys_generator, _numpys_state
    if "_sqlite3" in sys.modules:
        _forget_sqlites_seed = ctypes.PyDLL(sys.modules["_sqlite3"].__file__).sqlite3_randomness
    if "numpy.random" in sys.modules:
        seed_numpy()
        try:
            _numpys_generator, _numpys_state = generator_of_numpy()
        except Exception:  # one that is made otherwise
            log(f"numpy's generator takes its seed the slow way\n{traceback.format_exc()}")


def seed_numpy():
    sys.modules["numpy.random"].seed(list(memoryview(os.urandom(32)).cast("I")))


def generator_of_numpy():
    """numpy's global generator, which must outlive its state, and that state, as memory. To seed it takes 2,300 stretches
    of code that nobody else needs, a twelfth of all that an emulated machine translates for `print('hello')`; to fill it
    takes none. The second number of the last pair that was drawn of a normal distribution is kept elsewhere: seed it
    before."""
    generator = sys.modules["numpy.random"].mtrand._rand._bit_generator
    memory = (ctypes.c_char * (4 * _MT19937_WORDS + 4)).from_address(generator.ctypes.state_address)
    known = generator.state
    words, used = known["state"]["key"], known["state"]["pos"]
    if known["bit_generator"] != "MT19937" or memory.raw != words.tobytes() + used.to_bytes(4, "little"):
        raise NotImplementedError(f"a {known['bit_generator']} whose state is not where it was expected")
    return generator, memory


def reseed():
    """Makes this process unlike its copies in other clones. The kernel has been given fresh entropy before."""
    loaded = sys.modules
    if "random" in loaded:
        loaded["random"].seed()
    if _numpys_state is not None:
        _numpys_state.raw = os.urandom(4 * _MT19937_WORDS) + _MT19937_WORDS.to_bytes(4, "little")  # as if all were used
    elif "numpy.random" in loaded:
        seed_numpy()
    if "tempfile" in loaded:
        loaded["tempfile"]._name_sequence = None
    if "uuid" in loaded:
        uuid = loaded["uuid"]
        uuid._last_timestamp = None
        uuid._node = int.from_bytes(os.urandom(6), "big") | 1 << 40  # a random one has this bit (RFC 4122, 4.5)
        uuid._generate_time_safe = None  # libuuid keeps the node that it has made up once
    if "ssl" in loaded:
        loaded["ssl"].RAND_add(os.urandom(32), 32.0)
    if "multiprocessing.process" in loaded:
        loaded["multiprocessing.process"].current_process().authkey = os.urandom(32)
    if _forget_sqlites_seed is not None:
        _forget_sqlites_seed(0, None)


class NotRun(Exception):
    """The template's restore code has failed, for the reason that is this exception's cause: the code must not run."""


class RestoreHook:
    """The template's restore code, if it has any: makes what the warm-up has left behind this clone's own. It sees the
    warm-up's names."""

    def __init__(self, path, namespace):
        self._code = None
        if os.path.exists(path):
            self._namespace = namespace
            with open(path, encoding="utf-8") as file:
                text = file.read()
            linecache.cache[RESTORE_CODE] = len(text), None, text.splitlines(True), RESTORE_CODE
            self._code = compile(text, RESTORE_CODE, "exec", 0, True)

    def run(self):
        if self._code is not None:
            try:
                exec(self._code, self._namespace)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise NotRun from error


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

    def close(self):
        os.close(self._pipe)


def new_main_module():
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins
    module.__annotations__ = {}
    module.__loader__ = importlib.machinery.BuiltinImporter
    return module


def run(module, mode, filename, argv, env, show_result, source, to_text=repr):
    """Runs the code as the main module. Returns its exit code, what `to_text` makes of its result, and its error."""
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
        text = None if value is None else to_text(value)
        return 0, None if text is None else cut(text), None
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
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
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

    def run(self, source, to_text=repr, end=None):
        """`end` is called with the main module as long as that has its names."""
        kept = sys.stdout, sys.stderr, sys.argv, sys.orig_argv, sys.path[0], sys.modules["__main__"]
        sys.stdout = sys.stderr = self._null
        module = new_main_module()
        try:
            code, _, _ = run(module, "code", CODE, ["-c"], {}, True, source, to_text)
            if code == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            if end is not None:
                end(module)
            release_globals(module)
            flush(sys.stdout)
        finally:
            sys.stdout, sys.stderr, sys.argv, sys.orig_argv, sys.path[0], sys.modules["__main__"] = kept
