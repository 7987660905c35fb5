"""The launch scripts: valid shell, dry runs that tell the truth, commands that the trainer accepts."""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import micro
import processes
import pytest
import yaml
from launching import LAUNCH, ROOT, bash, calls_of, dry_run

from refusion_jax import config as config_lib
from refusion_jax import serve
from refusion_jax.serving import metrics

TRAIN = ["--config", "configs/8b.py", "--workdir", "/shared/it's mine/8b", "--config.optimizer.lr=1e-5"]
GKE = ["--image", "example/refusion", "--claim", "disk"]

# Every script with an action that starts training, and what the trainer gets beside TRAIN.
STARTS = {
    "local_cpu": (["local_cpu.sh"], []),
    "local_cpu, 2 processes": (["local_cpu.sh", "--processes", "2"], []),
    "slurm": (["slurm.sh", "submit", "--nodes", "2"], []),
    "slurm, process per GPU": (["slurm.sh", "submit", "--process-per", "gpu", "--sbatch", "--partition=a100"], []),
    "tpu": (["tpu.sh", "start", "pod", "--zone", "us-east5-a"], []),
    "tpu, 2 slices": (["tpu.sh", "start", "pod", "--slices", "2"], ["--config.mesh.data=2"]),
    "gke tpu": (["gke.sh", "start", "job", *GKE, "--accelerator", "tpu-v5p-slice", "--topology", "4x4x4"], []),
    "gke tpu, 2 slices": (
        ["gke.sh", "start", "job", *GKE, "--accelerator", "tpu-v6e-slice", "--topology", "4x4", "--slices", "2"],
        ["--config.mesh.data=2"],
    ),
    "gke gpu": (["gke.sh", "start", "job", *GKE, "--accelerator", "nvidia-h100-80gb", "--nodes", "2"], []),
}
OTHERS = [
    ["slurm.sh", "stop", "123"],
    ["slurm.sh", "logs", "123"],
    ["tpu.sh", "create", "pod", "--type", "v5p-128", "--slices", "2", "--spot", "--project", "p"],
    *(["tpu.sh", action, "pod"] for action in ("logs", "status", "stop", "delete")),
    *(["gke.sh", action, "job"] for action in ("logs", "stop", "unserve")),
]
SERVE = ["--checkpoint", "/shared/it's mine/8b", "--gen-length=256"]
GPU = ["gke.sh", "serve", "model", *GKE, "--accelerator", "nvidia-h100-80gb", "--gpus-per-node", "1"]
TPU = ["gke.sh", "serve", "model", *GKE, "--accelerator", "tpu-v6e-slice", "--topology", "2x2"]


def test_trainer_has_the_flags_that_the_scripts_use():
    done = subprocess.run(
        [sys.executable, "-m", "refusion_jax.train", "--help"], capture_output=True, text=True, check=True
    )
    assert "--config" in done.stdout and "--workdir" in done.stdout


