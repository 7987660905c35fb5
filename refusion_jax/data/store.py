"""A store: the tokenised examples of one source, in shards that are read a block at a time, from a disk or a bucket.

A store is a folder, named after its content and tokenizer:

  plan.json             which stretches of the source become which shards, and of what; written first
  shard-00007.bin/json  see `shards.py`
  index.json            counts of the shards and checksums of their descriptions; written last
  rows-*.npy            what rows of some length become of it (`windows.py`)
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import threading

import numpy as np
from etils import epath

from refusion_jax import storage
from refusion_jax.config import SourceConfig
from refusion_jax.data import shards
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.errors import UserError

FORMAT = 2
CACHED_BYTES = 384 * 2**20  # of blocks, in each process
_SHARDS_KEPT = 512  # descriptions in memory
READERS = 8  # threads that read ahead


class Store:
    """A finished store.

    Attributes:
      name: of the source, for messages.
      content: fingerprint of the source's content and of how it was read.
      tokenizer: fingerprint of the tokenizer.
    """

    def __init__(self, folder: epath.Path, index: dict):
        self.folder, self._shards = folder, index["shards"]
        self.name, self.content, self.tokenizer = index["source"], index["content"], index["tokenizer"]
        self._first_blocks = np.cumsum([0, *(blocks for _, _, blocks, _ in self._shards)])
        self._shard = functools.lru_cache(_SHARDS_KEPT)(self._read_shard)

    def __reduce__(self):
        return open_store, (self.folder,)

    def __len__(self) -> int:
        return sum(examples for examples, *_ in self._shards)

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens, *_ in self._shards)

    @property
    def num_blocks(self) -> int:
        return int(self._first_blocks[-1])

    @functools.cached_property
    def cut(self) -> str:
        """Changes with where the source was cut into shards."""
        return hashlib.blake2b(json.dumps([s[:3] for s in self._shards]).encode(), digest_size=8).hexdigest()

    def examples(self, block: int) -> np.ndarray:
        """The records of a block: `shards.EXAMPLE` [examples]."""
        shard, where = self._find(block)
        return shard.read_examples(where)

    def tokens(self, block: int) -> np.ndarray:
        """The tokens of a block, end to end: uint32 [tokens]. The last ones asked for are kept in memory."""
        return _BLOCKS.get(self, block)

    def read_ahead(self, block: int) -> None:
        """Begins to fetch the tokens of a block, unless they are here."""
        _BLOCKS.start(self, block)

    def read_tokens(self, block: int) -> np.ndarray:
        shard, where = self._find(block)
        return shard.read_tokens(where)

    def _find(self, block: int) -> tuple[shards.Shard, shards.Block]:
        number = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        shard = self._shard(number)
        return shard, shard.blocks[block - self._first_blocks[number]]

    def _read_shard(self, number: int) -> shards.Shard:
        examples, tokens, blocks, crc32 = self._shards[number]
        shard = shards.read(shard_path(self.folder, number))
        if shard is None or shard.crc32 != crc32:
            raise UserError(
                f"{shard_path(self.folder, number)} is missing, damaged, or was changed after its index was written. "
                "python -m refusion_jax.prepare makes it again."
            )
        return shard


class _Blocks:
    """The blocks of all stores that were asked for last, or are being fetched, of `CACHED_BYTES` at most."""

    def __init__(self):
        self._lock = threading.Lock()
        self._held: collections.OrderedDict[tuple, concurrent.futures.Future] = collections.OrderedDict()
        self._pool = concurrent.futures.ThreadPoolExecutor(READERS, thread_name_prefix="read ahead")

    def get(self, store: Store, block: int) -> np.ndarray:
        with self._lock:
            future = self._held.get((store, block))
            mine = future is None
            if mine:
                future = self._held[store, block] = concurrent.futures.Future()
            self._held.move_to_end((store, block))
        if mine:
            self._fetch(store, block, future)
        return future.result()

    def start(self, store: Store, block: int) -> None:
        with self._lock:
            if (store, block) in self._held:
                return
            future = self._held[store, block] = concurrent.futures.Future()
        self._pool.submit(self._fetch, store, block, future)

    def _fetch(self, store: Store, block: int, future: concurrent.futures.Future) -> None:
        try:
            future.set_result(store.read_tokens(block))
        except BaseException as error:  # for the thread that needs the block; the next one tries again
            with self._lock:
                self._held.pop((store, block), None)
            future.set_exception(error)
            return
        with self._lock:
            done = [(k, f.result().nbytes) for k, f in self._held.items() if f.done() and not f.exception()]
            size = sum(nbytes for _, nbytes in done)
            for k, nbytes in done[:-1]:
                if size <= CACHED_BYTES:
                    break
                del self._held[k]
                size -= nbytes


_BLOCKS = _Blocks()


def shard_path(folder: epath.Path, number: int) -> epath.Path:
    return folder / f"shard-{number:05}.bin"


def describe(config: SourceConfig) -> dict:
    """What of a source's settings decides which examples a store of it holds."""
    kept = dataclasses.asdict(config)
    for name in ("weight", "start", "stop"):
        del kept[name]
    return json.loads(json.dumps(kept))


def open_store(folder: epath.Path) -> Store | None:
    """The store in a folder; None if there is none, or an unfinished or damaged one."""
    found = shards.read_checked(folder / "index.json")
    return Store(folder, found[0]) if found and found[0].get("format") == FORMAT else None


def find(config: SourceConfig, tokenizer: Tokenizer, folder: str | os.PathLike) -> Store:
    """The store of a source among those that `refusion_jax.prepare` made in a folder; the source itself is not read.

    Raises:
      UserError: there is none, an unfinished one, one of another tokenizer, or several of other contents.
    """
    root, wanted = storage.as_path(folder), describe(config)
    name = f"{config.kind}:{config.path}"
    remedy = f"Run python -m refusion_jax.prepare with this config and --out {folder}."
    if not root.is_dir():
        raise UserError(f"data.store is {str(folder)!r}, and there is no such folder. {remedy}")
    plans = {path: shards.read_checked(path / "plan.json") for path in sorted(root.iterdir()) if path.is_dir()}
    plans = {path: found[0] for path, found in plans.items() if found and found[0]["description"] == wanted}
    ours = [path for path, plan in plans.items() if plan["tokenizer"] == tokenizer.fingerprint]
    if plans and not ours:
        raise UserError(
            f"the store of {name!r} in {str(folder)!r} was made by another tokenizer than config.data.tokenizer. Set "
            f"that to the one it was made by, or make another: {remedy}"
        )
    if not ours:
        raise UserError(f"there is no store of {name!r} with these settings in {str(folder)!r}. {remedy}")
    if len(ours) > 1:
        names = ", ".join(path.name for path in ours)
        raise UserError(
            f"{str(folder)!r} has several stores of {name!r}, whose content has changed: {names}. Remove all but the "
            "one to use."
        )
    store = open_store(ours[0])
    if store is None:
        total = len(plans[ours[0]]["shards"])
        done = sum(1 for path in ours[0].iterdir() if path.name.startswith("shard-") and path.suffix == ".json")
        raise UserError(
            f"the store of {name!r} in {str(folder)!r} is unfinished: {total - done} of its {total} shards are missing"
            f"{'' if done < total else ', only its index'}. {remedy}"
        )
    return store
