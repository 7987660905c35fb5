"""Runs the launch scripts, dry or against programs that only say how they are called."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def bash(*command, cwd="/", **environ) -> subprocess.CompletedProcess:
    """Runs a script with an environment that cannot leak this process's own settings of JAX."""
    return subprocess.run(
        ["bash", *map(str, command)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(arguments: list[str], train: list[str]) -> str:
    done = bash(LAUNCH / arguments[0], *arguments[1:], "--dry-run", *train)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stubs(folder: pathlib.Path, *names: str) -> str:
    """A PATH in which the named programs only print how they are called, and what they are sent."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(
            '#!/usr/bin/env bash\nsource "$LIB"\nquoted "$(basename "$0")" "$@"\n[ -t 0 ] || cat\n'
        )
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def calls_of(arguments: list[str], train: list[str], folder: pathlib.Path) -> list[str]:
    """What a real run calls and sends, as a dry run prints it."""
    path = stubs(folder / "bin", "gcloud", "git", "sbatch", "scancel", "kubectl", "tail", "mkdir")
    done = bash(LAUNCH / arguments[0], *arguments[1:], *train, PATH=path, LIB=str(LAUNCH / "lib.sh"))
    assert done.returncode == 0, done.stderr
    called = [
        line
        for line in done.stdout.splitlines()
        if line not in ("sbatch", "kubectl apply -f -") and not line.startswith("mkdir ")
    ]
    return called
