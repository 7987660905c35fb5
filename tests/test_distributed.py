"""Two real processes of four CPU devices each: start-up, agreement, and what happens when one of them fails."""

import json
import pathlib
import re
import signal

import micro
import numpy as np
import pytest
from processes import finish, free_port, start, wait_for

from refusion_jax import prepare, storage
from refusion_jax.checkpoint import orbax
from refusion_jax.config import from_config_dict
from refusion_jax.errors import UserError
from refusion_jax.parallel import distributed

SCRIPT = """
import json, os, sys, time, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from refusion_jax.errors import UserError, run_main
from refusion_jax.parallel import distributed
from refusion_jax.parallel.mesh import make_mesh

def main():
    distributed.HEARTBEAT_TIMEOUT = 10
    distributed.initialize(timeout=int(sys.argv[2]))
    with distributed.together():
        run(jax.process_index())

def run(index):
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
        if sys.argv[1] == f"fail {index}" and step == 5:
            raise UserError("The disk is full. Make room.")
        if sys.argv[1] == f"break {index}" and step == 5:
            raise KeyError("a mistake")
        if stop.requested(step):
            print("stopped after step", step)
            break
        if step == 3:
            print("running")

run_main(main)
"""


@pytest.mark.parametrize("whom", [[1], [0, 1]])
def test_processes_meet_and_a_signal_stops_both_at_the_same_step(whom, tmp_path):
    """A preemption notice to one process, and to all of them as Slurm sends it."""
    started = start(["-c", SCRIPT, "run", "60"], processes=2, folder=tmp_path)
    for index in range(2):
        wait_for("running", tmp_path / f"{index}.log", started[index])
    for index in whom:
        started[index].send_signal(signal.SIGTERM)
    codes, outputs = finish(started, tmp_path)
    assert codes == [0, 0], outputs
    for index, output in enumerate(outputs):
        assert f"process {index} of 2: 4 local of 8 devices, cpu" in output
    assert "mesh data 2 x fsdp 2 x tensor 2; global batch 16 rows, 4 per device, 8 per process" in outputs[0]
    steps = [re.search(r"stopped after step (\d+)", output).group(1) for output in outputs]
    assert steps[0] == steps[1]


def check_ended(code: int, output: str, index: int) -> None:
    """A process has ended because `index` is gone, which JAX's last words name."""
    assert code != 0, output
    named = "leader task" if index == 0 else rf"Task {index} heartbeat timeout|(?s:unhealthy.*\n{index}\n)"
    assert re.search(named, output), output


@pytest.mark.parametrize("index", [0, 1])
def test_killed_process_stops_the_other_which_names_it(index, tmp_path):
    """The coordinator, whose end the others see at once, and another, whose heartbeats stop."""
    started = start(["-c", SCRIPT, "run", "60"], processes=2, folder=tmp_path)
    for log in range(2):
        wait_for("running", tmp_path / f"{log}.log", started[log])
    started[index].kill()
    codes, outputs = finish(started, tmp_path)
    check_ended(codes[1 - index], outputs[1 - index], index)


def last_words(output: str) -> str:
    """The one paragraph that says what failed."""
    assert output.count("error: ") == 1, output
    return " ".join(output[output.index("error: ") :].split())


@pytest.mark.parametrize(
    "index, how, code, error",
    [
        (0, "fail", 2, "The disk is full. Make room."),
        (1, "fail", 2, "The disk is full. Make room."),
        (1, "break", 1, "KeyError: 'a mistake'"),
    ],
)
def test_process_that_fails_alone_says_so_and_ends_and_the_others_end(index, how, code, error, tmp_path):
    """No process manager is here to end the others: JAX does."""
    codes, outputs = finish(
        start(["-c", SCRIPT, f"{how} {index}", "60"], processes=4, devices=2, folder=tmp_path), tmp_path
    )
    assert codes[index] == code, outputs
    assert re.fullmatch(rf"error: process {index} of 4 on \S+: {re.escape(error)}", last_words(outputs[index]))
    assert ("Traceback" in outputs[index]) == (how == "break")
    for other in {0, 1, 2, 3} - {index}:
        check_ended(codes[other], outputs[other], index)


def test_processes_that_disagree_on_the_config_all_stop_naming_the_field(tmp_path):
    codes, outputs = finish(start(["-c", SCRIPT, "disagree", "60"], processes=2, folder=tmp_path), tmp_path)
    assert codes == [2, 2], outputs
    for index, output in enumerate(outputs):
        assert re.fullmatch(
            rf"error: process {index} of 2 on \S+: the processes disagree on the config: optimizer.lr is 0.0001 on "
            r"process 0 but 0.0002 on process 1\. .*",
            last_words(output),
        )


