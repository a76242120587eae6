"""Programs that a model wrote, run with limits and judged: HumanEval and MBPP (arXiv 2107.03374, 2108.07732).

A warden, a fresh Python with nothing but its standard library, forks the program, waits, and tells the
verdict. A pass is proven: after the last line of the tests the program's process sends a random token through
a private pipe, so `os._exit(0)`, `sys.exit(0)` or a printed "passed" is none. How much is contained depends
on the machine, and `containment()` says it:

    namespaces  Linux that grants user namespaces (`unshare`), checked once. The program has a process tree of
                its own that dies with its warden, no network, and no writable or device file but its folder,
                which is a small tmpfs. No capabilities are left.
    children    Linux without. Orphans are handed to the warden, which kills all it has; files and network are
                guarded by an audit hook alone.
    group       Other POSIX systems. What leaves its process group lives on; macOS ignores the memory limit.

Everywhere: wall time, address space, file size and open files are limited, a hook refuses processes, signals,
sockets and writing elsewhere, the environment is empty, stdin and output are /dev/null, and string hashes are
alike from run to run. A warden outlives a killed caller by its program's time at most. None of this stops a
determined attacker: a hook is Python and can be evaded by native code, files can be read and Unix sockets
reached, and who searches memory for the token can forge a verdict. Processes are counted (RLIMIT_NPROC) in
namespaces only, and not where root started them, so root has nothing but the hook against a fork bomb. For a
model that you do not trust use a container or a virtual machine.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, PositiveInt

from gemwright.config import Config
from gemwright.run import say

Containment = Literal["namespaces", "children", "group"]
Reason = Literal["passed", "failed", "error", "exited", "memory", "timeout", "killed"]
_GRACE = 10.0  # seconds that a warden may take beyond the program's, to start and to clean up


class SandboxConfig(Config):
    """What a program may use."""

    seconds: float = Field(default=10.0, gt=0, le=3600)
    """Wall time of a program. On a busy machine honest programs take longer."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space of a process, in MiB."""
    disk_mib: PositiveInt = 16
    """Largest file, in MiB; in namespaces, all files together."""
    processes: PositiveInt | None = None
    """Programs at a time; None: one a core."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """Whether it ran to its end without an error."""
    reason: Reason
    """`failed`: an assertion; `error`: another exception, also one for what is refused; `exited`: it ended
    before its tests did; `memory`: more than it may have; `timeout`; `killed`: by a signal."""
    detail: str = ""
    """The last line of the error, cut."""


@functools.cache
def containment() -> Containment:
    """How well programs are contained on this machine, found out once, by running one.

    Raises:
        RuntimeError: no program can be run here.
    """
    probe = SandboxConfig(seconds=60.0)
    if os.name == "posix":
        linux = sys.platform.startswith("linux")
        for level in get_args(Containment) if linux else ("group",):
            if level == "namespaces" and not shutil.which("unshare"):
                continue
            if _run("assert True", probe, level, _Pack()).passed:
                if level != "namespaces":
                    say(f"sandbox: no namespaces here; code is held by its {level} and a hook only")
                return level
    raise RuntimeError(
        f"generated code cannot be run here: {sys.platform} with {sys.executable} does not run even an "
        "empty program. Run these benchmarks on Linux or macOS, or in a container."
    )


def run_program(program: str, config: SandboxConfig | None = None) -> Outcome:
    """Run one program in a folder of its own that is gone afterwards.

    Raises:
        RuntimeError: no program can be run here.
    """
    return run_programs([program], config)[0]


def run_programs(
    programs: Iterable[str], config: SandboxConfig | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run programs, some at a time; the outcomes are in their order. Ctrl-C leaves none running.

    Args:
        advance: called with 1 for each program that is done.
    Raises:
        RuntimeError: no program can be run here.
    """
    config, level, pack = config or SandboxConfig(), containment(), _Pack()
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(config.processes or _cores()) as pool:
        try:
            waiting = [pool.submit(_run, program, config, level, pack) for program in programs]
            for one in waiting:
                outcomes.append(one.result())
                if advance is not None:
                    advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            pack.kill()
            raise
    return outcomes


