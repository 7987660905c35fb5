"""A run interrupted anywhere ends as if it had never been: same bits, nothing lost after the last checkpoint."""

import concurrent.futures
import json
import random
import re
import shutil
import signal
import time

import jobs
import micro
import numpy as np
import pytest
from processes import finish, wait_for

from refusion_jax.checkpoint import orbax
from refusion_jax.errors import UserError

STEPS = 60  # more than a chain of interruptions gets through


class Job(jobs.Job):
    """Whose measurements can be compared."""

    def history(self, name: str) -> dict:
        """{(kind, step): what was measured}, rates aside; no step may come twice. The last line may be cut off."""
        path = self.folder / name / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        timed = ("time", "tokens_per_second", "step_seconds", "input_wait")
        history = {
            (record["kind"], record["step"]): {k: v for k, v in record.items() if k not in timed} for record in records
        }
        assert len(history) == len(records)
        return history


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """The run "whole", never interrupted, all its checkpoints kept."""
    job = Job(tmp_path_factory.mktemp("crash"), STEPS)
    job.finish("whole", job.start("whole", "--config.keep_last=99"))
    return job


def check_what_is_left(job: Job, name: str) -> list[int]:
    """Whatever is on disk now is what the whole run had at that step, to the bit. Returns the checkpoints' steps."""
    whole = job.history("whole")
    for key, record in job.history(name).items():
        assert record == whole[key]
    steps = orbax.steps_in(job.folder / name / "run")
    for step in steps:
        ours = micro.read_checkpoint(job.folder / name / "run", step)
        theirs = micro.read_checkpoint(job.folder / "whole" / "run", step) if step % 2 == 0 else {}
        assert ours["next_row"] == step * 8
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{key} of step {step}")
    return steps


def interrupt(job: Job, name: str, process, how: str, rng: random.Random) -> None:
    """Sends SIGKILL, or SIGTERM, at the moment that `how` says, give or take."""
    log = job.folder / name / "0.log"
    if how == "starting":
        time.sleep(rng.uniform(0, 3))
    else:
        # Past its first steps, so that the chain of lives gets on.
        wait_for(rf"(?s)(step \d+/.*){{{rng.randint(2, 4)}}}", log, process)
    if how == "writing":
        checkpoints = job.folder / name / "run" / "checkpoints"
        while process.poll() is None and not any("tmp" in path.name for path in checkpoints.iterdir()):
            pass
        time.sleep(rng.uniform(0, 0.03))
    elif how == "stepping":
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGTERM if how == "asked" else signal.SIGKILL)


def live_and_die(job: Job, name: str, moments: list[str], seed: int) -> tuple[int, int]:
    """A run interrupted at each of `moments` in turn, then left alone: (kills, kills that cut off a checkpoint)."""
    rng = random.Random(seed)
    steps, killed, cut_off = [], 0, 0
    for how in moments:
        process = job.start(name)
        interrupt(job, name, process, how, rng)
        (code,), (output,) = finish([process], job.folder / name)
        if steps and "compiled the step" in output:
            assert f"resumed from step {steps[-1]} " in output
        before, steps = steps, check_what_is_left(job, name)
        assert not before or steps[-1] >= before[-1], "a complete checkpoint was lost"
        if how == "asked":
            assert code == 0, output
            stopped = int(re.search(r"stopped after step (\d+)", output).group(1))
            assert steps[-1] == stopped == max(step for _, step in job.history(name))
        else:
            assert code == -signal.SIGKILL, f"not killed while {how}: {output}"
            killed += 1
            checkpoints = job.folder / name / "run" / "checkpoints"
            cut_off += checkpoints.exists() and any("tmp" in path.name for path in checkpoints.iterdir())
    job.finish(name, job.start(name))
    return killed, cut_off


def test_interrupted_anywhere_is_never_interrupted(job):
    """Two runs, 24 interruptions: 20 kills, half of them while a checkpoint is written, and 4 signals to stop."""
    moments = ["starting", *["writing", "stepping", "asked", "writing", "stepping"] * 2, "writing"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        chains = {f"chain {seed}": pool.submit(live_and_die, job, f"chain {seed}", moments, seed) for seed in range(2)}
        results = [chain.result() for chain in chains.values()]
    assert sum(killed for killed, _ in results) == 20
    assert sum(cut_off for _, cut_off in results) > 0
    for name in chains:
        assert check_what_is_left(job, name)[-1] == STEPS
        assert job.history(name) == job.history("whole")


@pytest.mark.parametrize("name", ["lr[1e-4]", "run*", "what?"])
def test_folder_that_could_not_be_read_again_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="cannot hold checkpoints"):
        orbax.Checkpoints(tmp_path / name)


def test_finished_run_is_left_alone(job):
    shutil.copytree(job.folder / "whole", job.folder / "again")
    output = job.finish("again", job.start("again", "--config.keep_last=99"))
    assert f"is at step {STEPS} of {STEPS}" in output
    assert job.history("again") == job.history("whole")
