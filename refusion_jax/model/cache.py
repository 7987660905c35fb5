"""The static-shape key/value cache."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of the tokens forwarded so far; of each row a query sees the first `length` entries and no
    others.

    In commit order, cropping is doing nothing and committing is adding to `length`; with entry = position, entries may
    be overwritten where they stand. Keys carry their rotary position already. Heads come before entries: the order that
    both writing entries and the products of attention want, without which a TPU copies the cache between them.

    With `config.scan_layers` the layers are stacked in one array, updated in the carry of the scan over layers;
    without, each layer is an array of its own, which CPUs and GPUs read without copying a slice first.

    Attributes:
      k, v: [layer, batch, kv_head, cache_length, head_dim], or a tuple with an array of the last four for each layer.
      length: [batch] int32, entries that may be seen.
      rows: None: the window has a row for each of the batch. Else [shard, row] int32: it is of these rows of each of so
        many equal parts of the batch (so that each device finds its own), and `length` is [shard * row]. Past its part:
        of none.
      features: what else of every entry is kept, leaves [batch, cache_length, hidden] or like k and v; None: nothing.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    length: jax.Array
    rows: jax.Array | None = None
    features: Any = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, cache_length: int) -> "KVCache":
        """A cache of `batch` rows with nothing in it, in the model's compute dtype."""
        dtype, shape = jnp.dtype(config.dtype), (batch, config.num_kv_heads, cache_length, config.head_dim)
        if config.scan_layers:
            zeros = lambda: jnp.zeros((config.num_layers, *shape), dtype)
        else:
            zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return cls(k=zeros(), v=zeros(), length=jnp.zeros((batch,), jnp.int32))

    @property
    def cache_length(self) -> int:
        """Entries there is room for."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def write(self, layer: jax.Array | int, entries: jax.Array, k: jax.Array, v: jax.Array) -> "KVCache":
        """Puts keys and values [row, kv_head, window, head_dim] at `entries` [row, window] of a layer; past the
        end: nowhere.
        """
        chex.assert_equal_shape([k, v])
        chex.assert_shape(entries, (k.shape[0], k.shape[2]))
        batch = jnp.arange(len(k)) if self.rows is None else self._in_batch(jax.tree.leaves(self.k)[0].shape[-4])
        at = (batch[:, None, None], jnp.arange(k.shape[1])[None, :, None], entries[:, None])

        def put(old, new):
            if not isinstance(old, tuple):
                return old.at[(layer, *at)].set(new.astype(old.dtype), mode="drop", unique_indices=True)
            changed = old[layer].at[at].set(new.astype(old[layer].dtype), mode="drop", unique_indices=True)
            return (*old[:layer], changed, *old[layer + 1 :])

        return self.replace(k=put(self.k, k), v=put(self.v, v))

    def read(self, layer: jax.Array | int, first: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [row, kv_head, size, head_dim] of a layer's entries from `first` on."""

        def part(x):
            if isinstance(x, tuple):
                x = x[layer] if size == x[layer].shape[2] else jax.lax.dynamic_slice_in_dim(x[layer], first, size, 2)
            else:
                _, batch, heads, _, dim = x.shape
                x = jax.lax.dynamic_slice(x, (layer, 0, 0, first, 0), (1, batch, heads, size, dim))[0]
            if self.rows is None:
                return x
            by_shard = x.reshape(len(self.rows), -1, *x.shape[1:])
            return jax.vmap(lambda x, rows: x.at[rows].get(mode="clip"))(by_shard, self.rows).reshape(-1, *x.shape[1:])

        return part(self.k), part(self.v)

    def _in_batch(self, batch: int) -> jax.Array:
        """`rows` as indices in the whole batch; past its end where they are past their shard's."""
        own = batch // len(self.rows)
        index = self.rows + own * jnp.arange(len(self.rows))[:, None]
        return jnp.where(self.rows < own, index, batch).reshape(-1)

    def commit(self, count: jax.Array) -> "KVCache":
        """Lets queries see `count` [batch] more entries: those of the window that was forwarded last."""
        return self.replace(length=self.length + count)
