"""Two real processes of four CPU devices each: start-up, agreement, and what happens when one of them fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from refusion_jax.errors import UserError
from refusion_jax.parallel import distributed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def start(command: list[str], *, processes: int = 2, devices: int = 4, folder, **environ: str) -> list[subprocess.Popen]:
    """Starts `command` as so many processes that find each other; process n prints into folder/n.log."""
    address = f"localhost:{free_port()}"
    started = []
    for index in range(processes):
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
        if processes > 1:
            settings |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        with open(folder / f"{index}.log", "wb") as log:
            started.append(
                subprocess.Popen([sys.executable, *command], env=os.environ | settings | environ, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def finish(started: list[subprocess.Popen], folder, timeout: float = 60) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; a process that still runs after `timeout` seconds fails the test."""
    end = time.monotonic() + timeout
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(folder / f"{index}.log").read_text() for index in range(len(started))]


def wait_for(text: str, path, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in:\n{path.read_text()}"
        time.sleep(0.02)


SCRIPT = """
import json, os, sys, time, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from refusion_jax.errors import run_main
from refusion_jax.parallel import distributed
from refusion_jax.parallel.mesh import make_mesh

def main():
    distributed.initialize(timeout=int(sys.argv[2]), heartbeat_timeout=5)
    index = jax.process_index()
    if sys.argv[1] == "disagree":
        distributed.check_same_config(json.dumps({"steps": 3, "optimizer": {"lr": [1e-4, 2e-4][index], "b1": 0.9}}))
    distributed.check_same_config(json.dumps({"steps": 3}))
    mesh = make_mesh(2, 2, 2)
    distributed.describe(mesh, 16)
    stop = distributed.StopSignal()
    ones = jax.jit(lambda: jnp.ones(8), out_shardings=NamedSharding(mesh, PartitionSpec(("data", "fsdp", "tensor"))))()
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(2000):
        time.sleep(0.02)
        assert float(total(ones)) == 8
        if stop.requested(step):
            print("stopped after step", step)
            break
        if step == 3:
            print("running")

run_main(main)
"""


def test_processes_meet_and_a_signal_to_one_stops_both_at_the_same_step(tmp_path):
    started = start(["-c", SCRIPT, "run", "60"], folder=tmp_path)
    wait_for("running", tmp_path / "0.log")
    wait_for("running", tmp_path / "1.log")
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(started, tmp_path)
    assert codes == [0, 0], outputs
    for index, output in enumerate(outputs):
        assert f"process {index} of 2: 4 local of 8 devices, cpu" in output
    assert "mesh data 2 x fsdp 2 x tensor 2; global batch 16 rows, 4 per device, 8 per process" in outputs[0]
    steps = [re.search(r"stopped after step (\d+)", output).group(1) for output in outputs]
    assert steps[0] == steps[1]


def test_killed_process_stops_the_other_with_an_error_that_names_it(tmp_path):
    started = start(["-c", SCRIPT, "run", "60"], folder=tmp_path)
    wait_for("running", tmp_path / "0.log")
    started[1].kill()
    codes, outputs = finish(started, tmp_path, timeout=60)
    assert codes[0] not in (0, None)
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\s+1\b|task:1\b", outputs[0]), outputs[0]


def test_processes_that_disagree_on_the_config_all_stop_naming_the_field(tmp_path):
    codes, outputs = finish(start(["-c", SCRIPT, "disagree", "60"], folder=tmp_path), tmp_path)
    assert codes == [2, 2], outputs
    for output in outputs:
        assert "disagree on the config: optimizer.lr is 0.0001 on process 0 but 0.0002 on process 1" in " ".join(output.split())


@pytest.mark.parametrize("index", [0, 1])
def test_waiting_for_the_others_is_bounded(index, tmp_path):
    """The coordinator alone, and a process whose coordinator is not there."""
    address = f"localhost:{free_port()}"
    alone = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
    codes, outputs = finish(start(["-c", SCRIPT, "run", "2"], processes=1, folder=tmp_path, **alone), tmp_path)
    assert codes == [2]
    assert f"error: not all processes came together at coordinator {address} within 2 s" in outputs[0]


def test_coordinator_that_no_name_server_knows():
    with pytest.raises(UserError, match='host "nowhere.invalid" is unknown'):
        distributed.initialize("nowhere.invalid:1234", 2, 1, timeout=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("host:1", None, 0), "num_processes is missing"),
        ((None, 2, 0), "coordinator is missing"),
        (("host", 2, 0), 'coordinator is "host"; it must be host:port'),
        (("host:1", 2, 2), "process ids run from 0"),
        (("host:1", "two", 0), "must be whole numbers"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed._explicit(*arguments, {})


def test_flags_go_before_the_environment():
    environ = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    setting = distributed._explicit("b:2", None, 0, environ)
    assert (setting["coordinator_address"], setting["num_processes"], setting["process_id"]) == ("b:2", 4, 0)
    assert distributed._explicit(None, None, None, {}) is None


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
PER_NODE = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
PER_GPU = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "environ, devices",
    [
        (PER_NODE, []),  # all that are visible, not just GPU 0
        (PER_NODE | {"CUDA_VISIBLE_DEVICES": "0,1"}, []),
        (PER_GPU | {"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        (PER_GPU | {"CUDA_VISIBLE_DEVICES": "1"}, []),  # bound by Slurm: the only visible one
    ],
)
def test_slurm_gives_each_process_its_gpus(environ, devices):
    assert distributed._slurm(environ) == {
        "coordinator_address": "gpu07:61441", "num_processes": 2, "process_id": 1, "local_device_ids": devices,
    }  # fmt: skip


@pytest.mark.parametrize(
    "nodes, first",
    [("n7", "n7"), ("n7,n9", "n7"), ("n[007-012,020],other3", "n007"), ("rack[1-2]-n[5,7]", "rack1-n5"), ("gpu-a.b,c", "gpu-a.b")],
)
def test_first_node_of_a_slurm_node_list(nodes, first):
    assert distributed._slurm(PER_NODE | {"SLURM_STEP_NODELIST": nodes})["coordinator_address"] == f"{first}:61441"


def test_slurm_step_of_one_task_is_one_process():
    assert distributed._slurm(PER_NODE | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed._slurm({}) is None
