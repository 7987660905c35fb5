"""Hugging Face checkpoint -> Orbax checkpoint and back, a piece of a parameter in memory at a time.

Values are copied or, when another dtype is asked for, rounded or quantised. The result appears under its name only when
it is whole: until then it is in a folder `<name>.incomplete`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from refusion_jax.checkpoint import huggingface, int8, load, orbax, safetensors, stream
from refusion_jax.config import LoraConfig
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model import config as model_config
from refusion_jax.model.config import ModelConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
TABLES = ("embed/embedding", "head/embedding")
Say = Callable[[str], None]


@contextlib.contextmanager
def new_folder(destination: pathlib.Path, say: Say) -> Iterator[pathlib.Path]:
    """A folder to fill, which gets the name `destination` when the block ends without an error.

    Raises:
      UserError: the destination exists, another process is writing it, or it cannot be written (a full disk, say).
    """
    if destination.exists():
        raise UserError(f"{destination} exists already. Remove it, or choose another name for the result.")
    partial = destination.with_name(destination.name + ".incomplete")
    try:
        if partial.exists():
            with _locked(partial):
                say(f"removing {partial}: an earlier conversion did not finish")
                shutil.rmtree(partial)
        partial.mkdir(parents=True)
        with _locked(partial):
            yield partial
            os.rename(partial, destination)
    except BlockingIOError:
        raise UserError(
            f"{partial} is being written by another process. Wait for it, or choose another name for the result."
        ) from None
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors that quote the system's
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if getattr(error, "errno", None) in full or any(f"os_error_code='{code}'" in str(error) for code in full):
            raise UserError(
                f"The disk is full: {destination} could not be written ({_free(destination)} free) and nothing of it "
                "was kept. Make room, or choose another place."
            ) from None
        if isinstance(error, OSError):
            raise UserError(
                f"{destination} could not be written: {error}. Choose a folder that can be written."
            ) from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that left-overs can be told from work in progress."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _free(folder: pathlib.Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return _size(shutil.disk_usage(folder).free)


class _Progress:
    """One line for each parameter: what, how large, how fast."""

    def __init__(self, say: Say, arrays: dict[str, tuple[tuple[int, ...], np.dtype]], unit: str):
        self._say, self._arrays, self._unit = say, arrays, unit
        self._bytes = {path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in arrays.items()}
        self._total, self._done, self._start = sum(self._bytes.values()), 0, time.monotonic()
        say(
            f"{len(arrays)} {unit}, {sum(math.prod(shape) for shape, _ in arrays.values()):,} values, "
            f"{_size(self._total)}"
        )

    def line(self, path: str, note: str = "") -> None:
        shape, dtype = self._arrays[path]
        self._say(f"  {path:34} {'x'.join(map(str, shape)):>22} {dtype.name:9} {_size(self._bytes[path]):>10}{note}")

    def finished(self, path: str) -> None:
        self._done += self._bytes[path]
        seconds = time.monotonic() - self._start
        self.line(path, f"  {self._done / self._total:4.0%}  {seconds:6.1f} s")


class _Tables:
    """The source's embedding tables with another number of rows, and with new rows for the new tokens.

    Rows that are added, and the rows of `new_tokens`, are the mean of the other tokens' rows.
    """

    def __init__(self, weights: huggingface.Weights, rows: int, new_tokens: set[int], logical: int):
        self._weights, self._rows, self._new = weights, rows, new_tokens
        self._others = range(min(logical, weights.config.vocab_size))
        self._means: dict[str, np.ndarray] = {}

    def _mean(self, path: str) -> np.ndarray:
        if path not in self._means:
            total = np.zeros(self._weights.config.hidden_size, np.float64)
            for start, stop in stream.row_ranges(len(self._others), self._weights.step(path)):
                rows = self._weights.read(path, (slice(start, stop), slice(None)))
                keep = [i not in self._new for i in range(start, stop)]
                total += rows[keep].sum(0, dtype=np.float64)
            self._means[path] = total / sum(i not in self._new for i in self._others)
        return self._means[path]

    def read(self, path: str, start: int, stop: int) -> np.ndarray:
        rows = self._weights.read(path, (slice(start, min(stop, self._weights.config.vocab_size)), slice(None)))
        added = stop - start - len(rows)
        if added:
            rows = np.concatenate([rows, np.tile(self._mean(path), (added, 1)).astype(rows.dtype)])
        for i in self._new & set(range(start, stop)):
            rows[i - start] = self._mean(path)
        return rows


def to_orbax(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    dtype: str = "",
    tokenizer: str = "",
    new_tokens: str = "source",
    vocab_rows: int = 0,
    quantise: str = "",
    dry_run: bool = False,
    say: Say = print,
) -> None:
    """Converts a Hugging Face checkpoint into a checkpoint folder, step 0.

    Args:
      source: folder, or name on the Hugging Face hub.
      destination: a folder that does not exist.
      dtype: of the result; empty: as in the source.
      tokenizer: "bytes", folder or name; empty: the source's, if it has one.
      new_tokens: rows of the begin and mask token: "source" (as they are) or "mean" (of the other tokens).
      vocab_rows: rows of the result's tables; 0: as in the source, or as many as the tokenizer needs with "mean".
      quantise: "int8": matrices and tables in int8 with a float32 scale for every output channel or row, for decoding
        only; norms have `dtype`. Empty: all of them as they are.
      dry_run: only say what would be written.
      say: takes a line of progress.

    Raises:
      UserError: everything that can be wrong with source, tokenizer or destination; nothing is left behind then.
    """
    folder, destination = huggingface.resolve(source), pathlib.Path(destination)
    weights = huggingface.Weights(folder)
    config, vocabulary = _result(weights, folder, tokenizer, new_tokens, vocab_rows, quantise)
    rows = config.vocab_size
    new = {vocabulary.begin_id, vocabulary.mask_id} if new_tokens == "mean" else set()
    tables = _Tables(weights, rows, new, config.logical_vocab_size)
    weights.check_tied_head()

    table = huggingface.parameters(config)
    arrays, scales = {}, {}
    for path, p in table.items():
        arrays[path] = p.shape, DTYPES.get(dtype, weights.dtype(path))
        if quantise and p.inputs:
            arrays[path] = p.shape, np.dtype(np.int8)
            channels = [size for axis, size in enumerate(p.shape) if axis not in p.inputs]
            scale = scales[f"{path}_scale"] = np.zeros(channels, np.float32)
            arrays[f"{path}_scale"] = scale.shape, scale.dtype
    progress = _Progress(say, arrays, "parameters")
    say(
        f"tokenizer: {'none' if vocabulary is None else f'{vocabulary.vocab_size} ids, mask {vocabulary.mask_id}'}; "
        f"table: {rows} rows"
    )
    if dry_run:
        for path in arrays:
            progress.line(path)
        return

    def stream_of(path: str) -> stream.Stream:
        shape, target = arrays[path]

        def read(start: int, stop: int) -> np.ndarray:
            if path in scales:
                piece = scales[path][start:stop]
            elif path in TABLES:
                piece = tables.read(path, start, stop)
            else:
                piece = weights.read(path, (slice(start, stop), *[slice(None)] * (len(shape) - 1)))
            if target == np.int8:
                piece, scale = int8.quantise(piece, table[path].inputs, f"{path} in {folder}")
                scales[f"{path}_scale"][start:stop] = scale  # written after its matrix
            if stop == shape[0]:
                progress.finished(path)
            return piece.astype(target, copy=False)

        return stream.Stream(shape, target, read)

    orbax.check_folder_name(destination)
    with new_folder(destination, say) as partial:
        if vocabulary:
            vocabulary.save(partial / "tokenizer")
        meta = orbax.make_meta(config, step=0, tokenizer=(tokenizer or str(source)) if vocabulary else "")
        stream.save(partial / "checkpoints" / "0", {path: stream_of(path) for path in arrays}, meta)
    say(f"wrote {destination} ({_size(_folder_bytes(destination))})")


def _result(
    weights: huggingface.Weights, folder: pathlib.Path, tokenizer: str, new_tokens: str, vocab_rows: int, quantise: str
) -> tuple[ModelConfig, Tokenizer | None]:
    """The converted model's config and its tokenizer, if there is one; arguments as in `to_orbax`."""
    config, vocabulary = weights.config, None
    if tokenizer or any((folder / name).exists() for name in load.TOKENIZER_FILES):
        vocabulary = load_tokenizer(tokenizer or str(folder))
    elif new_tokens == "mean":
        raise UserError(f"{folder} has no tokenizer, so the new tokens are not known. Name one with --tokenizer.")
    rows = vocab_rows or config.vocab_size
    if new_tokens == "mean" and not vocab_rows:
        rows = max(rows, vocabulary.vocab_size)
    logical = min(rows, config.logical_vocab_size)
    config = dataclasses.replace(config, vocab_size=rows, logical_vocab_size=logical, quantise=quantise)
    if vocabulary:
        config = load.with_tokenizer(config, vocabulary, folder)
    elif rows < weights.config.vocab_size:
        raise UserError(
            f"--vocab-rows {rows} would cut rows off the table of {weights.config.vocab_size} in {folder}, and "
            "without a tokenizer nobody knows whether they are used. Name one with --tokenizer."
        )
    return config, vocabulary


