"""Trains a model: `python -m refusion_jax.train --config configs/tiny.py --workdir runs/tiny`.

Everything the run writes goes to --workdir. Starting again with the same --workdir goes on from its last checkpoint, as
if it had never stopped.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from refusion_jax import compilation, keys, storage
from refusion_jax import step as steps_lib
from refusion_jax.checkpoint import load, metadata, orbax
from refusion_jax.config import Config, add_config_arguments, parse_config
from refusion_jax.data import pipeline
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError, run_main
from refusion_jax.metrics.reporter import Reporter
from refusion_jax.metrics.writers import Metrics
from refusion_jax.objective.common import PackedBatch
from refusion_jax.parallel import distributed, sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.progress import Progress

CACHE = "~/.cache/refusion_jax/data"  # tokenised data of runs in buckets, unless the config says where


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
    arrays = {
        name: jax.make_array_from_process_local_data(batch_sharding, x, (batch_size, *x.shape[1:]))
        for name, x in batch.items()
    }
    return PackedBatch(**arrays)


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Runs, or goes on with, one training run; returns the last evaluation (empty without evaluation data).

    However it ends, a checkpoint that is being written is finished first, a trace too, and files and signals are given
    back. A run that is refused has changed nothing of a run that is in `workdir`.
    """
    with contextlib.ExitStack() as resources:
        return _train(config, workdir, resources)


