"""The training job: interrupted and resumed it is as if nothing had happened, and it stops rather than do harm."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys

import chex
import jax
import micro
import numpy as np
import processes
import pytest
from jax.experimental.compilation_cache import compilation_cache

from refusion_jax import step as steps_lib
from refusion_jax import train as train_lib
from refusion_jax.checkpoint import metadata, orbax
from refusion_jax.config import SourceConfig, from_config_dict
from refusion_jax.data import pipeline
from refusion_jax.errors import UserError, run_main
from refusion_jax.metrics import reporter
from refusion_jax.parallel import distributed
from refusion_jax.parallel.mesh import make_mesh

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of this file compile the same programs: keeps them on disk, so that only the first one waits."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX keeps the folder for all that comes after


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run takes SIGTERM and SIGINT over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Eight steps on eight devices (fsdp 4 x tensor 2), evaluated at 4 and 8, saved at 3, 4, 6 and 8."""
    data = tmp_path_factory.mktemp("data") / "examples.json"
    micro.write_examples(data)
    config = from_config_dict(micro.get_config(f"data={data},steps={STEPS}"))
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, tensor=2),
        data=dataclasses.replace(config.data, evaluation=config.data.train),  # for several batches
        log_every=1,
        eval_every=4,
        checkpoint_every_steps=3,
        keep_last=2,
        keep_best=1,
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(folder, last evaluation, what was traced and called how often) of a run from start to end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    counts = collections.Counter()

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    def schedule(*args, original=steps_lib.learning_rate):
        return counted("learning_rate", original(*args))

    def evaluate(config, program, state, rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_get", counted("evaluation fetches", jax.device_get))
            program = dataclasses.replace(program, evaluate=counted("evaluation batches", program.evaluate))
            return original_evaluate(config, program, state, rows)

    original_evaluate = train_lib.evaluate
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "eval_step"):
            patch.setattr(steps_lib, name, counted(name, getattr(steps_lib, name)))
        patch.setattr(steps_lib, "learning_rate", schedule)
        patch.setattr(train_lib, "evaluate", evaluate)
        evaluation = train_lib.train(config, folder)
    return folder, evaluation, counts


def records(folder, kind):
    """Records of metrics.jsonl without what depends on the clock."""
    timed = ("time", "tokens_per_second", "step_seconds", "input_wait")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in timed} for line in lines if line["kind"] == kind
    ]


def last_state(config, folder):
    """(step, next row, parameters, optimizer state) of the last checkpoint, on one device."""
    program = steps_lib.build(config, make_mesh(1, devices=jax.devices()[:1]), STEPS)
    model = metadata.make_meta(config.model, step=0, tokenizer="bytes")
    state, next_row = orbax.Checkpoints(folder, config.keep_last, config.keep_best).restore(
        program.abstract_state, model
    )
    return int(state.step), next_row, jax.device_get(state.params), jax.device_get(state.opt_state)


def assert_same_run(config, folder, expected):
    chex.assert_trees_all_equal(last_state(config, folder), last_state(config, expected))
    for kind in ("train", "evaluation"):
        assert records(folder, kind) == records(expected, kind)  # bit for bit: JSON keeps every digit


def stop_at(step, action, monkeypatch):
    """Makes a run ask for `action` (True: stop; an exception: fall over) after `step`."""

    def requested(self, now):
        if now == step and isinstance(action, Exception):
            raise action
        return now == step

    monkeypatch.setattr(distributed.StopSignal, "requested", requested)


# --- One run.


