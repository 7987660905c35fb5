"""Checkpoints of a run, and converted weights in the same layout.

DIR/checkpoints/<step>/params      parameters (of the model, or of the adapters on a frozen base)
DIR/checkpoints/<step>/optimizer   optimizer state and step; absent in converted weights
DIR/checkpoints/<step>/data        {"next_row": number of the next row}
DIR/checkpoints/<step>/meta        {"format", "model", "config", "step", "versions", "tokenizer", "rows", "base"}
DIR/tokenizer/                     the tokenizer
"""

import contextlib
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from refusion_jax import lora, storage
from refusion_jax.checkpoint import metadata, resume, stream
from refusion_jax.config import LoraConfig
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.step import TrainState


def say(text: str) -> None:
    """A line on stderr, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def steps_in(folder: str | pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    root = storage.as_path(folder) / "checkpoints"
    # Orbax renames a complete step on a disk; in a bucket, which cannot, it marks it.
    mark = "_CHECKPOINT_METADATA" if storage.is_local(folder) else "commit_success.txt"
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / mark).exists())


def check_folder_name(folder: str | pathlib.Path) -> None:
    """Raises a UserError for a folder in which checkpoints would be left unfinished, or look whole too early."""
    if not storage.is_local(folder) and not str(folder).startswith("gs://"):
        raise UserError(
            f"The folder {folder} cannot hold checkpoints: of buckets only those of Google's storage (gs://) can, "
            "since Orbax marks complete checkpoints in no others. Use a gs:// bucket or a file system; data and "
            "Hugging Face weights may lie in s3:// buckets."
        )
    found = sorted(set("*?[") & set(str(storage.absolute(folder))))
    if found:
        raise UserError(
            f"The folder {folder} cannot hold checkpoints: its path has a {' and a '.join(found)}. Choose another name."
        )


def checkpoint_path(folder: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
    """Path of a complete checkpoint, the latest one by default.

    Raises:
      UserError: there is none.
    """
    steps = steps_in(folder)
    if not steps:
        raise UserError(
            f"There is no complete checkpoint in {folder} (looked for {folder}/checkpoints/<step>). Give the "
            "--workdir of a run or the output of a conversion."
        )
    if step is not None and step not in steps:
        raise UserError(f"There is no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}.")
    return storage.absolute(folder) / "checkpoints" / str(steps[-1] if step is None else step)


def read_meta(folder: str | pathlib.Path, step: int | None = None) -> dict:
    """Metadata of a checkpoint (see `metadata.make_meta`).

    Raises:
      UserError: no checkpoint, not one of this project, or one with settings that this version does not know.
    """
    return metadata.read(checkpoint_path(folder, step) / "meta" / "metadata")


def restore_params(
    folder: str | pathlib.Path,
    config: ModelConfig,
    mesh: Mesh,
    rules: sharding.Rules,
    dtype: Any = None,
    step: int | None = None,
) -> dict:
    """Sharded parameters of a checkpoint, each process reading its own shards.

    Args:
      folder: of a run or a conversion.
      config: the model; the checkpoint must hold its parameters.
      mesh, rules: where they go.
      dtype: of the parameters; None: as stored.
      step: which checkpoint; None: the latest.

    Raises:
      UserError: no checkpoint, parameters of other names or shapes, or damaged files.
    """
    abstract = nn.unbox(sharding.abstract_params(config))
    return _restore(folder, abstract, sharding.param_shardings(config, mesh, rules), dtype, step)


def restore_adapters(
    folder: str | pathlib.Path, config: ModelConfig, adapters: LoraConfig, mesh: Mesh, step: int | None = None
) -> dict:
    """Sharded adapters of a checkpoint that holds no more; otherwise as `restore_params`."""
    return _restore(folder, lora.abstract(config, adapters), lora.shardings(config, adapters, mesh), None, step)


def _restore(folder, abstract: dict, shardings: dict, dtype: Any, step: int | None) -> dict:
    path = checkpoint_path(folder, step) / "params"
    with _reading(path), ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata
        if stored is None:
            raise OSError("what it says of its parameters is damaged or not there")
        found = stored.tree
        check_shapes(abstract, found, str(path))
        target = jax.tree.map(
            lambda a, f, s: jax.ShapeDtypeStruct(a.shape, dtype or f.dtype, sharding=s), abstract, found, shardings
        )
        return checkpointer.restore(path, target)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise of damaged files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read: {_reason(error)}. It is damaged; use another step of it, if there "
            "is one (a folder of checkpoints/ that is moved away is not looked at)."
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what Orbax or TensorStore say."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def check_shapes(expected: dict, found: dict, where: str) -> None:
    """Raises one UserError that lists every parameter that is missing, unknown or of another shape."""
    expected, found = _shapes(expected), _shapes(found)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise UserError(
            f"The parameters in {where} are not those of the configured model: {'; '.join(problems)}. Use the "
            "config.model that the checkpoint was made with."
        )


def _shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _loss(metrics: dict) -> float:
    """What checkpoints are compared by: one that was not evaluated is worse than any that was."""
    return math.inf if metrics["loss"] is None else metrics["loss"]


class Checkpoints:
    """The checkpoints of a run: written in the background, whole or not at all, last and best ones kept."""

    def __init__(self, folder: str | pathlib.Path, keep_last: int = 3, keep_best: int = 0):
        """Opens, or starts, the checkpoints in `folder`.

        Raises:
          UserError: the folder cannot be written, or has a name that cannot be used.
        """
        check_folder_name(folder)
        self._folder = storage.absolute(folder)
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_loss if keep_best else None,  # with none Orbax writes no losses down for the next start
            best_mode="min",
            cleanup_tmp_directories=True,
            save_interval_steps=1,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet),
        )
        self._failure: BaseException | None = None  # what a save in the background failed with
        try:
            (self._folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder / "checkpoints", options=options)
        except OSError as error:
            raise UserError(
                f"Cannot write checkpoints to {self._folder}: {error.strerror or error}. Choose a --workdir that can "
                "be written."
            ) from None

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def latest_meta(self) -> dict | None:
        """Metadata of the latest checkpoint; None if there is none yet."""
        step = self.latest_step()
        return None if step is None else read_meta(self._folder, step)

    def save(self, state: TrainState, next_row: int, meta: dict, eval_loss: float | None = None) -> None:
        """Starts to save; returns as soon as the state has been copied off the devices.

        Raises:
          UserError: this or an earlier save could not be written (disk full, no permission); earlier checkpoints stay
            whole.
        """
        step = meta["step"]
        # In pieces of few layers, so that an export can read a large model a layer at a time.
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=stream.CHUNK_BYTES, shard_axes=(0,)), state.params)
        items = {
            "params": ocp.args.StandardSave(state.params, pieces),
            "optimizer": ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
            "data": ocp.args.JsonSave({"next_row": next_row}),
            "meta": ocp.args.JsonSave(meta),
        }
        self._guard(
            lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics={"loss": eval_loss}, force=True)
        )

    def check(self) -> None:
        """Raises a UserError if a save in the background has failed in this process."""
        self._guard(self._raise_failure)

    def close(self) -> None:
        """Waits for saves in the background."""
        self._guard(self._manager.wait_until_finished)
        self._manager.close()

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier between processes; where a save has failed, its error instead.

        Orbax would first take the process that failed to the barrier, while all others still wait for its files.
        """
        self._failure = self._failure or sys.exception()
        self._raise_failure()
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _guard(self, action) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise OSError, ValueError and their own for a full disk
            steps = steps_in(self._folder)
            kept = (
                f"The last complete checkpoint is step {steps[-1]}" if steps else "There is no complete checkpoint yet"
            )
            raise UserError(
                f"A checkpoint could not be written to {self._folder}: {_reason(error)}. {kept}. Make room or choose "
                "another --workdir, then start again."
            ) from error

    def restore(self, abstract_state: TrainState, meta: dict) -> tuple[TrainState, int]:
        """The latest checkpoint on the mesh of `abstract_state`, whatever mesh wrote it.

        Args:
          abstract_state: sharded jax.ShapeDtypeStructs; `frozen` is left empty.
          meta: of this run: the checkpoint must be of the same model and adapters, and of the same rows.

        Returns:
          The state, without the frozen base, and the number of the next row.

        Raises:
          UserError: the checkpoint belongs to another model, its rows were others and nobody allowed that, it holds
            weights alone, or it is damaged.
        """
        step, found = self.latest_step(), self.latest_meta()
        path = checkpoint_path(self._folder, step)
        if not (path / "optimizer").exists():
            raise UserError(
                f"{path} holds weights alone, so no run can go on from it. Give them as config.init_from, and choose "
                "another --workdir."
            )
        resume.check_same_model(found, meta, self._folder)
        note = resume.check_same_rows(found, meta, self._folder)
        if note:
            say(note)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract_state.params),
            optimizer=ocp.args.StandardRestore({"step": abstract_state.step, "state": abstract_state.opt_state}),
            data=ocp.args.JsonRestore(),
        )
        with _reading(path):
            restored = self._manager.restore(step, args=items)
        optimizer, next_row = restored["optimizer"], restored["data"]["next_row"]
        resume.check_same_length(found, meta, step, next_row)
        return TrainState(optimizer["step"], restored["params"], optimizer["state"], {}), next_row
