"""Safetensors files read and written piece by piece.

The `safetensors` library maps whole files, which then count as resident memory, and writes whole shards from memory.
Here a tensor is mapped while it is read and a file is filled in any order, so that memory stays at a tensor's size.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from refusion_jax import storage
from refusion_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHOWN = 20  # problems of a checkpoint in one message
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `offset` bytes into `file`."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def open(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor or rows of it, read-only.

        Of a local file a memory map: bytes are read when they are looked at, and let go with the last reference. From a
        bucket all of these rows are fetched.
        """
        if storage.is_local(self.file):
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[rows]
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        first, last = self.offset + start * row, self.offset + stop * row
        content = storage.read(self.file, first, last) if first < last else b""
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


def read_header(file: pathlib.Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one file, and what is wrong with it (nothing: an empty list). No data is read."""
    try:
        (size,) = storage.sizes([file])
        (length,) = struct.unpack("<Q", storage.read(file, 0, 8))
        if length > size - 8:
            return {}, [
                f"{file} is truncated or no safetensors file (its header should have {length} bytes, the file has "
                f"{size})"
            ]
        header = json.loads(storage.read(file, 8, 8 + length))
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
    except FileNotFoundError:
        return {}, [f"{file} is missing"]
    except UserError:  # a bucket that does not answer
        raise
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{file} is no safetensors file, or a corrupt one ({error})"]
    tensors, problems = {}, []
    for name, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            problems.append(f"{name} in {file} has the type {dtype}; readable are {', '.join(DTYPES)}")
        elif end - begin != int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize:
            problems.append(f"{name} in {file} is corrupt: {end - begin} bytes for shape {list(shape)} of {dtype}")
        elif 8 + length + end > size:
            problems.append(f"{file} is truncated: {name} ends at byte {8 + length + end}, the file has {size}")
        else:
            tensors[name] = Tensor(file, DTYPES[dtype], shape, 8 + length + begin)
    return tensors, problems


def read_folder(folder: pathlib.Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `model.safetensors`, or of an index and its shards, and everything wrong with them.

    Raises:
      UserError: the folder has neither.
    """
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return read_header(folder / SINGLE)
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf"))
        raise UserError(
            f"{folder} has no {SINGLE} and no {INDEX}"
            + (f" (it has {', '.join(found[:5])})" if found else "")
            + ". Weights are read from safetensors files only: give the folder that holds them."
        )
    try:
        weight_map = json.loads(storage.read(folder / INDEX))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{folder / INDEX} is malformed ({error!r})"]
    tensors, problems, unread = {}, [], set()
    for file in files:
        found, wrong = read_header(folder / file)
        problems += wrong
        if wrong and not found:
            unread.add(file)
        for name, tensor in found.items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].file.name} and again in {file}")
            elif weight_map.get(name) != file:
                problems.append(f"{name} is in {file}, but {INDEX} says {weight_map.get(name, 'nothing of it')}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors and file not in unread:
            problems.append(f"{INDEX} says that {name} is in {file}, but it is not there")
    return tensors, problems


def listed(problems: Sequence[str]) -> str:
    """'3 problems: (1) ...; (2) ...; (3) ....'"""
    shown = "; ".join(f"({i + 1}) {p}" for i, p in enumerate(problems[:SHOWN]))
    rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {shown}{rest}."


class Writer:
    """Writes tensors of known shapes, in any order, each in pieces if need be, as one file or shards with an index.

    Args:
      folder: an existing folder.
      tensors: (name, dtype, shape) in the order they are to have.
      shard_bytes: a new file is begun when the current one would grow beyond that.
    """

    def __init__(
        self, folder: pathlib.Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], shard_bytes: int
    ):
        shards: list[dict] = [{}]
        filled = 0
        for name, dtype, shape in tensors:
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if filled and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [filled, filled + size]}
            filled += size
        count = len(shards)
        self.files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.total_bytes = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0] for shard in shards for entry in shard.values()
        )
        self._handles, self._tensors = [], {}
        for file, shard in zip(self.files, shards):
            # transformers refuses a file that does not say which framework's layout it has.
            header = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            handle = open(folder / file, "wb", buffering=0)
            handle.write(struct.pack("<Q", len(header)) + header)
            self._handles.append(handle)
            for name, entry in shard.items():
                self._tensors[name] = (
                    handle.fileno(),
                    8 + len(header) + entry["data_offsets"][0],
                    DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                )
        if count > 1:
            weight_map = {name: file for file, shard in zip(self.files, shards) for name in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, values: np.ndarray, row: int = 0) -> None:
        """Puts `values`, a tensor or rows of it from `row` on, into its place, cast to the tensor's type."""
        handle, offset, dtype, shape = self._tensors[name]
        assert values.shape[1:] == shape[1:] and row + values.shape[0] <= shape[0], (name, values.shape, shape)
        offset += row * int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        data = memoryview(np.ascontiguousarray(values.astype(dtype, copy=False)).view(np.uint8).reshape(-1))
        while data:  # one call writes at most 2 GiB
            written = os.pwrite(handle, data[: 1 << 30], offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        for handle in self._handles:
            os.fsync(handle.fileno())
            handle.close()