def test_a_run_reports_every_step_and_every_evaluation(config, uninterrupted):
    folder, evaluation, _ = uninterrupted
    train = records(folder, "train")
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    for r in train:  # a cosine from lr, which update 1 is made with, to 0, which no update is
        assert r["lr"] == pytest.approx(3e-3 * (1 + math.cos(math.pi * (r["step"] - 1) / STEPS)) / 2, rel=1e-5)
        assert r["loss"] == pytest.approx(r["ar_loss"] + r["mdm_loss"], rel=1e-5)
        assert r["padding"] == pytest.approx(1 - r["tokens"] / (8 * 64))
    held_out = records(folder, "evaluation")
    assert [r["step"] for r in held_out] == [4, 8]
    assert {name: held_out[-1][name] for name in evaluation} == evaluation
    assert set(evaluation) == {"loss", "ar_loss", "mdm_loss", "ar_accuracy", "mdm_accuracy"}
    assert json.loads((folder / "config.json").read_text())["steps"] == STEPS
    assert (folder / "tokenizer").is_dir()


def test_the_step_is_compiled_once(uninterrupted):
    """Eight steps, four saves and two evaluations of several batches later."""
    assert {name: uninterrupted[2][name] for name in ("train_step", "eval_step")} == {"train_step": 1, "eval_step": 1}


def test_the_host_waits_for_no_step_that_it_has_just_dispatched(uninterrupted):
    """Learning rates are known before the first step, and an evaluation is fetched as a whole."""
    counts = uninterrupted[2]
    assert counts["learning_rate"] == 2  # for all steps at once, and in the trace of the step
    assert counts["evaluation batches"] > 2 == counts["evaluation fetches"]  # two evaluations


def test_checkpoints_are_those_asked_for(config, uninterrupted):
    folder, _, _ = uninterrupted
    step, next_row, _, _ = last_state(config, folder)
    assert (step, next_row) == (STEPS, STEPS * config.batch_size)
    best = min(records(folder, "evaluation"), key=lambda r: r["loss"])["step"]
    assert orbax.steps_in(folder) == sorted({6, 8, best})


def test_starting_a_finished_run_again_does_nothing(config, uninterrupted, capsys):
    folder, _, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    assert train_lib.train(config, folder) == {}
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")} == before
    assert len(records(folder, "train")) == STEPS


def test_checkpoints_by_the_clock(config, tmp_path):
    """Asked at each report, here with every second step, whether it is time; the answer comes with the next one."""
    config = dataclasses.replace(
        config, checkpoint_every_steps=0, checkpoint_every_minutes=1e-9, log_every=2, keep_best=0, keep_last=9
    )
    train_lib.train(config, tmp_path)
    assert orbax.steps_in(tmp_path) == [4, 8]


# --- Interrupted runs.


def test_resumed_equals_uninterrupted(config, uninterrupted, tmp_path, monkeypatch, capsys):
    """Falls over after step 5, so that 5 is done again from 4; is asked to stop after 7, which it saves; ends."""
    stop_at(5, RuntimeError("power cut"), monkeypatch)
    with pytest.raises(RuntimeError, match="power cut"):
        train_lib.train(config, tmp_path)
    stop_at(7, True, monkeypatch)
    train_lib.train(config, tmp_path)
    out = capsys.readouterr().out
    assert "resumed from step 4" in out and "stopped after step 7" in out
    monkeypatch.undo()
    evaluation = train_lib.train(config, tmp_path)
    assert "resumed from step 7" in capsys.readouterr().out
    assert evaluation == uninterrupted[1]
    assert_same_run(config, tmp_path, uninterrupted[0])