@pytest.mark.parametrize("script", [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name)
def test_script_is_valid_shell(script):
    done = bash("-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def train_arguments(printed: str) -> list[list[str]]:
    """Arguments of each training command in a dry run's output."""
    if printed.startswith("apiVersion"):
        job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]
        words = [job["spec"]["template"]["spec"]["containers"][0]["command"]]
    else:
        words = []
        for word in shlex.split(printed, comments=False):
            if word.startswith("--command="):  # what runs on a TPU worker
                words += [
                    shlex.split(line) for line in word.removeprefix("--command=").splitlines() if "-m refusion" in line
                ]
        words += [shlex.split(line) for line in printed.splitlines() if line.startswith(("env ", "srun "))]
    found = []
    for line in words:
        start = line.index("refusion_jax.train") + 1
        assert line[start - 3 : start - 1] == ["python", "-m"]
        end = line.index(">>") if ">>" in line else len(line)
        found.append(line[start:end])
    return found


@pytest.mark.parametrize("case", STARTS)
def test_dry_run_prints_a_command_that_the_trainer_accepts(case):
    arguments, added = STARTS[case]
    commands = train_arguments(dry_run(arguments, TRAIN))
    assert commands == [added + TRAIN] * (2 if "processes" in case else 1)
    parser = argparse.ArgumentParser()
    config_lib.add_config_arguments(parser)
    parser.add_argument("--workdir")
    _, config = config_lib.parse_config(parser, commands[0])
    assert config.optimizer.lr == 1e-5
    assert config.mesh.data == (2 if "2 slices" in case else 1)


@pytest.mark.parametrize(
    "arguments, train",
    [
        *((value[0], TRAIN) for name, value in STARTS.items() if "local" not in name),
        *((a, []) for a in OTHERS),
        (GPU, SERVE),
    ],
)
def test_dry_run_prints_what_the_real_run_does(arguments, train, tmp_path):
    assert calls_of(arguments, train, tmp_path) == dry_run(arguments, train).splitlines()


def test_gke_manifest_asks_for_the_right_machines():
    def job(case):
        return yaml.safe_load(dry_run(STARTS[case][0], TRAIN))["spec"]["replicatedJobs"][0]

    tpu = job("gke tpu, 2 slices")
    assert tpu["replicas"] == 2  # slices
    spec = tpu["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4  # 4x4 chips on hosts of 4
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    gpu = job("gke gpu")["template"]["spec"]
    assert gpu["parallelism"] == 2
    container = gpu["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    names = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert names["JAX_COORDINATOR_ADDRESS"] == "job-workers-0-0.job:8476"
    assert names["JAX_NUM_PROCESSES"] == "2"


def test_gke_serves_with_probes_budget_and_scaling_on_the_queue():
    printed = dry_run([*GPU, "--replicas", "2", "--max-replicas", "5"], SERVE)
    deployment, service, budget, scaling = yaml.safe_load_all(printed)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    flags = container["command"][3:]
    assert container["command"][:3] == ["python", "-m", "refusion_jax.serve"] and flags[-len(SERVE) :] == SERVE
    arguments = serve.arguments_of(flags)
    assert arguments.host == "0.0.0.0" and arguments.port == container["ports"][0]["containerPort"]
    assert serve.read_keys(arguments) == []  # --no-key: a gateway asks for one
    assert pod["spec"]["terminationGracePeriodSeconds"] > arguments.grace
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/health", "liveness": "/ping"}
    for found in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert found.items() <= pod["metadata"]["labels"].items()
    assert budget["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert (scaling["spec"]["minReplicas"], scaling["spec"]["maxReplicas"]) == (2, 5)
    metric = scaling["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"{metric}{{" in metrics.Metrics("tiny").text().decode()


def test_gke_serves_on_tpus_with_keys_from_a_secret():
    deployment = next(yaml.safe_load_all(dry_run([*TPU, "--keys", "my-keys"], SERVE)))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = serve.arguments_of(container["command"][3:])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (secret,) = [volume for volume in pod["volumes"] if "secret" in volume]
    assert secret["secret"] == {"secretName": "my-keys"}
    assert str(arguments.api_key_file) == f"{mounts[secret['name']]}/keys" and not arguments.no_key
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_containers_run_as_a_user_without_rights():
    users = re.findall(r"(?m)^USER (.*)$", (LAUNCH / "Dockerfile").read_text())
    assert users and users[-1] not in ("0", "root")


def test_slurm_batch_script_is_valid_and_has_the_tasks_asked_for():
    per_node = dry_run(STARTS["slurm"][0], TRAIN)
    per_gpu = dry_run(STARTS["slurm, process per GPU"][0], TRAIN)
    assert "#SBATCH --ntasks-per-node=1\n" in per_node and "#SBATCH --nodes=2\n" in per_node
    assert "#SBATCH --ntasks-per-node=8\n" in per_gpu and "#SBATCH --partition=a100\n" in per_gpu
    for script in (per_node, per_gpu):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["local_cpu.sh", "--config", "configs/8b.py"], "--workdir DIR"),
        (["local_cpu.sh", "--workdir", "x"], "--config configs/tiny.py"),
        (
            ["local_cpu.sh", "--config=configs/9b.py:steps=3", "--workdir=x"],
            "no such config in the repository: configs/9b.py",
        ),
        (["local_cpu.sh", "--devices", "8", "--processes", "3", *TRAIN], "cannot be shared evenly"),
        (["slurm.sh", "submit", "--process-per", "rack", *TRAIN], "--process-per is rack"),
        (["slurm.sh", "stop"], "needs the number of the job"),
        (["tpu.sh", "create", "pod", "--type", "h100-8"], "--type is 'h100-8'"),
        (["tpu.sh", "start", "--zone", "z"], "needs the name of the TPU"),
        (["tpu.sh", "begin", "pod"], "unknown action begin"),
        (["gke.sh", "start", "job", *GKE, "--accelerator", "tpu-v5p-slice", *TRAIN], "--topology is ''"),
        (["gke.sh", "start", "job", "--accelerator", "tpu-v5p-slice", *TRAIN], "start needs --image"),
        (["gke.sh", "start", "job", "--image", "i", *TRAIN], "start needs --accelerator"),
        (["gke.sh", "start", "job", "--image", "i", "--accelerator", "nvidia-h100-80gb", *TRAIN], "needs --claim"),
        (["gke.sh", "start", "job", "--image"], "--image needs a value"),
        (["gke.sh", "serve", "model", "--image", "i", "--accelerator", "tpu-v6e-slice", *SERVE], "serve needs --claim"),
        (GPU, "say what to serve"),
        ([*GPU, "--replicas", "3", "--max-replicas", "2", *SERVE], "--max-replicas '2'"),
        ([*GPU, *SERVE, "--port", "80"], "--port is this script's"),
        ([*TPU[:-1], "4x4", *SERVE], "a server runs on one host"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = bash(LAUNCH / arguments[0], *arguments[1:])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr


# A Python that only pretends: it makes an empty environment and writes down every pip call and every training.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c import sys, venv"*) exit 0 ;;
  --version) echo Python 3.11 ;;
  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate" ;;
  "-m pip"*) echo "$@" >> "$CALLS" ;;
  "-c import socket"*) echo 4242 ;;
  *) place="${JAX_COORDINATOR_ADDRESS:-} ${JAX_NUM_PROCESSES:-} ${JAX_PROCESS_ID:-}"
    echo "${JAX_NUM_CPU_DEVICES:-} $place $*" >> "$CALLS"
    if [ "${HANGING:-nobody}" = "${JAX_PROCESS_ID:-}" ]; then exec sleep 1000; fi
    if [ -n "${UNTIL_STOPPED:-}" ]; then trap 'echo stopped >> "$CALLS"; exit 0' TERM; while :; do sleep 0.05; done; fi
    exit ${JAX_PROCESS_ID:-0} ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A repository with the scripts and no environment, and a folder with the pretended Python."""
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    for name in ("setup.py", "configs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "clone"


def test_environment_is_made_once_and_again_when_it_must_change(clone, tmp_path):
    calls = tmp_path / "calls"

    def activate(extras: str) -> int:
        done = bash(
            "-euo",
            "pipefail",
            "-c",
            f"source {clone}/launch/env.sh; command -v python",
            REFUSION_EXTRAS=extras,
            REFUSION_PYTHON=str(tmp_path / "python"),
            CALLS=str(calls),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{clone}/.venv/bin/python"
        return len(calls.read_text().splitlines())

    assert activate("test") == 1
    assert f"-e {clone}[test]" in calls.read_text()
    assert activate("test") == 1
    assert activate("") == 1  # a part of what is there
    assert activate("demo,test") == 2
    assert activate("demo") == 2
    with open(clone / "setup.py", "a") as setup:
        setup.write("# another dependency\n")
    assert activate("demo") == 3


def test_python_that_is_too_old_or_missing_is_named(clone):
    done = bash("-c", f"source {clone}/launch/env.sh && echo yes", REFUSION_PYTHON="python2.7")
    assert done.returncode != 0 and "yes" not in done.stdout
    assert "no Python 3.11 or newer" in done.stderr and "python2.7" in done.stderr


def test_local_processes_get_their_number_and_the_first_failure_is_the_result(clone, tmp_path):
    calls = tmp_path / "calls"
    environ = {"REFUSION_PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
    done = bash(clone / "launch/local_cpu.sh", "--devices", "6", "--processes", "2", *TRAIN, **environ)
    assert done.returncode == 1, done.stderr  # the pretended process 1 fails with its number
    train = " ".join(["-m refusion_jax.train", *TRAIN])
    assert sorted(calls.read_text().splitlines()[1:]) == [f"3 localhost:4242 2 {index} {train}" for index in range(2)]
    calls.unlink()
    assert bash(clone / "launch/local_cpu.sh", *TRAIN, **environ).returncode == 0
    assert calls.read_text().splitlines() == [f"8    {train}"]


def test_local_process_that_fails_ends_one_that_waits_for_it_and_is_named(clone, tmp_path):
    environ = {"REFUSION_PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls"), "HANGING": "0"}
    done = bash(clone / "launch/local_cpu.sh", "--processes", "2", *TRAIN, **environ)
    assert done.returncode == 1
    assert "process 1 of 2 ended with status 1; the others are ended too" in done.stderr


def test_slurm_and_kubernetes_end_all_processes_when_one_fails():
    assert "\nsrun --kill-on-bad-exit=1 " in dry_run(STARTS["slurm"][0], TRAIN)
    for case in ("gke tpu, 2 slices", "gke gpu"):
        jobs = yaml.safe_load(dry_run(STARTS[case][0], TRAIN))["spec"]
        assert jobs["failurePolicy"]["maxRestarts"] > 0  # a Job that fails restarts the whole set
        job = jobs["replicatedJobs"][0]["template"]["spec"]
        assert job["backoffLimit"] == 0  # a worker that fails fails its Job
        assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_signal_to_the_local_script_stops_every_process(clone, tmp_path):
    calls = tmp_path / "calls"
    environ = {
        "PATH": os.environ["PATH"],
        "REFUSION_PYTHON": str(tmp_path / "python"),
        "CALLS": str(calls),
        "UNTIL_STOPPED": "yes",
    }
    script = subprocess.Popen(["bash", clone / "launch/local_cpu.sh", "--processes", "2", *TRAIN], env=environ)
    try:
        end = time.monotonic() + 30
        while not calls.exists() or calls.read_text().count("refusion_jax.train") < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)  # the pretended processes have yet to say what they do on a signal
        script.send_signal(signal.SIGTERM)
        assert script.wait(30) == 0
    finally:
        script.kill()
    assert calls.read_text().count("stopped") == 2


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Cell after cell as IPython would, with a small run in place of the one in the settings; %pip is left out."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XLA_FLAGS", processes.QUICK_TO_COMPILE)
    micro.write_examples(tmp_path / "data.json")
    settings = {
        "CONFIG": f"tests/micro.py:steps=6,data={tmp_path / 'data.json'}",
        "WORKDIR": str(tmp_path / "run"),
        "EXAMPLES": 2,
        "LENGTH": 32,
        "REPOSITORY": "",
    }
    printed = []

    def shell(command: str) -> None:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)

    names = {"shell": shell}
    cells = [cell for cell in json.loads((LAUNCH / "colab.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        code = "".join(cell["source"])
        assert cell["outputs"] == []
        code = re.sub(r"(?m)^( *)!(.*)$", r"\1shell(f'''\2''')", code)
        code = re.sub(r"(?m)^( *)%pip .*$", r"\1pass", code)
        exec(compile(code, "colab.ipynb", "exec"), names)  # noqa: S102
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(settings) <= set(names)
            names |= settings
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "run" / "decode.png").stat().st_size > 1000
    text = "\n".join(printed)
    assert "step 6/6" in text and "plan_and_infill" in text and "autoregressive" in text


def test_quickstart_runs_the_commands_in_order(clone, tmp_path):
    calls = tmp_path / "calls"
    environ = {
        "REFUSION_PYTHON": str(tmp_path / "python"),
        "CALLS": str(calls),
        "REFUSION_WORKDIR": str(tmp_path / "run"),
    }
    (tmp_path / "run").mkdir()
    done = bash(clone / "launch/quickstart.sh", "--config.seed=1", **environ)
    assert done.returncode == 0, done.stderr
    install, train, *tools = [line.split() for line in calls.read_text().splitlines()]
    assert install[-1] == f"{clone}[demo,eval]"
    assert train == [
        "-m",
        "refusion_jax.train",
        "--config",
        "configs/tiny.py",
        "--workdir",
        str(tmp_path / "run"),
        "--config.seed=1",
    ]
    for name, module, *_ in tools:
        assert (ROOT / (module.replace(".", "/") + ".py" if name == "-m" else name)).is_file()
