"""Whatever a program does, it is judged rightly, is contained, and leaves nothing behind."""

import gzip
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemwright.benchmarks import sandbox
from gemwright.benchmarks.checks import humaneval_program, mbpp_program
from gemwright.benchmarks.sandbox import Outcome, SandboxConfig, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs a POSIX system")
QUICK = SandboxConfig(seconds=0.6)
NO_GUARD = "import os, sys\ndef guard(home): pass\n"
CHILD = "import os, time\nif os.fork() == 0:\n    os.setsid(); os.closerange(0, 99); time.sleep(60)\n"


def processes(mark: Path) -> list[str]:
    """The processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(mark) in said:
            found.append(entry.parent.name)
    return found


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder."""
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sandbox makes its folders. Every test ends with no process and no file of it left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    end = time.monotonic() + 3  # a killed namespace takes a moment
    while processes(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    assert not processes(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["namespaces", "children"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way of containing, forced, where the machine has it."""
    best = sandbox.containment()
    if best == "group" or (request.param == "namespaces" and best != "namespaces"):
        pytest.skip(f"this machine has {best} only")
    monkeypatch.setattr(sandbox, "containment", lambda: request.param)
    return request.param


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a program had evaded the hook, in namespaces: what it tries must not be tried without them."""
    if sandbox.containment() != "namespaces":
        pytest.skip("this machine has no namespaces")
    monkeypatch.setattr(sandbox, "_GUARD", NO_GUARD)


HONEST = {
    "asserts": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "standard library": "import math, re, collections, itertools, heapq\nassert math.comb(4, 2) == 6",
    "dataclass": (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n"
        "    x: int\nassert A(1) == A(1)"
    ),
    "asyncio": "import asyncio\nasync def f():\n    return 3\nassert asyncio.run(f()) == 3",
    "threads": (
        "import threading\nmet = threading.Barrier(8)\ndef work():\n    met.wait()\n    sorted(range(9999))\n"
        "    met.wait()\nall = [threading.Thread(target=work) for _ in range(8)]\n"
        "for one in all:\n    one.start()\nfor one in all:\n    one.join()\nassert not met.broken"
    ),
    "own files": (
        "import tempfile, shutil\nopen('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\n"
        "with tempfile.TemporaryDirectory() as folder:\n    open(folder + '/b', 'w').write('y')\n"
    ),
    "null device": "import os\nopen(os.devnull, 'w').write('x')\nassert open(os.devnull).read() == ''",
    "characters": "assert len('ü日') == 2 and ascii('ü') == r\"'\\xfc'\"",
    "no main": "if __name__ == '__main__':\n    input()",
}


def test_honest_code_passes(level: str):
    found = dict(zip(HONEST, run_programs(HONEST.values()), strict=True))
    assert {name: one for name, one in found.items() if one != Outcome(True, "passed")} == {}


WRONG = {
    "assertion": ("def f(x):\n    return x\nassert f(1) == 2", "failed", "AssertionError: assert f(1) == 2"),
    "message": ("assert 0, 'one\\ntwo'", "failed", "AssertionError: one two"),
    "long message": ("assert 0, 'x' * 10**6", "failed", "AssertionError: xxx"),
    "exception": ("1 / 0", "error", "ZeroDivisionError: division by zero"),
    "syntax": ("def", "error", "SyntaxError: invalid syntax"),
    "null byte": ("a = '\0'", "error", "null byte"),
    "half a character": ("a = '\ud800'\nassert a == '\\ud800'", "failed", "AssertionError"),
    "recursion": ("def f():\n    f()\nf()", "error", "RecursionError"),
    "nesting": ("(" * 5000, "error", "too many nested parentheses"),
    "stdin": ("input()", "error", "EOFError"),
    "sys.exit": ("import sys\nsys.exit(0)\nassert False", "exited", "SystemExit: 0"),
    "os._exit": ("import os\nos._exit(0)\nassert False", "exited", "code 0"),
    "printed pass": ("import os\nos.write(1, b'passed\\n')\nos._exit(0)", "exited", "code 0"),
    "passes in all files": (
        "import os\nfor f in range(64):\n    try:\n        os.write(f, b'passed\\n' * 99)\n"
        "    except OSError:\n        pass\nos._exit(0)", "exited", "code 0",
    ),
    "hostile message": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E", "error", "E",
    ),
    "memory": ("a = bytearray(2 << 30)", "memory", "MemoryError"),
    "growing memory": ("a = []\nwhile True:\n    a.append(bytearray(2**24))", "memory", ""),
    "thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nassert False",
        "failed", "",
    ),
    "crash": ("import signal\nsignal.raise_signal(signal.SIGSEGV)", "killed", "fault"),
}  # fmt: skip
ENDLESS = {
    "loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(60)",
    "catches all": "while True:\n    try:\n        input()\n    except BaseException:\n        pass",
    "prints without end": "while True:\n    print('x' * 10**6)",
    "closes all": "import os, time\nos.closerange(0, 99)\ntime.sleep(60)",
    "waits for a thread": "import threading, time\na = threading.Thread(target=time.sleep, args=(60,))\n"
    "a.start()\na.join()",
    }  # fmt: skip


def test_what_does_not_pass_is_told_apart(level: str):
    found = dict(zip(WRONG, run_programs(program for program, _, _ in WRONG.values()), strict=True))
    assert {name: one.reason for name, one in found.items()} == {name: one[1] for name, one in WRONG.items()}
    assert not [one for name, one in found.items() if WRONG[name][2] not in one.detail]
    assert not [one for one in found.values() if one.passed or len(one.detail) > 200]


def test_what_does_not_end_is_ended(level: str):
    found = dict(zip(ENDLESS, run_programs(ENDLESS.values(), QUICK), strict=True))
    late = Outcome(False, "timeout", "it ran for more than 0.6 s")
    assert {name: one for name, one in found.items() if one != late} == {}


REFUSED = {
    "fork": "import os\nos.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "system": "import os\nos.system('true')",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing as m\nm.get_context('spawn').Process(target=print).start()",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "socket": "import socket\nsocket.socket()",
    "connection": "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/some.sock')",
    "native code": "import ctypes\nctypes.CDLL(None)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "writing": "open('{out}/new', 'w')",
    "writing by number": "import os\nos.open('{out}/new', os.O_CREAT | os.O_WRONLY)",
    "appending": "open('{out}/old', 'a')",
    "through a link": "import os\nos.symlink('{out}', 'here')\nopen('here/new', 'w')",
    "from elsewhere": "import os\nos.chdir('{out}')\nopen('new', 'w')",
    "removing": "import os\nos.remove('{out}/old')",
    "removing from a folder": "import os\nos.unlink('old', dir_fd=os.open('{out}', os.O_RDONLY))",
    "by a number": "import os\nos.chmod(os.open('{out}/old', os.O_RDONLY), 0)",
    "removing all": "import shutil\nshutil.rmtree('{out}')",
    "renaming": "import os\nos.rename('{out}/old', 'mine')",
    "a folder": "import os\nos.mkdir('{out}/new')",
    "permissions": "import os\nos.chmod('{out}/old', 0)",
}


def test_what_reaches_outside_is_refused(level: str, tmp_path_factory: pytest.TempPathFactory):
    folders = {name: tmp_path_factory.mktemp("outside") for name in REFUSED}
    for folder in folders.values():
        (folder / "old").write_text("old")
    programs = [program.replace("{out}", str(folders[name])) for name, program in REFUSED.items()]
    found = dict(zip(REFUSED, run_programs(programs), strict=True))
    told = "PermissionError: the sandbox refuses"
    assert {name: one for name, one in found.items() if told not in one.detail or one.passed} == {}
    assert {name for name, folder in folders.items() if contents(folder) != {"old": "old"}} == set()


EVADING = {
    "writing": ("open('{out}/new', 'w')", "error", "Read-only file system"),
    "removing": ("import os\nos.remove('{out}/old')", "error", "Read-only file system"),
    "connection": (
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)",
        "error",
        "unreachable",
    ),
    "full": ("for i in range(40):\n    open(str(i), 'w').write('x' * 2**20)", "error", "No space left"),
    "its warden": ("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.1)", "passed", ""),
    "its group": ("import os\nos.killpg(0, 9)", "killed", "Killed"),
    "its warden's memory": (
        "said = open('/proc/self/status').read()\nparent = said.split('PPid:')[1].split()[0]\n"
        "open('/proc/' + parent + '/mem')", "error", "Permission denied",
    ),
}  # fmt: skip


