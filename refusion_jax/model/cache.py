"""The static-shape key/value cache."""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values in commit order.

    Entries at or past `length` are never attended to, so cropping is doing nothing and committing is adding to
    `length`. Keys carry their rotary position already, so positions need not be kept here. Heads come before entries: the
    order that both writing entries and the products of attention want, without which a TPU copies the cache between them.

    Attributes:
      k: [layer, batch, kv_head, cache_length, head_dim].
      v: [layer, batch, kv_head, cache_length, head_dim].
      length: [batch] int32, committed entries of each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, cache_length: int, dtype: str | None = None) -> "KVCache":
        """A cache of `batch` rows with nothing in it, stored as `dtype` (default: the model's compute dtype)."""
        shape = (config.num_layers, batch, config.num_kv_heads, cache_length, config.head_dim)
        dtype = jnp.dtype(dtype or config.dtype)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), length=jnp.zeros((batch,), jnp.int32))

    def commit(self, count: jax.Array) -> "KVCache":
        """Keeps the first `count` [batch] entries of the window that was forwarded last."""
        return self.replace(length=self.length + count)
