"""Many processes: start-up in one place, agreement on the config, stopping together.

A run of one process needs nothing of this. With several, `initialize` comes before anything that touches a device:

* TPU pods and multi-slice find each other by themselves;
* under Slurm, one process per node (all its GPUs) or one per GPU, as `--ntasks-per-node` says;
* anywhere else each process is told the coordinator (process 0's address), their number and its own index, by flags or
  by the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.

A process that fails says so and ends at once (`together`). What started the processes then ends the others, as
`srun --kill-on-bad-exit`, a JobSet and launch/local_cpu.sh do; where nothing does, JAX's heartbeats abort them.
Starting the job again resumes it.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusion_jax.errors import UserError, report

HEARTBEAT_TIMEOUT = 60  # seconds without a sign of life after which a process counts as dead
SHUTDOWN_TIMEOUT = 60  # seconds a process that ends waits for the others to end too
GRACE = 3  # seconds for the others to come to the same error before process 0 ends, which aborts them


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Joins this process to the others, if there are others, and prints what it sees.

    Args:
      coordinator: "host:port" of process 0; None looks at the environment, then at Slurm and TPU pods.
      num_processes: how many processes there are; only with `coordinator`.
      process_id: index of this process; only with `coordinator`.
      timeout: seconds to wait for the others. When they have not all come by then, the process prints an error that
        names the coordinator and exits with code 2 (JAX itself would abort).

    Raises:
      UserError: incomplete or impossible arguments; a coordinator address that process 0 cannot listen on.
    """
    setting = _explicit(coordinator, num_processes, process_id, os.environ) or _slurm(os.environ)
    if setting or _on_tpu_vm():
        _connect(setting, timeout)
    local, everywhere = jax.local_devices(), jax.devices()
    _say(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{len(local)} local of {len(everywhere)} devices, {local[0].device_kind}"
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs the body, all that the processes do together; an error in it names this process and ends it.

    It ends at once: the shutdown of jax.distributed would wait for the others, which wait for this process. Only when a
    collective broke, as it does when another process dies, is that shutdown right: it says which one is gone. Comes
    after `initialize`; with one process it does nothing.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = 1
        with contextlib.suppress(OSError):  # the log's disk may be full too
            code = report(error, f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}")
            sys.stdout.flush()
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise SystemExit(code) from None
        time.sleep(GRACE if jax.process_index() == 0 else 0)
        os._exit(code)


def describe(mesh: jax.sharding.Mesh, batch_size: int) -> None:
    """Prints the mesh and each device's share of the global batch (rows), on process 0, before anything is compiled."""
    if jax.process_index() == 0:
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        shares = f"{batch_size / split:g} per device, {batch_size / jax.process_count():g} per process"
        _say(f"mesh {axes}; global batch {batch_size} rows, {shares}")


def of_all(value: Any) -> list[Any]:
    """What JSON can hold, of every process, in their order; a collective where there are several."""
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).reshape(-1)
    everyone = multihost_utils.process_allgather(np.pad(own, (0, sizes.max() - own.size))).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]


def check_same_config(
    config_json: str, what: str = "config", remedy: str = "Start all of them with the same config file and flags"
) -> None:
    """Makes sure that all processes run the same config, or were told the same of something else.

    Args:
      config_json: the whole config as a JSON object.
      what, remedy: for the message.

    Raises:
      UserError: on every process, naming the first field that differs, its values and the processes.
    """
    if jax.process_count() == 1:
        return
    configs = [_flatten(config) for config in of_all(json.loads(config_json))]
    for index, config in enumerate(configs):
        for field in sorted(configs[0] | config):
            ours, theirs = configs[0].get(field, "nothing"), config.get(field, "nothing")
            if ours != theirs:
                raise UserError(
                    f"the processes disagree on the {what}: {field} is {ours} on process 0 but {theirs} on process "
                    f"{index}. {remedy}."
                )