def test_namespaces_hold_what_evades_the_hook(unguarded: None, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("outside")
    (out / "old").write_text("old")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        programs = [one.replace("{out}", str(out)).replace("{port}", port) for one, _, _ in EVADING.values()]
        found = dict(zip(EVADING, run_programs(programs), strict=True))
    assert {name: one.reason for name, one in found.items()} == {
        name: one[1] for name, one in EVADING.items()
    }
    assert not [one for name, one in found.items() if EVADING[name][2] not in one.detail]
    assert contents(out) == {"old": "old"}


def test_namespaces_leave_a_program_no_capability(unguarded: None):
    program = "said = open('/proc/self/status').read()\nassert 'CapEff:\\t0000000000000000' in said, said"
    assert run_program(program) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("end", "reason"),
    [("", "passed"), ("os._exit(0)", "exited"), ("assert 0", "failed"), ("time.sleep(60)", "timeout")],
)
def test_no_child_outlives_its_program(level: str, monkeypatch: pytest.MonkeyPatch, end: str, reason: str):
    """Not even one that left session and group; the fixture looks."""
    monkeypatch.setattr(sandbox, "_GUARD", NO_GUARD)
    assert run_program(CHILD + end, QUICK).reason == reason


@pytest.mark.slow
def test_a_folder_deeper_than_the_stack_is_removed(level: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_GUARD", NO_GUARD)  # it takes its time over a long path
    assert run_program("import os\nfor _ in range(1100):\n    os.mkdir('a')\n    os.chdir('a')").passed


def test_a_folder_without_permissions_is_removed(level: str):
    assert run_program("import os\nos.makedirs('a/b')\nos.chmod('a', 0)").passed


def test_a_program_has_a_folder_of_its_own_and_no_environment(
    level: str, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_KEY", "1")
    program = (
        "import os\nassert os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR']\n"
        f"assert os.getcwd().startswith({str(home)!r})\nassert not os.listdir()\n"
        "assert 'SECRET_KEY' not in os.environ and len(os.environ) < 9"
    )
    assert run_program(program) == Outcome(True, "passed")


def test_memory_up_to_the_limit_may_be_used():
    program = "a = bytearray(300 << 20)"
    assert run_program(program).reason == "passed"
    assert run_program(program, SandboxConfig(memory_mib=200)).reason == "memory"


def test_a_file_stays_below_the_limit(level: str):
    found = run_program("open('a', 'wb').write(bytes(3 << 20))", SandboxConfig(disk_mib=2))
    assert found.reason == "error"
    assert "File too large" in found.detail or "No space left" in found.detail


def test_a_set_has_the_same_order_every_time():
    programs = ["assert 0, list(set('gemwright sandbox'))"] * 3
    assert len({one.detail for one in run_programs(programs)}) == 1


def test_a_program_that_does_not_end_costs_its_time_and_no_more(level: str):
    start = time.monotonic()
    assert run_program("while True: pass", SandboxConfig(seconds=0.3)).reason == "timeout"
    assert 0.3 < time.monotonic() - start < 2.5


def test_many_at_once_keep_their_order():
    programs = [f"import time\ntime.sleep({0.1 * (n % 3 == 0)})\nassert {n} % 2, {n}" for n in range(24)]
    steps: list[int] = []
    found = run_programs(programs, SandboxConfig(processes=6), steps.append)
    assert [one.detail for one in found] == ["" if n % 2 else f"AssertionError: {n}" for n in range(24)]
    assert sum(steps) == 24


def test_only_so_many_run_at_a_time(home: Path):
    most, over = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, len(list(home.iterdir())))

    watcher = threading.Thread(target=count)
    watcher.start()
    run_programs(["import time\ntime.sleep(0.1)"] * 6, SandboxConfig(processes=2))
    over.set()
    watcher.join()
    assert most == 2


def test_ctrl_c_ends_all_programs(level: str, home: Path):
    def interrupt() -> None:
        while len(list(home.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_programs(["while True: pass"] * 5, SandboxConfig(seconds=50, processes=2))
    assert time.monotonic() - start < 10


def test_a_machine_without_a_way_to_run_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_WARDEN", "raise SystemExit")
    sandbox.containment.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be run here"):
        run_program("assert True")
    sandbox.containment.cache_clear()


def test_a_machine_without_namespaces_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sandbox, "_UNSHARE", ["--no-such-option"])
    sandbox.containment.cache_clear()
    assert sandbox.containment() in ("children", "group")
    assert "no namespaces here" in capsys.readouterr().err
    sandbox.containment.cache_clear()


def humaneval(data: Path) -> list[dict[str, str]]:
    with gzip.open(data / "benchmarks" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def programs_of(questions: list[dict[str, str]], form: str) -> list[str]:
    return [
        humaneval_program(one["prompt"], form.format(**one), one["test"], one["entry_point"])
        for one in questions
    ]


@pytest.mark.slow
def test_every_solution_of_humaneval_passes_and_an_empty_one_fails(data: Path):
    questions = humaneval(data)
    body, reply = "{canonical_solution}", "Here it is:\n```python\n{prompt}{canonical_solution}```\nDone."
    assert len(questions) == 164
    for form in (body, body + "\n\ndef more(", reply):
        found = run_programs(programs_of(questions, form))
        assert [one["task_id"] for one, came in zip(questions, found, strict=True) if not came.passed] == []
    assert not [one for one in run_programs(programs_of(questions, "    return None\n")) if one.passed]


def test_some_solutions_of_humaneval_pass_and_empty_ones_fail(data: Path):
    questions = humaneval(data)[::16]
    assert all(one.passed for one in run_programs(programs_of(questions, "{canonical_solution}")))
    assert not any(one.passed for one in run_programs(programs_of(questions, "    return None\n")))


def test_references_of_mbpp_pass(data: Path):
    lines = (data / "benchmarks" / "mbpp_test.jsonl").read_text(encoding="utf-8").splitlines()[::10]
    questions = [json.loads(line) for line in lines]
    found = run_programs([mbpp_program(one["code"], one["test"]) for one in questions])
    assert len(found) == 50
    assert [one["task_id"] for one, came in zip(questions, found, strict=True) if not came.passed] == []