def _folder_bytes(folder: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class MergedParams:
    """Parameters of a base model with adapters added: base + alpha / rank * a b, in float32."""

    def __init__(self, base: stream.Reader, adapters: stream.Reader, settings: LoraConfig):
        self._base, self._adapters, self._lora = base, adapters, settings

    def _adapted(self, path: str) -> bool:
        return path.startswith("layers/") and path.rpartition("/")[2] in self._lora.targets

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32) if self._adapted(path) else self._base.dtype(path)

    def step(self, path: str) -> int:
        return self._base.step(path)

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        value = self._base.read(path, index)
        if not self._adapted(path):
            return value
        # Training saw the base rounded to base_dtype.
        value = value.astype(DTYPES[self._lora.base_dtype]).astype(np.float32)
        a, b = (self._adapters.read(f"{path}/{side}", index[:1]) for side in "ab")
        for i in range(len(value)):
            value[i] += np.tensordot(a[i], b[i], axes=1) * (self._lora.alpha / self._lora.rank)
        return value


def open_checkpoint(source: str | pathlib.Path, step: int | None) -> tuple[ModelConfig, stream.Reader]:
    """Config and parameters of a checkpoint of either kind; adapters come merged into their base.

    Raises:
      UserError: int8 weights, or a checkpoint that cannot be read.
    """
    folder = load.locate(source)
    config = load.load_model_config(folder, step)
    if config.quantise:
        raise UserError(
            f"{folder} holds {config.quantise} weights, which Hugging Face's layout has no place for. Export the "
            "checkpoint that it was converted from."
        )
    reader, _ = load.stored(folder, step)
    adapted = load.checked_adapters_of(folder, step) if load.is_orbax(folder) else None
    if adapted is None:
        return config, reader
    settings, base = adapted
    base_config, base_reader = open_checkpoint(base.source, base.step)
    load.check_architecture(base_config, config, base)
    return config, MergedParams(base_reader, reader, settings)


