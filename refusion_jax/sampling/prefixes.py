"""Keys and values of the beginnings of prompts, kept for prompts that begin alike.

Prompts are read from left to right, so what a block of tokens leaves in the cache depends on the tokens up to its end
alone. An answer's entries are in commit order and are not kept.
"""

import collections
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.sampling.state import State

BLOCK = 128  # tokens that are kept together


class Prefixes:
    """Blocks of keys and values by the tokens up to their ends; those that were used last are kept.

    Attributes:
      asked, found: tokens of prompts that were looked for, and of them those that were there.
    """

    def __init__(self, blocks: int):
        """`blocks`: how many are kept."""
        self._room, self._kept = blocks, collections.OrderedDict[bytes, Any]()
        self.asked = self.found = 0

    def find(self, tokens: Sequence[int]) -> list[Any]:
        """The blocks that `tokens` begin with, as far as they are kept."""
        if not self._room:
            return []
        blocks = []
        for key in _keys(tokens):
            if key not in self._kept:
                break
            self._kept.move_to_end(key)
            blocks.append(self._kept[key])
        self.asked += len(tokens)
        self.found += len(blocks) * BLOCK
        return blocks

    def lacking(self, tokens: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """(key, first token) of every whole block of `tokens` that is not kept and that there is room for."""
        for index, key in zip(range(self._room), _keys(tokens)):
            if key not in self._kept:
                yield key, index * BLOCK

    def keep(self, key: bytes, block: Any) -> None:
        """Keeps a block, and forgets the one that has not been used for the longest time if there are too many."""
        self._kept[key] = block
        if len(self._kept) > self._room:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()


def _keys(tokens: Sequence[int]) -> Iterator[bytes]:
    """A digest of all tokens up to the end of each whole block."""
    digest = hashlib.blake2b(digest_size=16)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest.update(np.asarray(tokens[end - BLOCK : end], np.int32).tobytes())
        yield digest.digest()


# --- What is compiled. All rows are read and written, and one of them chosen: rows may lie on different devices.


def take(state: State, row: jax.Array, offset: jax.Array) -> Any:
    """Keys and values [.., kv_head, BLOCK, head_dim] of a row from entry `offset` on."""

    def part(x):
        entries = jax.lax.dynamic_slice_in_dim(x, offset, BLOCK, axis=-2)
        return jnp.where(_chosen(x, row), entries, 0).sum(axis=-4, dtype=x.dtype)

    return jax.tree.map(part, (state.cache.k, state.cache.v))


def put(state: State, row: jax.Array, offset: jax.Array, block: Any) -> State:
    """The state with what `take` gave in the entries of a row from `offset` on; the row's own entries end behind them,
    since a row that waits for its prompt takes part in all forwards, and writes there.
    """

    def write(x, part):
        entries = jax.lax.dynamic_slice_in_dim(x, offset, BLOCK, axis=-2)
        changed = jnp.where(_chosen(x, row), jnp.expand_dims(part, -4), entries)
        return jax.lax.dynamic_update_slice_in_dim(x, changed, offset, axis=-2)

    k, v = jax.tree.map(write, (state.cache.k, state.cache.v), block)
    length = jnp.where(jnp.arange(len(state.cache.length)) == row, offset + BLOCK, state.cache.length)
    return state.replace(cache=state.cache.replace(k=k, v=v, length=length)).placed()


def _chosen(x: jax.Array, row: jax.Array) -> jax.Array:
    """[batch, 1, 1, 1] bool."""
    return (jnp.arange(x.shape[-4]) == row)[:, None, None, None]
