"""Trains a model: `python -m refusion_jax.train --config configs/tiny.py --workdir runs/tiny`.

Everything the run writes goes to --workdir. Starting again with the same --workdir goes on from its last checkpoint, as if
it had never stopped.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from refusion_jax import step as steps_lib
from refusion_jax.checkpoint import load, orbax
from refusion_jax.config import Config, add_config_arguments, parse_config
from refusion_jax.data import pipeline
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError, run_main
from refusion_jax.metrics import flops
from refusion_jax.metrics.writers import Metrics, Progress
from refusion_jax.objective.slots import PackedBatch
from refusion_jax.parallel import distributed, sharding, watch
from refusion_jax.parallel.mesh import make_mesh


def with_tokenizer(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the tokenizer's special ids and vocabulary in its model.

    Raises:
      UserError: the model's table has no row for the tokenizer's ids, or was made for another mask id.
    """
    return dataclasses.replace(config, model=load.with_tokenizer(config.model, tokenizer, "config.model"))


def local_rows(batch_sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold."""
    slices = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def to_devices(batch: dict[str, np.ndarray], batch_sharding: NamedSharding, batch_size: int) -> PackedBatch:
    """Global arrays from this process's rows."""
    place = lambda x: jax.make_array_from_process_local_data(batch_sharding, x, (batch_size, *x.shape[1:]))
    return PackedBatch(**{name: place(x) for name, x in batch.items()})


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Runs, or goes on with, one training run; returns the last evaluation (empty without evaluation data).

    However it ends, a checkpoint that is being written is finished first, and files and signals are given back.
    """
    with contextlib.ExitStack() as resources:
        return _train(config, workdir, resources)


def _train(config: Config, workdir: pathlib.Path, resources: contextlib.ExitStack) -> dict[str, float]:
    main_process = jax.process_index() == 0
    distributed.check_same_config(config.to_json())

    # --- Data: everything is tokenised once; a row is found by its number.
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_tokenizer(config, tokenizer)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if main_process:
            tokenizer.save(workdir / "tokenizer")
            (workdir / "config.json").write_text(json.dumps(json.loads(config.to_json()), indent=1))
    except OSError as error:
        raise UserError(
            f"Cannot write to {workdir}: {error.strerror or error}. Choose a --workdir that can be written and has "
            "room."
        ) from None
    data = dict(
        max_length=config.data.max_length, max_examples_per_row=config.data.max_examples_per_row, seed=config.seed
    )
    cache_dir = config.data.cache_dir or workdir / "cache"
    rows = pipeline.load_rows(config.data.train, tokenizer, cache_dir=cache_dir, **data)
    eval_rows = (
        pipeline.load_rows(config.data.evaluation, tokenizer, cache_dir=cache_dir, shuffle=False, **data)
        if config.data.evaluation
        else None
    )
    total = config.steps or max(1, math.ceil(config.epochs * rows.rows_per_epoch / config.batch_size))

    # --- Program: mesh, shardings, one compiled step.
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    distributed.describe(mesh, config.batch_size)
    program = steps_lib.build(config, mesh, total)
    mine = local_rows(program.batch_sharding, config.batch_size)
    progress = Progress(total, enabled=main_process)
    progress.say(
        f"model {config.model.num_params():,} parameters; {total} steps of {config.batch_size} rows x "
        f"{config.data.max_length} tokens"
    )
    progress.say(f"data {rows.report}")

    # --- State: the run's last checkpoint, or given weights, or random ones.
    checkpoints = resources.enter_context(
        contextlib.closing(orbax.Checkpoints(workdir, config.keep_last, config.keep_best))
    )
    meta = orbax.make_meta(config.model, step=0, tokenizer=config.data.tokenizer, config=json.loads(config.to_json()))
    next_row = 0
    if checkpoints.latest_step() is not None:
        state, next_row = checkpoints.restore(program.abstract_state, meta)
        progress.say(f"resumed from step {int(state.step)} in {workdir}")
    elif config.init_from and not config.lora.rank:
        params = load.load_params(config.init_from, config.model, mesh, sharding.TRAIN_RULES, dtype="float32")
        state = program.start(params)
        progress.say(f"weights from {config.init_from}")
    else:
        state = program.init(jax.random.key(config.seed))
    if config.lora.rank:
        if not config.init_from:
            raise UserError(
                "config.lora.rank is set but config.init_from is empty: adapters need a base. Set config.init_from "
                "to a checkpoint."
            )
        state = state.replace(
            frozen=load.load_params(
                config.init_from, config.model, mesh, sharding.TRAIN_RULES, dtype=config.lora.base_dtype
            )
        )
        progress.say(f"frozen base from {config.init_from}")
    first = int(state.step)
    if first >= total:
        progress.say(f"nothing to do: {workdir} is at step {first} of {total}")
        return {}

    iterator = pipeline.batches(rows, batch_size=config.batch_size, local_rows=mine, start_row=next_row)
    load_batch = lambda: to_devices(next(iterator), program.batch_sharding, config.batch_size)
    batch = load_batch()
    start = time.perf_counter()
    train_step = program.train.lower(state, batch).compile()
    progress.say(f"compiled the step in {time.perf_counter() - start:.1f} s")

    # --- The loop. Metrics are read one step late, so that the host never keeps the devices waiting.
    schedule = steps_lib.learning_rate(config.optimizer, total)
    chip = flops.CHIPS.get(jax.devices()[0].device_kind)
    metrics_file = resources.enter_context(contextlib.closing(Metrics(workdir, first, enabled=main_process)))
    stop = resources.enter_context(contextlib.closing(distributed.StopSignal()))
    meter = Meter(config, chip)
    evaluation: dict[str, float] = {}
    pending = None
    last_save = time.monotonic()

    def settle(pending: tuple[int, dict]) -> None:
        """Reads a step's metrics: stops the run if they are not finite, reports them if it is time."""
        step, values = pending[0], {name: float(x) for name, x in jax.device_get(pending[1]).items()}
        check_finite(step, values, workdir)
        meter.add(values)
        if step % config.log_every == 0 or step == total:
            checkpoints.check()
            record = {
                **{n: v for n, v in values.items() if n != "token_pairs"},
                "lr": float(schedule(step - 1)),
                **meter.rates(),
            }
            metrics_file.write(step, "train", record)
            shown = {
                "loss": "loss",
                "ar_loss": "ar",
                "mdm_loss": "mdm",
                "lr": "lr",
                "tokens_per_second": "tok/s",
                "mfu": "mfu",
                "padding": "padding",
                "input_wait": "input wait",
            }
            progress.show(
                step, {shown[n]: record[n] for n in shown if n in record}, eta=(total - step) * record["step_seconds"]
            )

    for step in range(first + 1, total + 1):
        if config.profile and step == first + 10:
            jax.profiler.start_trace(str(workdir / "profile"))
        state, values = train_step(state, batch)
        waiting = time.perf_counter()
        batch = load_batch() if step < total else None
        meter.waited(time.perf_counter() - waiting)
        if pending:
            settle(pending)
        pending = (step, values)
        if config.profile and step == first + 10 + config.profile:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()

        stopping = stop.requested(step)
        evaluating = eval_rows is not None and (step == total or (config.eval_every and step % config.eval_every == 0))
        saving = step == total or stopping or (evaluating and config.keep_best)
        saving = saving or bool(config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0)
        if not saving and config.checkpoint_every_minutes and step % config.log_every == 0:
            due = time.monotonic() - last_save > 60 * config.checkpoint_every_minutes
            saving = bool(multihost_utils.broadcast_one_to_all(np.bool_(due))) if jax.process_count() > 1 else due
        if saving or evaluating:
            settle(pending)
            pending = None
            if evaluating:
                evaluation = evaluate(config, program, state, eval_rows)
                metrics_file.write(step, "evaluation", evaluation)
                progress.say(
                    f"step {step} evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items())
                )
            if saving:
                checkpoints.save(
                    state,
                    next_row + (step - first) * config.batch_size,
                    {**meta, "step": step},
                    evaluation["loss"] if evaluating else None,
                )
                last_save = time.monotonic()
            meter.restart()
        if stopping:
            break
    resources.close()
    progress.say(
        f"done: {workdir} is at step {total}"
        if step == total
        else f"stopped after step {step}; start again with --workdir {workdir} to go on"
    )
    return evaluation


def check_finite(step: int, values: dict[str, float], workdir: pathlib.Path) -> None:
    """Raises a UserError naming the step and the terms that are NaN or infinite."""
    terms_first = sorted(values.items(), key=lambda item: "loss" not in item[0])
    bad = [f"{name} is {value}" for name, value in terms_first if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"Step {step}: {', '.join(bad)}. The run stops and this state is not saved; the checkpoints in {workdir} "
            "are from before. Lower config.optimizer.lr, set config.objective.mdm_weight_cap, or look at the data of "
            "this step."
        )


def evaluate(
    config: Config, program: steps_lib.Program, state: steps_lib.TrainState, rows: pipeline.Rows
) -> dict[str, float]:
    """Both loss terms and token accuracies over the evaluation rows, under the same corruption every time."""
    size = config.batch_size // config.accumulation
    batches = pipeline.epoch_batches(rows, batch_size=size, local_rows=local_rows(program.batch_sharding, size))
    sums = None
    for batch in itertools.islice(batches, config.eval_batches or None):
        part = program.evaluate(state.params, state.frozen, to_devices(batch, program.batch_sharding, size))
        part = jax.tree.map(np.float64, jax.device_get(part))
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
    losses = {name: s["numerator"] / max(s["denominator"], 1) for name, s in sums.items()}
    objective = config.objective
    return {
        "loss": float(objective.ar_weight * losses["ar"] + objective.mdm_weight * losses["mdm"]),
        **{f"{name}_loss": float(loss) for name, loss in losses.items()},
        **{f"{name}_accuracy": float(s["correct"] / max(s["tokens"], 1)) for name, s in sums.items()},
    }


class Meter:
    """Rates over the steps since the last report."""

    def __init__(self, config: Config, chip: flops.Chip | None):
        self._config, self._chip = config, chip
        self.restart()

    def restart(self) -> None:
        """Starts to count anew, leaving out the time of evaluations and checkpoints."""
        self._start, self._steps, self._tokens, self._pairs, self._waited = time.perf_counter(), 0, 0.0, 0.0, 0.0

    def add(self, values: dict[str, float]) -> None:
        self._steps += 1
        self._tokens += values["tokens"]
        self._pairs += values["token_pairs"]

    def waited(self, seconds: float) -> None:
        """Time the loop spent waiting for data."""
        self._waited += seconds

    def rates(self) -> dict[str, float]:
        """Useful tokens/s over all devices, seconds per step, MFU where the chip is known, shares of padding and waiting."""
        elapsed = time.perf_counter() - self._start
        positions = self._steps * self._config.batch_size * self._config.data.max_length
        rates = {
            "tokens_per_second": self._tokens / elapsed,
            "step_seconds": elapsed / self._steps,
            "padding": 1 - self._tokens / positions,
            "input_wait": self._waited / elapsed,
        }
        if self._chip:
            work = flops.train_flops(self._config.model, self._tokens, self._pairs)
            rates["mfu"] = work / elapsed / (self._chip.peak_flops * jax.device_count())
        self.restart()
        return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="folder of the run; a run that is there is continued"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, when processes are started by hand")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    arguments, config = parse_config(parser)
    distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with watch.others():
        train(config, arguments.workdir)


if __name__ == "__main__":
    run_main(main)