def to_huggingface(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    step: int | None = None,
    dtype: str = "",
    shard_bytes: int = 4_000_000_000,
    dry_run: bool = False,
    say: Say = print,
) -> None:
    """Writes a checkpoint in Hugging Face layout, for PyTorch; adapters are merged into their base.

    Args:
      source: checkpoint folder of a training run or a conversion.
      destination: a folder that does not exist.
      step: of the checkpoint; None: the last.
      dtype: of the tensors; empty: as in the checkpoint.
      shard_bytes: largest size of a file, unless one tensor is larger.
      dry_run, say: as in `to_orbax`.

    Raises:
      UserError: everything that can be wrong with source or destination; nothing is left behind then.
    """
    destination = pathlib.Path(destination)
    config, reader = open_checkpoint(source, step)
    table = huggingface.parameters(config)
    arrays = {path: (p.shape, DTYPES.get(dtype, reader.dtype(path))) for path, p in table.items()}
    progress = _Progress(say, arrays, "parameters")
    needed = sum(math.prod(shape) * kind.itemsize for shape, kind in arrays.values())
    if dry_run:
        for path in arrays:
            progress.line(path)
        return
    with new_folder(destination, say) as partial:
        if shutil.disk_usage(partial).free < needed:
            raise UserError(
                f"{destination} needs {_size(needed)}, but the disk has {_free(partial)} free. Make room, or choose "
                "another place or a smaller --dtype."
            )
        writer = safetensors.Writer(
            partial,
            [(name, arrays[p.path][1], p.tensor_shape) for name, p in huggingface.in_file_order(config)],
            shard_bytes,
        )
        for path, parameter in table.items():
            for start, stop in stream.row_ranges(parameter.shape[0], reader.step(path)):
                piece = reader.read(path, (slice(start, stop), *[slice(None)] * (len(parameter.shape) - 1)))
                if parameter.stacked:
                    for i in range(start, stop):
                        writer.write(parameter.names[i], parameter.to_tensor(piece[i - start]))
                else:
                    writer.write(parameter.names[0], piece, row=start)
            progress.finished(path)
        writer.close()
        kinds = {kind.name for _, kind in arrays.values()}
        _write_json(
            partial / "config.json", model_config.to_huggingface(config, kinds.pop() if len(kinds) == 1 else "float32")
        )
        ids = {
            "bos_token_id": config.begin_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
        _write_json(
            partial / "generation_config.json", {"do_sample": False, **{k: v for k, v in ids.items() if v is not None}}
        )
        _save_tokenizer(source, step, partial, say)
    say(f"wrote {destination}: {', '.join(writer.files)}")


def _save_tokenizer(source: str | pathlib.Path, step: int | None, folder: pathlib.Path, say: Say) -> None:
    try:
        tokenizer = load.load_tokenizer_for(source, step)
    except UserError as error:
        say(f"no tokenizer is written: {error}")
        return
    tokenizer.save(folder)


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