def part_of(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes its lines of a file that all write; with one process the file itself."""
    index, count = jax.process_index(), jax.process_count()
    return path if count == 1 else path.with_name(f"{path.name}.{index}-of-{count}")


def join_parts(path: pathlib.Path) -> None:
    """Appends the lines of all processes to a file, a line of each in turn, on the first process, when all are there.

    With one process there is nothing to do.
    """
    count = jax.process_count()
    if count == 1:
        return
    multihost_utils.sync_global_devices(f"parts of {path}")
    if jax.process_index() == 0:
        parts = [path.with_name(f"{path.name}.{index}-of-{count}") for index in range(count)]
        lines = [part.read_text(encoding="utf-8").split("\n")[:-1] for part in parts]
        with path.open("a", encoding="utf-8") as file:
            for turn in itertools.zip_longest(*lines):
                file.writelines(f"{line}\n" for line in turn if line is not None)
        for part in parts:
            part.unlink()


class StopSignal:
    """Turns SIGTERM (a preemption notice, `scancel`, `kill`) into a stop at a step that all processes agree on.

    With one process SIGINT (Ctrl-C) does the same, and a second signal stops at once. With several, a signal to any one
    of them is enough; JAX's preemption service spreads it and chooses the step, at no cost per step.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous = {}
        # With several processes JAX's own handler of SIGTERM, installed by `initialize`, must stay.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: object) -> None:
        self._signalled = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`; call it once per step on every process. All get the same answer."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Timer:
    """Tells all processes at the same step that some minutes have passed on the clock of process 0.

    A call is answered at the next one, so that no process waits for another or for its devices: the answer travels
    through these behind the step that was dispatched last.
    """

    def __init__(self, minutes: float):
        mesh = Mesh(np.asarray(jax.devices()), ("device",))
        self._per_device = NamedSharding(mesh, PartitionSpec("device"))
        self._anywhere = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Starts to count anew."""
        self._start, self._answer = time.monotonic(), None

    def passed(self) -> bool:
        """Whether the time had passed when this was called last; call it at the same steps on every process."""
        answer = self._answer
        passed = jax.process_index() == 0 and time.monotonic() - self._start > self._seconds
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._per_device, lambda index: np.full(1, passed, np.int32)
        )
        self._answer = self._anywhere(flags)
        return answer is not None and bool(jax.device_get(answer))


def _explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> dict | None:
    """Arguments of jax.distributed.initialize from flags, or where they are None from the environment."""
    given = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": environ.get("JAX_NUM_PROCESSES") if num_processes is None else num_processes,
        "process_id": environ.get("JAX_PROCESS_ID") if process_id is None else process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"{missing[0]} is missing: coordinator, num_processes and process_id go together (flags, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
        )
    if not re.fullmatch(r".+:\d+", given["coordinator"]):
        raise UserError(
            f'coordinator is "{given["coordinator"]}"; it must be host:port of process 0, such as 10.0.0.1:8476.'
        )
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
    except ValueError:
        raise UserError(
            f'num_processes is "{given["num_processes"]}" and process_id is "{given["process_id"]}"; '
            "both must be whole numbers."
        ) from None
    if not 0 <= index < count:
        raise UserError(
            f"process_id is {index}, num_processes is {count}: process ids run from 0 to num_processes - 1."
        )
    # An empty list of devices means all that are visible, and keeps JAX from looking for a cluster.
    return {
        "coordinator_address": given["coordinator"],
        "num_processes": count,
        "process_id": index,
        "local_device_ids": [],
    }


def _slurm(environ: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize inside an `srun` step of several tasks, else None."""
    count = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1:
        return None
    # The first host of "node7", "node7,node9", "node[007-012,020],other3" or "rack[1-2]-node5".
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes).group())
    port = environ.get("JAX_COORDINATOR_PORT") or str(61440 + int(environ["SLURM_JOB_ID"]) % 4096)
    # "2(x3),1": tasks on each node, in node order. Left to itself JAX would give every Slurm task one GPU, also where a
    # task owns its node; and where Slurm shows each task only its own GPU, that one has index 0 whatever the task's
    # number.
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(number) for number, times in runs for _ in range(int(times or 1))]
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    all_visible = tasks[int(environ["SLURM_NODEID"])] == 1 or len(visible) == 1
    return {
        "coordinator_address": f"{first}:{port}",
        "num_processes": count,
        "process_id": int(environ["SLURM_PROCID"]),
        "local_device_ids": [] if all_visible else [int(environ["SLURM_LOCALID"])],
    }


def _connect(setting: dict | None, timeout: int) -> None:
    """Calls jax.distributed.initialize with `setting`, or lets it find the TPU pod when that is None."""
    if setting:
        where = f"coordinator {setting['coordinator_address']}"
        _say(
            f"process {setting['process_id']} of {setting['num_processes']} on {socket.gethostname()}: "
            f"waiting for the others at {where} (at most {timeout} s)"
        )
        _wait_for_host_name(setting["coordinator_address"].rsplit(":", 1)[0].strip("[]"), timeout)
    else:
        where = "the TPU pod's coordinator (worker 0)"
    with _deadline(timeout, f"not all processes came together at {where} within {timeout} s"):
        try:
            jax.distributed.initialize(
                **(setting or {}),
                initialization_timeout=timeout + 30,  # later than our own, which names the coordinator
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
            )
        except (RuntimeError, ValueError, OSError) as error:
            if setting is None:  # a TPU machine that belongs to no pod has no coordinator to find
                _say(f"no TPU pod found ({str(error).splitlines()[0]}): running as one process")
                return
            raise UserError(
                f"cannot start at {where}: {str(error).splitlines()[0]}. "
                "Choose a free port, on an address of process 0 that all the others reach."
            ) from error


def _on_tpu_vm() -> bool:
    if "cpu" in os.environ.get("JAX_PLATFORMS", "") or importlib.util.find_spec("libtpu") is None:
        return False
    return pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()


def _wait_for_host_name(host: str, timeout: int) -> None:
    """Returns when `host` has an address; in a cluster that starts up, names appear late."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise UserError(
                    f'the coordinator\'s host "{host}" is unknown on {socket.gethostname()} ({error.strerror}); '
                    "give the address of process 0 as this machine reaches it."
                ) from None
        time.sleep(min(1, timeout))


@contextlib.contextmanager
def _deadline(seconds: float, message: str):
    """Ends the process when the body takes longer: JAX's connect cannot be interrupted and names no address."""

    def expire():
        hint = (
            "Check that all processes run with this address and this number of processes, and no firewall is between."
        )
        print(f"error: {message}. {hint}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")  # one write, so that processes sharing a terminal do not mix lines
    sys.stdout.flush()


def _flatten(tree: object, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict | list):
        return {prefix: json.dumps(tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        name: value
        for key, child in items
        for name, value in _flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