class _Pack:
    """The wardens that run at the moment, to be killed together."""

    def __init__(self) -> None:
        self._lock, self._live, self._over = threading.Lock(), set[subprocess.Popen[bytes]](), False

    @contextlib.contextmanager
    def leash(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        with self._lock:
            self._live.add(process)
            if self._over:
                _kill(process)
        try:
            yield
        finally:
            with self._lock:
                self._live.discard(process)
            _kill(process)

    def kill(self) -> None:
        with self._lock:
            self._over = True
            for process in self._live:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a warden and its group, unless it is over: then the number may be another's."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(program: str, config: SandboxConfig, level: Containment, pack: _Pack) -> Outcome:
    home = os.path.realpath(tempfile.mkdtemp(prefix="gemwright-sandbox-"))
    limits = (config.seconds, config.memory_mib << 20, config.disk_mib << 20)
    # Not -I: it would ignore PYTHONHASHSEED. The rest of what it means is here.
    python = [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", "-c", _GUARD + _WARDEN]
    alone = [shutil.which("unshare") or "unshare", *_UNSHARE] if level == "namespaces" else []
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        process = subprocess.Popen(
            [*alone, *python, level, home, *map(str, limits)], cwd=home, start_new_session=True,
            env=kept | {"HOME": home, "TMPDIR": home, **_ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with process, pack.leash(process):
            try:
                told, _ = process.communicate(program.encode("utf-8", "replace"), config.seconds + _GRACE)
            except subprocess.TimeoutExpired:
                told = b"timeout"
    finally:
        _remove(home)
    reason, _, detail = told.decode("utf-8", "replace").partition(" ")
    known = next((one for one in get_args(Reason) if one == reason), None)
    if known is None:
        return Outcome(False, "killed", "the sandbox ended without a verdict")
    return Outcome(known == "passed", known, detail)


def _remove(home: str) -> None:
    """Remove a folder, also one nested deeper than Python's stack, or without permissions."""
    try:
        shutil.rmtree(home)
    except (OSError, RecursionError):
        script = 'chmod -R u+rwx "$0"; rm -rf "$0"'
        subprocess.run(["sh", "-c", script, home], stderr=subprocess.DEVNULL, check=False)


_UNSHARE = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount", "--net", "--ipc"]
_ENVIRONMENT = {
    "PATH": os.defpath, "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set decides some tests
}  # fmt: skip

_GUARD = r'''
import os, sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = frozenset(
    "os.fork os.forkpty os.posix_spawn os.spawn os.exec os.system os.startfile subprocess.Popen pty.spawn "
    "os.kill os.killpg resource.setrlimit resource.prlimit".split()
)
PLACES = {  # of an event, which arguments are paths that are changed, and which the folders they start from
    "open": ((0, None),), "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
}

def guard(home):
    """The second net: refuse processes, signals, sockets and writing outside the folder."""
    def refused(what, *_, **__):
        raise PermissionError(f"the sandbox refuses {what}")

    def at(descriptor):
        return f"/proc/self/fd/{descriptor}"

    def hook(event, args):
        if event in REFUSED or event.startswith(("ctypes.", "socket.")):
            if event == "socket.__new__" and args[1] == 1:
                return  # a pair of Unix sockets is what asyncio wakes itself with
            refused(event)
        if event == "open" and (isinstance(args[0], int) or not args[2] & WRITES):
            return
        for path, start in PLACES.get(event, ()):
            start = -1 if start is None else args[start]
            parts = [at(start)] if start >= 0 else []
            parts.append(at(args[path]) if isinstance(args[path], int) else os.fsdecode(args[path]))
            real = os.path.realpath(os.path.join(*parts))
            if real != os.devnull and real != home and not real.startswith(home + os.sep):
                refused(f"{event} of {real} for writing" if event == "open" else f"{event} of {real}")

    unaudited = type(sys)("_posixsubprocess")
    unaudited.fork_exec = lambda *_: refused("a process")
    sys.modules["_posixsubprocess"] = unaudited
    sys.addaudithook(hook)
'''

_WARDEN = r'''
import resource, select, signal, time

def isolate(level, home, disk):
    """Make everything read-only but a new tmpfs, and give up all capabilities; or adopt orphans."""
    import ctypes
    libc, number = ctypes.CDLL(None, use_errno=True), ctypes.c_long

    def call(name, *args):
        if getattr(libc, name)(*(number(arg) if isinstance(arg, int) else arg for arg in args)) < 0:
            raise OSError(ctypes.get_errno(), name)

    def attributes(path, flags, set, clear):  # mount_setattr(2), since Linux 5.12
        both = (ctypes.c_uint64 * 4)(set, clear, 0, 0)
        call("syscall", 442, -100, path, flags, both, ctypes.sizeof(both))

    READ_ONLY, NO_SUID, NO_DEVICES, RECURSIVE, BIND = 1, 2, 4, 0x8000, 4096
    if level == "children":
        return call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    null = os.devnull.encode()
    call("mount", null, null, None, BIND, None)
    attributes(b"/", RECURSIVE, READ_ONLY | NO_SUID | NO_DEVICES, 0)
    attributes(null, 0, 0, NO_DEVICES)
    call("mount", b"tmpfs", os.fsencode(home), b"tmpfs", NO_SUID | NO_DEVICES, b"mode=700,size=%d" % disk)
    os.chdir(home)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody traces the warden

def play(program, level, home, seconds, memory, disk, token, pipe):
    """The program's process. What is called at the end is bound before the program can change it."""
    write, leave = os.write, os._exit
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    limits = {"AS": memory, "CPU": int(seconds) + 2, "FSIZE": disk, "NOFILE": 64, "CORE": 0}
    if level == "namespaces":
        os.setsid()  # a signal to the group must not reach outside
        limits["NPROC"] = 32
    for name, most in limits.items():
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        except (ValueError, OSError):
            if level != "group":  # macOS refuses some
                raise
    guard(home)
    module = sys.modules["program"] = type(sys)("program")
    reason, detail = b"error", ""
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
        reason = b"passed"
    except MemoryError:
        reason, detail = b"memory", "MemoryError"
    except SystemExit as error:
        reason, detail = b"exited", f"SystemExit: {error.code!r:.100}"
    except BaseException as error:
        reason, detail = b"failed" if isinstance(error, AssertionError) else b"error", type(error).__name__
        try:
            detail += f": {str(error) or where(error, program)}"
        except BaseException:
            pass
    write(pipe, b" ".join([token, reason, " ".join(detail.split())[:200].encode("utf-8", "replace")]) + b"\n")
    leave(0)

def where(error, program):
    """The line of the program that an error comes from."""
    trace, line = error.__traceback__, 0
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<program>" else line
        trace = trace.tb_next
    return program.decode("utf-8", "replace").split("\n")[line - 1] if line else ""

def watch(pid, pipe, token, seconds):
    """Wait for the token, the end or the time, whichever is first -> the verdict."""
    end, told, status, closed = time.monotonic() + seconds, b"", None, False

    def hear(wait):
        nonlocal told, closed
        if select.select([] if closed else [pipe], [], [], wait)[0]:
            some = os.read(pipe, 4096)
            told, closed = (told + some)[-8192:], not some

    while (left := end - time.monotonic()) > 0 and not (token in told and told.endswith(b"\n")):
        if status is not None:
            break
        hear(min(left, 0.02))
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = code
            hear(0)  # what it said between our ear and its end
    if status is None:
        os.kill(pid, signal.SIGKILL)
    if token in told:
        return told.split(token, 1)[1].split(b"\n")[0].strip()
    if status is None:
        return b"timeout it ran for more than %g s" % seconds
    if os.WIFSIGNALED(status):
        return b"killed " + (signal.strsignal(os.WTERMSIG(status)) or "by a signal").encode()
    return b"exited it ended with code %d before its tests were done" % os.WEXITSTATUS(status)

def parent(number):
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0

def sweep():
    """Kill all children, and those that become ours when their parents die."""
    me = os.getpid()
    while mine := [int(name) for name in os.listdir("/proc") if name.isdigit() and parent(name) == me]:
        for child in mine:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

def main():
    level, home = sys.argv[1:3]
    seconds, memory, disk = float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program, token = sys.stdin.buffer.read(), os.urandom(16).hex().encode()
    if level != "group":
        isolate(level, home, disk)
    ear, pipe = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ear)
            play(program, level, home, seconds, memory, disk, token, pipe)
        finally:
            os._exit(1)
    os.close(pipe)
    verdict = watch(pid, ear, token, seconds)
    if level == "children":
        sweep()
    os.write(1, verdict)
    if level == "group":
        os.killpg(0, signal.SIGKILL)
    os._exit(0)

main()
'''
