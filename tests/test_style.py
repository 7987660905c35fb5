"""The code is formatted and checked as ruff.toml says, and as short as the project promises."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=["format", "check"])
def test_ruff_has_nothing_to_say(repository, command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--config", "tests/ruff.toml", "--no-cache", "."],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_short(repository):
    long = {
        str(path.relative_to(repository)): lines
        for path in (repository / "refusion_jax").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
