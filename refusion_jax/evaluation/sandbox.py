"""Runs a program that nobody has read: of a model, to see whether it does what was asked.

Each is a fresh interpreter (`python -I`) in a folder of its own, in a session of its own, with limits of time, memory,
processes and files, watched by supervisor.py. Where the system lets a user make namespaces (`unshare`), it also has no
network, sees no process but its own, and can write nowhere but into its folder; `strength` says which. The process that
holds the model is never forked.

This keeps accidents in. It is no wall against an attacker: for code that means harm use a machine that you can lose.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

SUPERVISOR = pathlib.Path(__file__).with_name("supervisor.py")
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child"]
GRACE = 10  # seconds that the supervisor may take besides the program's own


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use: wall-clock seconds, bytes of memory and of files, processes at a time."""

    seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 64 << 20
    processes: int = 16


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program came to its end without an error; the reason why not."""

    passed: bool
    reason: str = ""


@functools.cache
def namespaces() -> tuple[str, ...]:
    """The command that puts a program into namespaces of its own; empty where a program does not run well in them."""
    works = shutil.which("unshare") is not None and _run("", Limits(), NAMESPACES).passed
    return tuple(NAMESPACES) if works else ()


def strength() -> str:
    """What the sandbox keeps in on this machine, in a line."""
    if namespaces():
        return "own namespaces: no network, no other processes, all file systems read-only but a small folder"
    return "limits only (the system allows no namespaces): programs can reach the network and the user's files"


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a program to its end.

    Returns:
      passed: its last line was reached and it ended with code 0, so an early `sys.exit(0)` is no success.
    """
    return _run(program, limits, namespaces())


def _run(program: str, limits: Limits, within: Sequence[str]) -> Outcome:
    token = secrets.token_hex(8)
    text = f"{program}\n\n__import__('os').write(int(__import__('sys').argv[1]), b'{token}')\n"
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        order = dataclasses.asdict(limits) | {"folder": folder, "token": token}
        environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        process = subprocess.Popen(
            [*within, sys.executable, "-I", str(SUPERVISOR), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(text.encode("utf-8", "surrogatepass"), limits.seconds + GRACE)
        except subprocess.TimeoutExpired as error:  # it holds its supervisor up, which may have said what it saw
            said = error.output or b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Outcome(**json.loads(said)) if said else Outcome(False, "killed its supervisor")


def run_all(programs: Sequence[str], limits: Limits = Limits(), workers: int = 0) -> Iterator[Outcome]:
    """Outcomes in the order of the programs, several run at a time.

    Args:
      workers: how many; 0: one for each processor.
    """
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        yield from pool.map(lambda program: run(program, limits), programs)