def test_a_signal_stops_after_the_step_and_saves(config, tmp_path, monkeypatch):
    original = distributed.StopSignal.requested

    def requested(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(distributed.StopSignal, "requested", requested)
    train_lib.train(config, tmp_path)
    assert orbax.steps_in(tmp_path) == [2] and [r["step"] for r in records(tmp_path, "train")] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of threads that were writing
def test_a_full_disk_stops_the_run_and_it_goes_on_later(config, uninterrupted, tmp_path, monkeypatch):
    """Files cannot grow past 4 kB from the second checkpoint on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = orbax.Checkpoints.save

    def save(self, state, next_row, meta, *rest):
        if meta["step"] > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        original(self, state, next_row, meta, *rest)

    monkeypatch.setattr(orbax.Checkpoints, "save", save)
    try:
        with pytest.raises(
            UserError, match="(?i)could not be written.*last complete checkpoint is step 3|cannot write.*make room"
        ):
            train_lib.train(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert orbax.steps_in(tmp_path) == [3]
    train_lib.train(config, tmp_path)
    assert_same_run(config, tmp_path, uninterrupted[0])


# --- Runs that go wrong.


def test_numbers_that_are_not_finite_stop_the_run_before_it_saves(config, tmp_path, monkeypatch):
    stop_at(4, True, monkeypatch)
    train_lib.train(config, tmp_path)
    monkeypatch.undo()
    before = last_state(config, tmp_path)
    explosive = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, lr=1e30), checkpoint_every_steps=1
    )
    with pytest.raises(UserError, match=f"Step 5: .*param_norm is inf.*the checkpoints in {tmp_path} are from before"):
        train_lib.train(explosive, tmp_path)
    assert orbax.steps_in(tmp_path)[-1] == 4
    chex.assert_trees_all_equal(last_state(config, tmp_path), before)


def test_a_poisoned_parameter_is_reported_with_the_term(config, tmp_path, monkeypatch):
    """One NaN in the embedding of a letter: the terms whose tokens see it are named."""
    original = steps_lib.build

    def build(*args):
        program = original(*args)

        def poison(key):
            state = program.init(key)
            table = state.params["embed"]["embedding"].at[ord("1")].set(np.nan)
            return state.replace(params={**state.params, "embed": {"embedding": table}})

        return dataclasses.replace(program, init=poison)

    monkeypatch.setattr(steps_lib, "build", build)
    with pytest.raises(UserError, match="Step 1: ar_loss is nan, loss is nan, mdm_loss is nan, grad_norm is nan"):
        train_lib.train(config, tmp_path)
    assert orbax.steps_in(tmp_path) == []


def test_only_the_term_that_is_not_finite_is_named():
    with pytest.raises(UserError, match="Step 12: mdm_loss is inf. The run stops"):
        reporter.check_finite(12, {"loss": 1.0, "ar_loss": 2.0, "mdm_loss": float("inf")}, "runs/x")
    reporter.check_finite(12, {"loss": 1e30}, "runs/x")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model": {"hidden_size": 32, "num_layers": 1}},
            "hidden_size is 16 in the checkpoint and 32 here; num_layers is 2 in the checkpoint and 1 here",
        ),
        ({"data": {"train": (SourceConfig(kind="json", path="absent.json"),)}}, "absent.json"),
        ({"mesh": {"data": 3}}, "does not fit 8 devices"),
        ({"steps": 10**30}, "The run would have 10+ steps, and at most 2147483647 can be counted"),
        ({"steps": 0, "epochs": 1e308}, r"The run would have .* steps, and at most 2147483647 can be counted"),
    ],
    ids=["another model", "no data", "mesh", "steps", "epochs"],
)
def test_a_run_that_is_refused_leaves_the_folder_as_it_was(change, message, config, uninterrupted):
    """What describes the run that is there, too: config.json and tokenizer/."""
    folder = uninterrupted[0]

    def read():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in str(path)}

    before = read()
    with pytest.raises(UserError, match=message):
        train_lib.train(changed(config, change), folder)
    assert read() == before


def changed(config, change):
    for name, value in change.items():
        value = dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = dataclasses.replace(config, **{name: value})
    return config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mesh": {"data": 3}}, "does not fit 8 devices"),
        ({"mesh": {"tensor": 8}}, "tensor = 8 does not divide model.num_heads = 2"),
        ({"batch_size": 6}, "batch_size = 6 .* multiple of 4"),
        ({"lora": {"rank": 2}}, "lora.rank is set but config.init_from is empty"),
        ({"model": {"max_position_embeddings": 63}}, "max_length = 64 is more than .*max_position_embeddings = 63"),
    ],
    ids=str,
)
def test_what_can_be_known_before_is_said_before_the_data_are_read(change, message, config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_rows", None)
    with pytest.raises(UserError, match=message):
        train_lib.train(changed(config, change), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"workdir": "{tmp}/file/run"}, "Cannot write to .*/file/run: Not a directory"),
        ({"init_from": "{tmp}"}, "{tmp} is no checkpoint"),
        ({"data": {"train": ()}}, "no data source"),
        (
            {
                "model": {
                    "vocab_size": 200,
                    "logical_vocab_size": 200,
                    "mask_token_id": None,
                    "begin_token_id": None,
                    "eos_token_id": None,
                    "pad_token_id": None,
                }
            },
            "200",
        ),
        ({"model": {"mask_token_id": 7}}, "mask.* 7"),
    ],
    ids=str,
)
def test_impossible_runs_are_refused(change, message, config, tmp_path):
    (tmp_path / "file").write_text("")
    change = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in change.items()}
    workdir = change.pop("workdir", tmp_path / "run")
    with pytest.raises(UserError, match=message.format(tmp=tmp_path)):
        train_lib.train(changed(config, change), pathlib.Path(workdir))
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "tokenizer").exists()


# --- Profiles.


@pytest.mark.parametrize("ending", ["stopped", "failing", "at its end"])
def test_profile_that_is_started_is_stopped(ending, config, tmp_path, monkeypatch):
    """The run ends, however it does, within the steps that are traced: the trace is written, another can be taken."""
    config = dataclasses.replace(config, steps=12, data=dataclasses.replace(config.data, evaluation=()), profile=9)
    if ending != "at its end":
        stop_at(11, True if ending == "stopped" else RuntimeError("power cut"), monkeypatch)
    with pytest.raises(RuntimeError, match="power cut") if ending == "failing" else contextlib.nullcontext():
        train_lib.train(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with jax.profiler.trace(str(tmp_path / "another")):
        pass


def test_profile_is_of_the_steps_asked_for(config, tmp_path, monkeypatch):
    events = []

    @contextlib.contextmanager
    def trace(folder):
        events.append("start")
        yield
        events.append("stop")

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(distributed.StopSignal, "requested", lambda self, step: events.append(step))
    config = dataclasses.replace(config, steps=12, data=dataclasses.replace(config.data, evaluation=()), profile=2)
    train_lib.train(config, tmp_path)
    assert events[8:] == [9, "start", 10, "stop", 11, 12]  # a step is noted when it has been dispatched


# --- The command.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--wrkdir", "x"], "Unknown argument --wrkdir"),
        (["--config.optimizer.lrr=1"], "Unknown setting config.optimizer.lrr"),
        (["--config.data.train.0.path=absent.json"], "absent.json"),
    ],
    ids=str,
)
def test_bad_input_is_one_paragraph(arguments, message, repository, tmp_path, monkeypatch, capsys):
    command = ["train", "--config", f"{repository}/tests/micro.py", "--workdir", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        run_main(train_lib.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in " ".join(error.split())
    assert "Traceback" not in error and "\n\n" not in error


def test_command_trains_the_tiny_config(repository, tmp_path):
    """As a user starts it, with little data and two steps, on one device."""
    settings = [
        "--config.data.train.0.size=300",
        "--config.data.evaluation.0.size=300",
        "--config.batch_size=2",
        "--config.log_every=1",
    ]
    command = [
        sys.executable,
        "-m",
        "refusion_jax.train",
        "--config",
        "configs/tiny.py:steps=2",
        "--workdir",
        tmp_path / "run",
        *settings,
    ]
    environment = {**os.environ, "XLA_FLAGS": processes.QUICK_TO_COMPILE}
    done = subprocess.run(
        list(map(str, command)), cwd=repository, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for expected in ("step 1/2", "step 2/2", "compiled the step in", "step 2 evaluation: loss", "is at step 2"):
        assert expected in done.stdout
    assert orbax.steps_in(tmp_path / "run") == [2]
    assert [r["step"] for r in records(tmp_path / "run", "train")] == [1, 2]
