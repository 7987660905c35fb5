"""Runs in object storage: saved whole, resumed to the bit wherever killed, read by all that reads checkpoints."""

import json
import pathlib
import random
import runpy
import signal
import sys
import time

import jobs
import micro
import numpy as np
import pytest
from processes import finish, wait_for

from refusion_jax import generate, prepare, storage
from refusion_jax.checkpoint import load, orbax
from refusion_jax.config import from_config_dict
from refusion_jax.errors import UserError

STEPS = 12


class Job(jobs.Job):
    """Trains the micro config on one device with its data in the bucket, a checkpoint every second step."""

    def __init__(self, folder: pathlib.Path, bucket: str):
        super().__init__(folder, STEPS)
        self.bucket = bucket
        config = from_config_dict(micro.get_config(f"data={folder / 'data.json'}"))
        prepare.prepare(config.data, f"{bucket}/data")

    def start(self, name: str, *overrides: str, workdir: str = ""):
        more = f"--config.data.store={self.bucket}/data", "--config.keep_last=99"
        return super().start(name, *overrides, *more, workdir=workdir)


@pytest.fixture(scope="module")
def job(tmp_path_factory, bucket):
    """With a run "whole" on the disk, never interrupted."""
    job = Job(tmp_path_factory.mktemp("buckets"), bucket)
    job.finish("whole", job.start("whole"))
    return job


@pytest.fixture(scope="module")
def run(job):
    """Address of a run that was killed again and again, mostly while it saved."""
    address, chance = f"{job.bucket}/run", random.Random(0)
    for _ in range(3):
        before = len(orbax.steps_in(address))
        process = job.start("killed", workdir=address)
        wait_for(r"resumed from step|random weights", job.folder / "killed" / "0.log", process)
        end = time.monotonic() + 120
        while len(orbax.steps_in(address)) == before and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in orbax.steps_in(address):
            assert orbax.read_meta(address, step)["step"] == step
    job.finish("killed", job.start("killed", workdir=address))
    return address


def test_killed_and_resumed_it_has_the_same_bits(job, run):
    steps = orbax.steps_in(run)
    assert steps[-1] == STEPS and set(steps) <= set(range(2, STEPS + 1, 2))
    for step in steps:
        ours = micro.read_checkpoint(storage.as_path(run), step)
        theirs = micro.read_checkpoint(job.folder / "whole" / "run", step)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{name} of step {step}")


def losses(path):
    records = [json.loads(line) for line in storage.read(storage.as_path(path) / "metrics.jsonl").splitlines()]
    return {(r["kind"], r["step"]): r["loss"] for r in records}


def test_its_metrics_are_there_once(job, run):
    whole, ours = losses(job.folder / "whole" / "run"), losses(run)
    assert ours[("train", STEPS)] == whole[("train", STEPS)]
    assert all(whole[key] == loss for key, loss in ours.items())


def test_an_unfinished_upload_is_no_checkpoint(run):
    last = orbax.checkpoint_path(run)
    part = storage.as_path(run).parent / "part" / "checkpoints" / "99"
    storage.copy_folder(last, part)
    (part / "commit_success.txt").unlink()
    assert orbax.steps_in(part.parent.parent) == []
    with pytest.raises(UserError, match="There is no complete checkpoint in gs://"):
        orbax.read_meta(part.parent.parent)


def test_what_reads_checkpoints_reads_them_there(job, run, repository, monkeypatch, capsys):
    here = job.folder / "whole" / "run"
    assert load.fingerprint(run) == load.fingerprint(here)
    assert load.load_model_config(run) == load.load_model_config(here)
    assert load.load_tokenizer_for(run).fingerprint == "bytes-1"
    picture = f"{job.bucket}/loss.png"
    for tool, *arguments in (["inspect_checkpoint", run], ["plot", run, "--out", picture]):
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        runpy.run_path(str(repository / "tools" / f"{tool}.py"))["main"]()
    assert f"shown is step {STEPS}" in capsys.readouterr().out
    assert storage.read(storage.as_path(picture)).startswith(b"\x89PNG")
    for checkpoint in (run, str(here)):
        generate.main(["--checkpoint", checkpoint, "--prompt", "1 and 7", "--gen-length", "8", "--slot-size", "4"])
    said = capsys.readouterr().out.splitlines()
    assert said and said[: len(said) // 2] == said[len(said) // 2 :]


def test_weights_to_start_from_may_be_in_a_bucket(job, run):
    output = job.finish("begun", job.start("begun", f"--config.init_from={run}", workdir=f"{job.bucket}/begun"))
    assert f"weights from {run}" in output and orbax.steps_in(f"{job.bucket}/begun")[-1] == STEPS


def test_a_bucket_that_is_not_there_is_named_before_the_data_are_read(job):
    (code,), (output,) = finish([job.start("nobody", workdir="gs://nobody/run")], job.folder / "nobody")
    assert code == 2 and "Cannot write to gs://nobody/run" in " ".join(output.split())
    assert "tokenised" not in output and "compiled" not in output
    with pytest.raises(UserError, match="There is no folder 'gs://nobody/run'"):
        load.locate("gs://nobody/run")
