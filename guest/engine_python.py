"""The engine of the `python` template: a warm interpreter, forked once for each run.

The runner starts it with one end of a socket pair as descriptor 3. It runs the template's warm-up, says `ready VERSION`,
and then forks a child whenever it is sent the descriptors for one. The child gets ready to the last detail, hands over its
process id and its stdin listener, and waits for its job in a read: forked before the snapshot, it runs code right after
the restore.

The child is forked twice, so that it becomes the runner's own: when it ends, the kernel tells the runner, and no process
has to be woken to pass that on.
"""

import atexit
import ctypes
import gc
import json
import marshal
import os
import signal
import socket
import sys
import threading
import traceback

sys.path[0] = os.path.dirname(os.path.abspath(__file__))
import stdin_demand  # noqa: E402
from execution import (  # noqa: E402
    EXIT_INTERRUPTED, EXIT_NOT_RUN, WORKSPACE, NotRun, Rehearsal, Report, RestoreHook, failure, flush, keep_private, log,
    look_up_generators, new_main_module, read_message, release_globals, reseed, run, write,
)

CONTROL = 3
WARM_UP = "/usr/lib/dh/warmup.py"
RESTORE = "/usr/lib/dh/restore.py"
RUN_CGROUP = "/sys/fs/cgroup/run/cgroup.procs"
EXIT_FLUSH_FAILED = 120  # as python itself ends when its standard output cannot be flushed

_cpus = os.sched_getaffinity(0)  # where code may run
_libc = ctypes.PyDLL(None)  # holds on to the interpreter's lock: other threads do not come in between
_stdout = sys.stdout
_restore_hook = None
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
        message, descriptors, _, _ = socket.recv_fds(control, 16, 5)
        if not descriptors:
            return  # the runner has ended
        _, _, cpu = message.partition(b" ")
        fork_child(control, descriptors, {int(cpu)} if cpu else _cpus)


def warm_up():
    global _bare_modules, _restore_hook
    with Rehearsal() as rehearsal:
        for source in (
            b"print('output')\n[len('value')]",
            b"def f(): 1 / 0\ntry: f()\nexcept Exception as e: raise ValueError('text') from e",
            b"value = 1",
            b"1 +",
            b"raise SystemExit('text')",
        ):
            rehearsal.run(source)
    for name in ("execution", "stdin_demand"):  # the names are the code's again
        del sys.modules[name]
    namespace = {"__name__": "__warmup__", "__file__": WARM_UP}
    if os.path.exists(WARM_UP):
        with open(WARM_UP, "rb") as file:
            code = compile(file.read(), WARM_UP, "exec", dont_inherit=True)
        exec(code, namespace)
        sys.stdout.flush()
    else:
        # What C code has in its buffers has to be asked for; but in a bare interpreter there is none, and there will be
        # none before another module has been imported. So that this shows, what the engine has imported goes.
        for name in ("ctypes", "ctypes._endian", "_ctypes"):
            del sys.modules[name]
        _bare_modules = len(sys.modules)
    _restore_hook = RestoreHook(RESTORE, namespace)
    look_up_generators()
    reseed()  # OpenSSL sets up its generator at first use, which takes emulated code long


def fork_child(control, descriptors, cpus):
    between = os.fork()
    if between == 0:
        if os.fork() == 0:
            child(control, descriptors, cpus)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    os.waitpid(between, 0)
    control.send(b"forked")


def child(control, descriptors, cpus):
    """From the fork to the end of one run. `cpus`: where it waits for its code."""
    try:
        if cpus != _cpus:
            os.sched_setaffinity(0, cpus)
        jobs, report, listener, rehearsal = get_ready(*descriptors)
    except BaseException:
        log(f"a child failed\n{traceback.format_exc()}")
        control.send(b"failed")
        os._exit(1)
    code, result_repr, error, not_run, is_last, module = EXIT_INTERRUPTED, None, None, False, False, new_main_module()
    try:
        try:
            socket.send_fds(control, [b"child %d" % os.getpid()], [] if listener is None else [listener])
            control.close()
            if listener is not None:
                os.close(listener)
            while not (job := read_message(jobs)):  # none yet: but the machine has been restored, and there will be one
                rehearsal.run_once()
                reseed()  # for practice: the kernel may not have its entropy yet
            is_copy, is_last, _, *job = marshal.loads(job)  # there are no tables to show
            if cpus != _cpus:
                os.sched_setaffinity(0, _cpus)
            if is_copy:
                reseed()
            _restore_hook.run()
            code, result_repr, error = run(module, *job)
        except KeyboardInterrupt as interrupt:  # a cancel that came before the code
            code, result_repr, error = failure(interrupt)
        except NotRun as reason:
            _, _, error = failure(reason.__cause__)
            code, not_run = EXIT_NOT_RUN, True
        end(code, result_repr, error, not_run, is_last, module, report)
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
    reseed()  # the same, and for good if the host has said hello
    return jobs, report, stdin_demand.install(), rehearsal


def end(code, result_repr, error, not_run, is_last, module, report):
    """Ends the process as the interpreter does, except that it does not take itself apart: that would be felt, and
    nothing of it seen. When nothing runs after it, it stays, and takes no time of the host, which ends the machine."""
    try:
        if result_repr is not None or error is not None:
            report.send(json.dumps({"result_repr": result_repr, "error": error, "not_run": not_run}).encode())
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
        if is_last:
            _libc.pause()  # with the interpreter's lock: no thread of the code goes on
    finally:
        os._exit(code)


def wait_for_threads():
    if threading._shutdown_locks or threading._threading_atexits:
        threading._shutdown()


main()