@pytest.mark.parametrize("index", [0, 1])
def test_waiting_for_the_others_is_bounded(index, tmp_path):
    """The coordinator alone, and a process whose coordinator is not there."""
    address = f"localhost:{free_port()}"
    alone = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
    codes, outputs = finish(start(["-c", SCRIPT, "run", "2"], folder=tmp_path, **alone), tmp_path)
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
        "coordinator_address": "gpu07:61441",
        "num_processes": 2,
        "process_id": 1,
        "local_device_ids": devices,
    }


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n7", "n7"),
        ("n7,n9", "n7"),
        ("n[007-012,020],other3", "n007"),
        ("rack[1-2]-n[5,7]", "rack1-n5"),
        ("gpu-a.b,c", "gpu-a.b"),
    ],
)
def test_first_node_of_a_slurm_node_list(nodes, first):
    assert distributed._slurm(PER_NODE | {"SLURM_STEP_NODELIST": nodes})["coordinator_address"] == f"{first}:61441"


def test_slurm_step_of_one_task_is_one_process():
    assert distributed._slurm(PER_NODE | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed._slurm({}) is None


# --- The training job.

STEPS = 12
# The trainer, for tests that interrupt it: it rests after every step, as a signal takes JAX up to a second to notice,
# and a dead process is noticed sooner than by default.
PATIENT = """
import time
from refusion_jax import train
from refusion_jax.errors import run_main
from refusion_jax.parallel import distributed
distributed.HEARTBEAT_TIMEOUT = 10
requested = distributed.StopSignal.requested
distributed.StopSignal.requested = lambda self, step: (time.sleep(0.3), requested(self, step))[1]
run_main(train.main)
"""


class Job:
    """Trains the micro config on a 2x2x2 mesh in one process or in two, in the run's own folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        micro.write_examples(folder / "data.json")

    def start(
        self, name: str, processes: int, program: tuple[str, str] = ("-m", "refusion_jax.train"), *overrides: str
    ) -> list:
        logs = self.folder / name
        logs.mkdir(exist_ok=True)
        mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
        config = f"{pathlib.Path(micro.__file__)}:steps={STEPS},data={self.folder / 'data.json'}"
        return start(
            [
                *program,
                "--config",
                config,
                *mesh,
                "--config.data.evaluation=[]",
                "--config.keep_last=99",
                "--workdir",
                logs / "run",
                *overrides,
            ],
            folder=logs,
            processes=processes,
            devices=8 // processes,
            JAX_COMPILATION_CACHE_DIR=str(self.folder / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )

    def finish(self, name: str, started: list) -> list[str]:
        codes, outputs = finish(started, self.folder / name)
        assert codes == [0] * len(started), "\n".join(outputs)
        return outputs

    def run(self, name: str, processes: int) -> list[str]:
        return self.finish(name, self.start(name, processes))

    def history(self, name: str) -> dict[int, dict[str, float]]:
        """What was measured at each step, rates aside; no step may come twice."""
        records = [json.loads(line) for line in (self.folder / name / "run" / "metrics.jsonl").read_text().splitlines()]
        measured = ("loss", "ar_loss", "mdm_loss", "ar_tokens", "mdm_tokens", "examples", "tokens", "grad_norm", "lr")
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return {record["step"]: {key: record[key] for key in measured} for record in records}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Runs "one" and "two", never interrupted: by one process of eight devices, by two of four."""
    job = Job(tmp_path_factory.mktemp("job"))
    started = {name: job.start(name, processes) for name, processes in (("one", 1), ("two", 2))}
    for name, processes in started.items():
        job.finish(name, processes)
    return job


def assert_close(job: Job, name: str, other: str) -> None:
    """The same examples in the same order, losses and gradients up to the order of sums."""
    ours, theirs = job.history(name), job.history(other)
    assert set(ours) == set(theirs) == set(range(1, STEPS + 1))
    for step in ours:
        for key, value in ours[step].items():
            tolerance = (
                0
                if key in ("ar_tokens", "mdm_tokens", "examples", "tokens", "lr")
                else 1e-4
                if key == "grad_norm"
                else 1e-5
            )
            np.testing.assert_allclose(value, theirs[step][key], rtol=tolerance, err_msg=f"{key} of step {step}")


def test_two_processes_train_as_one_does(job):
    assert_close(job, "two", "one")
    assert orbax.steps_in(job.folder / "two" / "run") == orbax.steps_in(job.folder / "one" / "run")


def test_one_two_and_one_process_go_on_at_the_same_example_in_a_bucket(job, bucket):
    """The run's folder and its data are in the bucket; each takes over in the middle of an epoch."""
    address, name, config = f"{bucket}/changing/run", "changing", f"data={job.folder / 'data.json'}"
    prepare.prepare(from_config_dict(micro.get_config(config)).data, f"{bucket}/changing/data")
    overrides = "--workdir", address, f"--config.data.store={bucket}/changing/data", "--config.checkpoint_every_steps=4"
    for begin, processes in ((0, 1), (4, 2), (8, 1)):
        for later in orbax.steps_in(address):
            if later > begin:
                (storage.as_path(address) / "checkpoints" / str(later)).rmtree()
        started = job.start(name, processes, ("-m", "refusion_jax.train"), *overrides)
        output = job.finish(name, started)[0]
        assert (f"resumed from step {begin}" if begin else "random weights") in output
        rows = int(re.search(r"average in (\d+) rows", output).group(1))
        assert begin == 0 or begin * micro.get_config(config).batch_size % rows
    (job.folder / name / "run").mkdir()
    metrics = storage.read(storage.as_path(address) / "metrics.jsonl")
    (job.folder / name / "run" / "metrics.jsonl").write_bytes(metrics)
    assert_close(job, name, "one")


def assert_same(job: Job, name: str, other: str) -> None:
    """Bit for bit."""
    assert job.history(name) == job.history(other)
    ours, theirs = (micro.read_checkpoint(job.folder / run / "run", STEPS) for run in (name, other))
    assert set(ours) == set(theirs)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_signal_to_one_saves_on_both_and_the_run_resumes(job):
    started = job.start("signal", 2, ("-c", PATIENT))
    wait_for(r"step 3/", job.folder / "signal" / "0.log", started[0])
    started[1].send_signal(signal.SIGTERM)
    outputs = job.finish("signal", started)
    stopped = int(re.search(r"stopped after step (\d+)", outputs[0]).group(1))
    assert stopped == orbax.steps_in(job.folder / "signal" / "run")[-1] == max(job.history("signal")) < STEPS
    assert f"resumed from step {stopped}" in job.run("signal", 2)[0]
    assert_same(job, "signal", "two")


# The trainer, with clocks on which it is time to save after every step, but only on process 0.
CLOCK = """
import os
from refusion_jax import train
from refusion_jax.errors import run_main
from refusion_jax.parallel import distributed
Timer = distributed.Timer
distributed.Timer = lambda minutes: Timer(minutes if os.environ["JAX_PROCESS_ID"] == "0" else 1e9)
run_main(train.main)
"""


def test_clock_of_the_first_process_says_when_both_save(job):
    """Asked after a step it answers after the next one, so that every second step is saved."""
    by_time = ["--config.checkpoint_every_steps=0", "--config.checkpoint_every_minutes=1e-9"]
    job.finish("clock", job.start("clock", 2, ("-c", CLOCK), *by_time))
    assert orbax.steps_in(job.folder / "clock" / "run") == list(range(2, STEPS + 1, 2))
    assert_same(job, "clock", "two")


def test_killed_process_stops_the_other_and_the_run_resumes(job):
    started = job.start("killed", 2, ("-c", PATIENT))
    wait_for(r"step 5/", job.folder / "killed" / "0.log", started[0])
    started[1].kill()
    codes, outputs = finish(started, job.folder / "killed")
    check_ended(codes[0], outputs[0], 1)
    last = orbax.steps_in(job.folder / "killed" / "run")[-1]
    assert 2 <= last < STEPS
    assert f"resumed from step {last}" in job.run("killed", 2)[0]
    assert_same(job, "killed", "two")


# The trainer, with a disk that takes only small files from process WHO once there is a checkpoint.
FULL = """
import os, resource, signal, subprocess, sys, time
log = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # what is printed goes to another disk
for stream in (1, 2):
    os.dup2(log.stdin.fileno(), stream)
log.stdin.close()
def leave(code, leave=os._exit):
    os.close(1)
    os.close(2)
    log.wait()
    leave(code)
os._exit = leave

from refusion_jax import train
from refusion_jax import prepare, storage
from refusion_jax.checkpoint import orbax
from refusion_jax.config import from_config_dict
from refusion_jax.errors import run_main
from refusion_jax.parallel import distributed
distributed.HEARTBEAT_TIMEOUT = 10
requested = distributed.StopSignal.requested
def fill(self, step):
    if step == 3 and os.environ["JAX_PROCESS_ID"] == "WHO":
        while not orbax.steps_in(sys.argv[sys.argv.index("--workdir") + 1]):
            time.sleep(0.01)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    return requested(self, step)
distributed.StopSignal.requested = fill
run_main(train.main)
"""


@pytest.mark.parametrize("index", [0, 1])
def test_checkpoint_that_one_process_cannot_write_stops_both_and_the_run_resumes(job, index):
    name = f"full {index}"
    codes, outputs = finish(job.start(name, 2, ("-c", FULL.replace("WHO", str(index)))), job.folder / name)
    assert codes[index] == 2 and codes[1 - index] != 0, outputs
    assert f"error: process {index} of 2 on " in outputs[index]
    assert "A checkpoint could not be written to" in " ".join(outputs[index].split())
    last = orbax.steps_in(job.folder / name / "run")[-1]
    assert f"resumed from step {last}" in job.run(name, 2)[0]
    assert_same(job, name, "two")
