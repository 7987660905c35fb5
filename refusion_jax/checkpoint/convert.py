"""Hugging Face checkpoint -> Orbax checkpoint and back, a piece of a parameter in memory at a time.

Values are copied or, when another dtype is asked for, rounded or quantised. Both may lie in buckets. The result appears
under its name only when it is whole: until then it is in a folder `<name>.incomplete`, or in a bucket no checkpoint.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from refusion_jax import storage
from refusion_jax.checkpoint import huggingface, int8, load, metadata, orbax, safetensors, stream
from refusion_jax.checkpoint.destination import Arrays, Progress, Say, free, new_folder, size_text
from refusion_jax.config import LoraConfig
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model import config as model_config
from refusion_jax.model.config import ModelConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
TABLES = ("embed/embedding", "head/embedding")


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
      source: folder, one in a bucket, or name on the Hugging Face hub.
      destination: a folder that does not exist, perhaps in a bucket.
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
    folder, destination = huggingface.resolve(source), storage.as_path(destination)
    orbax.check_folder_name(destination)
    weights = huggingface.Weights(folder)
    config, vocabulary = _result(weights, folder, tokenizer, new_tokens, vocab_rows, quantise)
    new = {vocabulary.begin_id, vocabulary.mask_id} if new_tokens == "mean" else set()
    tables = _Tables(weights, config.vocab_size, new, config.logical_vocab_size)
    weights.check_tied_head()

    arrays = _arrays(weights, config, dtype)
    progress = Progress(say, arrays)
    say(
        f"tokenizer: {'none' if vocabulary is None else f'{vocabulary.vocab_size} ids, mask {vocabulary.mask_id}'}; "
        f"table: {config.vocab_size} rows"
    )
    if dry_run:
        for path in arrays:
            progress.line(path)
        return
    with new_folder(destination, say) as partial:
        if vocabulary:
            with storage.filling(partial / "tokenizer") as place:
                vocabulary.save(place)
        meta = metadata.make_meta(config, step=0, tokenizer=(tokenizer or str(source)) if vocabulary else "")
        stream.save(partial / "checkpoints" / "0", _streams(weights, tables, arrays, progress, str(folder)), meta)
    say(f"wrote {destination} ({size_text(storage.folder_bytes(destination))})")


def _arrays(weights: huggingface.Weights, config: ModelConfig, dtype: str) -> Arrays:
    """What is written for a model in another dtype, or in int8 with its scales."""
    arrays = {}
    for path, p in huggingface.parameters(config).items():
        arrays[path] = p.shape, DTYPES.get(dtype, weights.dtype(path))
        if config.quantise and p.inputs:
            channels = tuple(size for axis, size in enumerate(p.shape) if axis not in p.inputs)
            arrays[path] = p.shape, np.dtype(np.int8)
            arrays[f"{path}_scale"] = channels, np.dtype(np.float32)
    return arrays


def _streams(
    weights: huggingface.Weights, tables: _Tables, arrays: Arrays, progress: Progress, where: str
) -> dict[str, stream.Stream]:
    """The arrays, made piece by piece as they are written, scales after their matrices."""
    scales = {path: np.zeros(*described) for path, described in arrays.items() if path not in weights.parameters}

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
                piece, scale = int8.quantise(piece, weights.parameters[path].inputs, f"{path} in {where}")
                scales[f"{path}_scale"][start:stop] = scale
            if stop == shape[0]:
                progress.finished(path)
            return piece.astype(target, copy=False)

        return stream.Stream(shape, target, read)

    return {path: stream_of(path) for path in arrays}


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
      destination: a folder that does not exist; one in a bucket is filled on this machine's disk first.
      step: of the checkpoint; None: the last.
      dtype: of the tensors; empty: as in the checkpoint.
      shard_bytes: largest size of a file, unless one tensor is larger.
      dry_run, say: as in `to_orbax`.

    Raises:
      UserError: everything that can be wrong with source or destination; nothing is left behind then.
    """
    destination = storage.as_path(destination)
    config, reader = open_checkpoint(source, step)
    arrays = {
        path: (p.shape, DTYPES.get(dtype, reader.dtype(path))) for path, p in huggingface.parameters(config).items()
    }
    progress = Progress(say, arrays)
    if dry_run:
        for path in arrays:
            progress.line(path)
        return
    ids = {"bos_token_id": config.begin_token_id, "eos_token_id": config.eos_token_id}
    ids = {"do_sample": False, **ids, "pad_token_id": config.pad_token_id}
    kinds = {kind.name for _, kind in arrays.values()}
    with new_folder(destination, say) as partial:
        with storage.filling(partial) as folder:
            if shutil.disk_usage(folder).free < progress.total:
                raise UserError(
                    f"{destination} needs {size_text(progress.total)}, but the disk has {free(folder)} free "
                    f"({folder.parent}). Make room, or choose another place or a smaller --dtype."
                )
            files = _write_tensors(reader, config, arrays, folder, shard_bytes, progress)
            _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
            _save_tokenizer(source, step, folder, say)
        # Last: without it a folder in a bucket is no checkpoint.
        written = model_config.to_huggingface(config, kinds.pop() if len(kinds) == 1 else "float32")
        _write_json(partial / "config.json", written)
    say(f"wrote {destination}: {', '.join(files)}")


def _write_tensors(
    reader: stream.Reader,
    config: ModelConfig,
    arrays: Arrays,
    folder: pathlib.Path,
    shard_bytes: int,
    progress: Progress,
) -> list[str]:
    """Writes the safetensors files, whose names are returned."""
    tensors = [(name, arrays[p.path][1], p.tensor_shape) for name, p in huggingface.in_file_order(config)]
    writer = safetensors.Writer(folder, tensors, shard_bytes)
    for path, parameter in huggingface.parameters(config).items():
        for start, stop in stream.row_ranges(parameter.shape[0], reader.step(path)):
            piece = reader.read(path, (slice(start, stop), *[slice(None)] * (len(parameter.shape) - 1)))
            if parameter.stacked:
                for i in range(start, stop):
                    writer.write(parameter.names[i], parameter.to_tensor(piece[i - start]))
            else:
                writer.write(parameter.names[0], piece, row=start)
        progress.finished(path)
    writer.close()
    return writer.files


def _save_tokenizer(source: str | pathlib.Path, step: int | None, folder: pathlib.Path, say: Say) -> None:
    try:
        tokenizer = load.load_tokenizer_for(source, step)
    except UserError as error:
        say(f"no tokenizer is written: {error}")
        return
    tokenizer.save(folder)


def _write_json(file: epath.Path | pathlib.Path, value: dict[str, Any]) -> None:
    storage.write(file, (json.dumps(value, indent=2) + "\n").encode())
