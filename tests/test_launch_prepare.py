"""The launch scripts prepare data on many machines: by commands that are understood, each machine its share."""

import os
import shlex

import pytest
import yaml
from launching import LAUNCH, bash, calls_of, dry_run

from refusion_jax import config as config_lib
from refusion_jax import prepare

PREPARE = ["--config", "configs/8b.py", "--out", "gs://bucket/it's", "--config.data.max_length=2048"]
PREPARES = {
    "slurm": ["slurm.sh", "prepare", "--workers", "4"],
    "tpu": ["tpu.sh", "prepare", "pod", "--slices", "2"],
    "gke": ["gke.sh", "prepare", "job", "--image", "example/refusion", "--workers", "4"],
}


def prepare_command(case: str) -> list[str]:
    """What runs on each machine, as a shell command."""
    printed = dry_run(PREPARES[case], PREPARE)
    if case == "gke":
        job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
        (container,) = job["template"]["spec"]["containers"]
        assert {e["name"]: e["value"] for e in container["env"]} == {"JOB_COMPLETIONS": "4"}
        return container["command"]
    if case == "tpu":
        printed = shlex.split(printed)[-1].removeprefix("--command=")
    (line,) = [line for line in printed.splitlines() if "-m refusion_jax.prepare" in line]
    return shlex.split(line.partition(" >>")[0])


@pytest.mark.parametrize("case", PREPARES)
def test_data_are_prepared_by_a_command_that_is_understood(case):
    words = prepare_command(case)
    parser = prepare.parser()
    arguments, config = config_lib.parse_config(parser, words[words.index("refusion_jax.prepare") + 1 :])
    assert (arguments.out, config.data.max_length) == ("gs://bucket/it's", 2048)


def test_slurm_prepares_data_as_an_array_whose_tasks_share_the_work():
    printed = dry_run(PREPARES["slurm"], PREPARE)
    assert "#SBATCH --array=0-3\n" in printed and "srun" not in printed


def test_each_tpu_worker_finds_out_which_one_it_is(tmp_path):
    """The command runs in a shell whose curl answers as the metadata server of worker 1 of 2 in slice 1 of 2 does."""
    command = shlex.split(dry_run(PREPARES["tpu"], PREPARE))[-1].removeprefix("--command=")
    lines = command[command.index("attribute()") : command.index("\nnohup")]
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_SLICE_ID: '1'\nTYPE: 'V5P'",
    }
    (tmp_path / "bin").mkdir()
    for name, text in answers.items():
        (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / "curl").write_text('#!/bin/sh\ncat "$(dirname "$0")/${4##*/}"\n')
    (tmp_path / "bin" / "curl").chmod(0o755)
    done = bash("-ec", f"{lines}\nenv", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    environ = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert prepare.which_worker(environ) == (3, 4)


def test_kubernetes_needs_no_volume_for_buckets():
    train = ["--config", "configs/8b.py", "--workdir", "gs://bucket/8b"]
    words = ["gke.sh", "start", "job", "--image", "i", "--accelerator", "nvidia-h100-80gb"]
    for printed in (dry_run(words, train), dry_run(PREPARES["gke"], PREPARE)):
        job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert [volume["name"] for volume in job["template"]["spec"]["volumes"]] == ["memory"]
    assert (
        job["backoffLimit"] > 0 and job["template"]["spec"]["restartPolicy"] == "OnFailure"
    )  # prepare: each for itself


@pytest.mark.parametrize("case", PREPARES)
def test_dry_run_prints_what_the_real_run_does(case, tmp_path):
    assert calls_of(PREPARES[case], PREPARE, tmp_path) == dry_run(PREPARES[case], PREPARE).splitlines()


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(([*words, "--config", "configs/8b.py"], "--out DIR") for words in PREPARES.values()),
        (["slurm.sh", "prepare", "--out", "gs://bucket/data"], "say what to prepare"),
        ([*PREPARES["gke"], "--config", "configs/8b.py", "--out", "/shared/data"], "/shared/data needs --claim"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = bash(LAUNCH / arguments[0], *arguments[1:])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
