"""Parameters of an Orbax checkpoint written and read piece by piece, for models larger than the memory.

Orbax serialises whole arrays. Here a parameter is a stream of pieces that are made as they are written, into the store
Orbax itself uses (an OCDBT database of zarr arrays); Orbax adds its metadata and any of its readers takes the result.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util
from orbax.checkpoint import future

from refusion_jax import storage
from refusion_jax.checkpoint.safetensors import listed
from refusion_jax.errors import UserError

CHUNK_BYTES = 64 << 20


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Shape of at most CHUNK_BYTES: whole leading axes are given up first, so that a chunk holds few layers or rows."""
    chunk = list(shape)
    for axis in range(len(shape)):
        rest = math.prod(chunk[axis + 1 :]) * itemsize
        if chunk[axis] * rest <= CHUNK_BYTES:
            break
        chunk[axis] = max(1, CHUNK_BYTES // rest)
    return tuple(chunk)


def _database(folder: str | pathlib.Path, array: str) -> dict[str, Any]:
    """TensorStore's name of an array; it takes the address of a bucket as it is."""
    place = storage.absolute(folder)
    base = {"driver": "file", "path": f"{place}/"} if storage.is_local(place) else f"{place}/"
    return {"driver": "ocdbt", "base": base, "path": array}


def row_ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive groups of `step` rows."""
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class Reader(Protocol):
    """Parameters read slice by slice: StoredParams, huggingface.Weights, or an adapter over one of them."""

    def dtype(self, path: str) -> np.dtype: ...

    def step(self, path: str) -> int:
        """Entries of the first axis that are best read together."""

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """An array to be written in groups of entries of its first axis: `read(start, stop)` makes one group."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes a Stream where and how Orbax would have written the numpy array."""

    async def serialize(self, values, infos, args=None):
        return [future.CommitFutureAwaitingContractedSignals(self._write(values, infos), name="parameter_stream")]

    async def _write(self, values: Sequence[Stream], infos: Sequence[Any]) -> None:
        for stream, info in zip(values, infos):
            await info.await_path_creation()
            chunk = chunk_shape(stream.shape, stream.dtype.itemsize)
            store = await tensorstore.open(
                {
                    "driver": "zarr",
                    # Orbax merges the databases `ocdbt.process_*` of all processes when it finalises the checkpoint.
                    "kvstore": _database(f"{info.parent_dir}/ocdbt.process_0", info.name),
                    "dtype": stream.dtype.name,
                    "metadata": {"shape": stream.shape, "chunks": chunk, "compressor": {"id": "zstd", "level": 1}},
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                context=info.ts_context,
            )
            for start, stop in row_ranges(stream.shape[0], chunk[0]):
                await store[start:stop].write(stream.read(start, stop))


def save(folder: pathlib.Path, streams: dict[str, Stream], meta: dict[str, Any]) -> None:
    """Writes `folder`/{params,meta}, a step of a checkpoint folder.

    Args:
      streams: by path, as in "layers/mlp/gate"; written in this order.
    """
    # Orbax warns when its registry cannot store a jax.Array, whether or not there is one.
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stream, _StreamHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), meta=ocp.JsonCheckpointHandler()
    )
    tree = traverse_util.unflatten_dict(streams, sep="/")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            storage.absolute(folder),
            ocp.args.Composite(params=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta)),
        )


class StoredParams:
    """Parameters of a step of an Orbax checkpoint, read slice by slice.

    Args:
      folder: .../checkpoints/<step>/params.
      shapes: path -> shape of every parameter that must be there.

    Raises:
      UserError: one list of the parameters that cannot be read or have another shape.
    """

    def __init__(self, folder: pathlib.Path, shapes: dict[str, tuple[int, ...]]):
        self._folder, self._stores, problems = folder, {}, []
        for path, shape in shapes.items():
            spec = {"driver": "zarr", "kvstore": _database(folder, path.replace("/", "."))}
            try:
                self._stores[path] = store = tensorstore.open(spec, open=True).result()
                if store.shape != shape:
                    problems.append(f"{path} is {list(store.shape)}, the model makes it {list(shape)}")
            except ValueError as error:
                problems.append(f"{path}: {str(error).partition(' [')[0]}")
        if problems:
            raise UserError(
                f"The parameters in {folder} cannot be read, {listed(problems)} The checkpoint is damaged; use "
                "another step of it."
            )

    def dtype(self, path: str) -> np.dtype:
        return self._stores[path].dtype.numpy_dtype

    def step(self, path: str) -> int:
        """Entries of the first axis that are stored together: reading fewer at a time reads some of them again."""
        return self._stores[path].chunk_layout.read_chunk.shape[0]

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._stores[path][index].read().result()
        except (OSError, ValueError) as error:
            reason = str(error).partition(" [")[0]
            raise UserError(
                f"The parameter {path} in {self._folder} cannot be read: {reason}. The checkpoint is damaged; use "
                "another step of it."
            ) from None
