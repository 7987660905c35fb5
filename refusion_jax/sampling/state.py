"""What the samplers have in common: a cache and the rows of a batch."""

from typing import Any

import jax
from flax import linen as nn
from flax import struct

from refusion_jax.model.cache import KVCache


@struct.dataclass
class State:
    """A batch being decoded.

    `rows` is the sampler's own struct with a leading batch axis on every leaf. It has at least `done` [batch] bool and
    the log of committed tokens, `count` [batch], `tokens`, `offsets` (position in the response) and `rounds`, each
    [batch, length], and the counters `forwards` and `tokens_forwarded` [batch].
    """

    cache: KVCache
    rows: Any

    def insert(self, fresh: "State", rows: jax.Array, length: int) -> "State":
        """Puts the rows of `fresh`, with the first `length` entries of their caches, at `rows`; past the batch: nowhere."""
        put = lambda old, new: old.at[rows].set(new, mode="drop")
        put_cache = lambda old, new: old.at[:, rows, :, :length].set(new[:, :, :, :length], mode="drop")
        cache = KVCache(
            k=put_cache(self.cache.k, fresh.cache.k),
            v=put_cache(self.cache.v, fresh.cache.v),
            length=put(self.cache.length, fresh.cache.length),
        )
        return State(cache, jax.tree.map(put, self.rows, fresh.rows))

    def placed(self) -> "State":
        """The same, laid out over the mesh in use: rows like a batch, heads of the cache like the model's."""
        axes = ("layers", "batch", "kv_heads", "length", "head_dim")
        by_row = lambda x: nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))
        k, v = (nn.with_logical_constraint(x, axes) for x in (self.cache.k, self.cache.v))
        return State(KVCache(k, v, by_row(self.cache.length)), jax.tree.map(by_row, self.rows))