def _train(config: Config, workdir: pathlib.Path, resources: contextlib.ExitStack) -> dict[str, float]:
    # --- What is trained: the config with its tokenizer, on a mesh, the data, one compiled step, the state.
    distributed.check_same_config(config.to_json())
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_tokenizer(config, tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check(config, mesh)
    distributed.describe(mesh, config.batch_size)
    rows, eval_rows = open_data(config, tokenizer, workdir)
    total = steps_of(config, rows)
    program = steps_lib.build(config, mesh, total)
    progress = Progress("step", total, stream=sys.stdout, every=0, enabled=jax.process_index() == 0)
    progress.say(
        f"model {config.model.num_params():,} parameters; {total} steps of {config.batch_size} rows x "
        f"{config.data.max_length} tokens"
    )
    progress.say(f"data {rows.report}")
    for name, tokens, passes in rows.seen(total * config.batch_size):
        progress.say(f"  {name}: {tokens:,} tokens in the whole run, {passes:.3g} passes")
    checkpoints = orbax.Checkpoints(workdir, config.keep_last, config.keep_best)
    resources.enter_context(contextlib.closing(checkpoints))
    meta = describe(config, rows, checkpoints)
    distributed.check_same_config(json.dumps(meta), "run", "Give all of them the same files and libraries")
    state, next_row, origin = first_state(config, program, checkpoints, meta)
    progress.say(origin)
    first = int(state.step)
    if first >= total:
        progress.say(f"nothing to do: {workdir} is at step {first} of {total}")
        return {}
    batches = device_batches(config, program, rows, next_row)
    batch = next(batches)
    start = time.perf_counter()
    train_step = program.train.lower(state, batch).compile()
    progress.say(f"compiled the step in {time.perf_counter() - start:.1f} s")
    write_description(config, tokenizer, workdir)

    # --- The loop. Metrics are read one step late, so that the host never keeps the devices waiting.
    metrics = resources.enter_context(contextlib.closing(Metrics(workdir, first, enabled=jax.process_index() == 0)))
    stop = resources.enter_context(contextlib.closing(distributed.StopSignal()))
    profiling = resources.enter_context(contextlib.ExitStack())
    timer = distributed.Timer(config.checkpoint_every_minutes) if config.checkpoint_every_minutes else None
    # All rates now: asked for in the loop, a device would answer behind the step that was dispatched last.
    rates = jax.device_get(jax.vmap(steps_lib.learning_rate(config.optimizer, total))(np.arange(total)))
    reporter = Reporter(config, workdir, rates, metrics, progress)
    evaluation: dict[str, float] = {}
    for step in range(first + 1, total + 1):
        if config.profile and step == first + 10:
            profiling.enter_context(jax.profiler.trace(str(workdir / "profile")))
        state, values = train_step(state, batch)
        with reporter.waiting():
            batch = next(batches) if step < total else None
        reporter.take(step, values)
        if config.profile and step == first + 9 + config.profile:
            jax.block_until_ready(state)
            profiling.close()
        checkpoints.check()

        stopping = stop.requested(step)
        evaluating, saving = due(config, step, total, stopping)
        if timer and step % config.log_every == 0:
            saving |= timer.passed()
        if evaluating or saving:
            reporter.settle()
            if evaluating:
                evaluation = evaluate(config, program, state, eval_rows)
                reporter.evaluated(step, evaluation)
            if saving:
                done_rows = next_row + (step - first) * config.batch_size
                checkpoints.save(state, done_rows, {**meta, "step": step}, evaluation["loss"] if evaluating else None)
                if timer:
                    timer.restart()
            reporter.restart()
        if stopping:
            break
    resources.close()
    progress.say(
        f"done: {workdir} is at step {total}"
        if step == total
        else f"stopped after step {step}; start again with --workdir {workdir} to go on"
    )
    return evaluation


def check(config: Config, mesh: Mesh) -> None:
    """Raises a UserError for what can be known to be impossible before the data are read."""
    if config.data.max_length > config.model.max_position_embeddings:
        raise UserError(
            f"config.data.max_length = {config.data.max_length} is more than config.model.max_position_embeddings = "
            f"{config.model.max_position_embeddings}, the positions that the model has. Lower the first, or raise the "
            "second for a model that is to learn more."
        )
    if config.lora.rank and not config.init_from:
        raise UserError(
            "config.lora.rank is set but config.init_from is empty: adapters need a base. Set config.init_from to a "
            "checkpoint."
        )
    if config.model.quantise:
        raise UserError(
            f"config.model.quantise is {config.model.quantise!r}: such weights are for decoding and cannot be trained. "
            "Set config.init_from to the checkpoint that they were converted from, and config.model.quantise to ''."
        )
    sharding.check_model(config.model, mesh, sharding.TRAIN_RULES)
    steps_lib.check_batch(config, mesh)


def open_data(
    config: Config, tokenizer: Tokenizer, workdir: pathlib.Path
) -> tuple[pipeline.Rows, pipeline.Rows | None]:
    """Rows of the training and of the evaluation data, each tokenised once and found by number.

    Raises:
      UserError: `workdir` cannot be written, or bad data (`pipeline.load_rows`).
    """
    orbax.check_folder_name(workdir)
    if storage.is_local(workdir):
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
    else:
        storage.check_writable(workdir, "--workdir")
    settings = dict(
        max_length=config.data.max_length,
        max_examples_per_row=config.data.max_examples_per_row,
        response_multiple=config.data.response_multiple,
        piece_positions=config.data.piece_positions,
        seed=config.seed,
        cache_dir=config.data.cache_dir or (workdir / "cache" if storage.is_local(workdir) else CACHE),
        store=config.data.store,
    )
    mixture = tuple((m.step * config.batch_size, m.shares) for m in config.data.mixture)
    rows = pipeline.load_rows(config.data.train, tokenizer, mixture=mixture, **settings)
    check_positions(config, rows, "train")
    if not config.data.evaluation:
        return rows, None
    eval_rows = pipeline.load_rows(config.data.evaluation, tokenizer, shuffle=False, **settings)
    check_positions(config, eval_rows, "evaluation")
    return rows, eval_rows


def steps_of(config: Config, rows: pipeline.Rows) -> int:
    """Steps of the whole run.

    Raises:
      UserError: too many to be counted.
    """
    total = config.steps or max(1.0, config.epochs * rows.rows_per_epoch / config.batch_size)
    if total >= 2**31:
        raise UserError(
            f"The run would have {total} steps, and at most {2**31 - 1} can be counted. Lower config.steps, or "
            "config.epochs and the sources' weights."
        )
    return math.ceil(total)


def check_positions(config: Config, rows: pipeline.Rows, name: str) -> None:
    """Raises a UserError for documents that are longer than the model has positions, where theirs continue."""
    if rows.positions > config.model.max_position_embeddings:
        raise UserError(
            f"config.data.piece_positions is 'continue' and a document of config.data.{name} has {rows.positions:,} "
            f"tokens, but config.model.max_position_embeddings is {config.model.max_position_embeddings}. Raise it, or "
            "set piece_positions to 'restart'."
        )


def describe(config: Config, rows: pipeline.Rows, checkpoints: orbax.Checkpoints) -> dict:
    """The metadata of the run's checkpoints.

    Raises:
      UserError: the base of the run's adapters is gone or has changed.
    """
    return metadata.make_meta(
        config.model,
        step=0,
        tokenizer=config.data.tokenizer,
        config=json.loads(config.to_json()),
        rows=rows.fingerprint,
        base=load.base_of(config.init_from, checkpoints.latest_meta()) if config.lora.rank else None,
    )


def first_state(
    config: Config, program: steps_lib.Program, checkpoints: orbax.Checkpoints, meta: dict
) -> tuple[steps_lib.TrainState, int, str]:
    """The run's last checkpoint, or given weights, or random ones.

    Returns:
      The state, the number of the next row, and a line that says where they are from.

    Raises:
      UserError: the checkpoint or the given weights are of another model.
    """
    next_row, origin = 0, "random weights"
    if checkpoints.latest_step() is not None:
        state, next_row = checkpoints.restore(program.abstract_state, meta)
        origin = f"resumed from step {int(state.step)} of this run"
    elif config.init_from and not config.lora.rank:
        state = program.start(load_weights(config, program.mesh, "float32", step=None))
        origin = f"weights from {config.init_from}"
    else:
        state = program.init(keys.domain_key(config.seed, "lora" if config.lora.rank else "init"))
    if config.lora.rank:
        frozen = load_weights(config, program.mesh, config.lora.base_dtype, meta["base"]["step"])
        state = state.replace(frozen=frozen)
        origin += f", on the frozen base {config.init_from}"
    return state, next_row, origin


def load_weights(config: Config, mesh: Mesh, dtype: str, step: int | None) -> dict:
    """The parameters that `init_from` names."""
    return load.load_params(config.init_from, config.model, mesh, sharding.TRAIN_RULES, dtype, step)


def device_batches(
    config: Config, program: steps_lib.Program, rows: pipeline.Rows, next_row: int
) -> Iterator[PackedBatch]:
    """Endless batches on the devices, from row number `next_row` on."""
    size, placed = config.batch_size, program.batch_sharding
    for batch in pipeline.batches(rows, batch_size=size, local_rows=local_rows(placed, size), start_row=next_row):
        yield to_devices(batch, placed, size)


def write_description(config: Config, tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Writes what the run is into its folder: config.json and tokenizer/."""
    if jax.process_index() == 0:
        with writing(workdir):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(folder)
                storage.copy_folder(folder, workdir / "tokenizer")
            storage.write(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=1).encode())


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Turns what the system says of a folder that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"Cannot write to {workdir}: {reason}. Choose a --workdir that can be written and has room."
        ) from None


def due(config: Config, step: int, total: int, stopping: bool) -> tuple[bool, bool]:
    """Whether to evaluate after `step`, and whether to save."""
    last = step == total
    evaluating = last or bool(config.eval_every and step % config.eval_every == 0)
    evaluating = evaluating and bool(config.data.evaluation)
    counted = config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0
    return evaluating, bool(last or stopping or counted or (evaluating and config.keep_best))


def evaluate(
    config: Config, program: steps_lib.Program, state: steps_lib.TrainState, rows: pipeline.Rows
) -> dict[str, float]:
    """Loss and accuracy of every term over the evaluation rows, under the same corruption every time.

    Sums stay on the devices and are read once, so that no batch waits for the one before.
    """
    size = config.batch_size // config.accumulation
    batches = pipeline.epoch_batches(rows, batch_size=size, local_rows=local_rows(program.batch_sharding, size))
    sums = None
    for batch in itertools.islice(batches, config.eval_batches or None):
        part = program.evaluate(state.params, state.frozen, to_devices(batch, program.batch_sharding, size))
        sums = part if sums is None else _add(sums, part)
    sums = jax.tree.map(float, jax.device_get(sums))
    losses = {name: s["numerator"] / max(s["denominator"], 1) for name, s in sums.items()}
    return {
        "loss": sum(s["weighted"] / max(s["denominator"], 1) for s in sums.values()),
        **{f"{name}_loss": loss for name, loss in losses.items()},
        **{f"{name}_accuracy": s["correct"] / max(s["tokens"], 1) for name, s in sums.items()},
    }


@jax.jit
def _add(sums: dict, part: dict) -> dict:
    return jax.tree.map(jnp.add, sums, part)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.train",
        description=__doc__,
        epilog=compilation.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=storage.as_path,
        help="folder of the run, or its address in a bucket (gs://..); a run that is there is continued",
    )
    parser.add_argument("--coordinator", help="host:port of process 0, when processes are started by hand")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    arguments, config = parse_config(parser)
    compilation.keep_programs()
    distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with distributed.together():
        train(config, arguments.workdir)


if __name__ == "__main__":
    run_main(main)
