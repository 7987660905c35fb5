"""Starts Python programs as one or several processes on virtual CPU devices, and waits for them with a limit."""

import importlib.metadata
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

# XLA flags: programs of tests are compiled more often than they run. Without fusion emitters that takes half the time;
# versions of XLA that no longer have the flag would end the process.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def start(
    command: list, *, folder: pathlib.Path, processes: int = 1, devices: int = 4, **environ: str
) -> list[subprocess.Popen]:
    """Starts `python *command` as so many processes of so many devices each, which meet; process n prints to n.log."""
    address = f"localhost:{free_port()}"
    started = []
    for index in range(processes):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": QUICK_TO_COMPILE,
        }
        if processes > 1:
            settings |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        with open(folder / f"{index}.log", "wb") as log:
            words = [sys.executable, *map(str, command)]
            started.append(
                subprocess.Popen(words, env=os.environ | settings | environ, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def finish(started: list[subprocess.Popen], folder: pathlib.Path, timeout: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; a process that still runs after `timeout` seconds fails the test."""
    end = time.monotonic() + timeout
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return codes, [(folder / f"{index}.log").read_text() for index in range(len(started))]


def wait_for(pattern: str, log: pathlib.Path, process: subprocess.Popen, timeout: float = 300) -> None:
    """Returns as soon as `process` has printed something that matches `pattern`."""
    end = time.monotonic() + timeout
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None and time.monotonic() < end, f"no {pattern!r} in:\n{log.read_text()}"
        time.sleep(0.01)
