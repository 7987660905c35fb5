"""Attention of a window on a key/value cache: decoding."""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model import flash
from refusion_jax.model.blockwise import LOWEST, masked_attention, masked_scores
from refusion_jax.model.cache import KVCache
from refusion_jax.model.layers import by_kv_head, by_token, devices_over

SCORE_BYTES = 2**28  # of float32 scores that one device holds at a time
PREFILL_PART = 256  # entries of the cache that a prefill reads at a time


@struct.dataclass
class Cached:
    """A window whose keys and values are written into the cache first; queries then see entries of the cache alone.

    Attributes:
      cache: as the layers so far have left it; its `length` stays as it is.
      entries: [batch, window] int32, where the window's keys and values go; past the end of the cache: nowhere.
      seen: [batch, window, cache_length] bool, which entries a query sees.
      layer: of the next `attend`.
      implementation: of the kernel: "auto", "xla" or "cudnn".
    """

    cache: KVCache
    entries: jax.Array
    seen: jax.Array
    layer: jax.Array | int = 0
    implementation: str = struct.field(pytree_node=False, default="auto")

    @classmethod
    def appended(cls, cache: KVCache, window_mask: jax.Array, implementation: str = "auto") -> "Cached":
        """A window behind the committed entries of each row: plan-and-infill, autoregressive, block diffusion.

        Args:
          window_mask: [batch, window, window] bool (query, key) inside the window; all see what is committed.
        """
        window = window_mask.shape[2]
        chex.assert_shape(window_mask, (cache.length.shape[0], window, window))
        behind = (jnp.arange(cache.cache_length) - cache.length[:, None])[:, None]  # [B, 1, S]
        # A product with ones where an entry is of that place in the window: a look-up would be laid out 8 times as
        # large on a TPU, and take longer.
        place = behind == jnp.arange(window)[:, None]
        inside = jnp.einsum("BTW,BWS->BTS", window_mask.astype(jnp.float32), place.astype(jnp.float32)) > 0
        seen = (behind < 0) | inside
        return cls(cache, cache.length[:, None] + jnp.arange(window), seen, implementation=implementation)

    @classmethod
    def in_place(cls, cache: KVCache, positions: jax.Array, implementation: str = "auto") -> "Cached":
        """A window that overwrites the entries of its positions; queries then see entries [0, cache.length).

        Entry = position. What is not in the window is seen as it was computed last: an exact cache when it cannot have
        changed, a stale one (dKV-Cache, prefix and dual caches) when it can.

        Args:
          positions: [batch, window] int32; past the end of the cache: padding.
        """
        seen = jnp.arange(cache.cache_length) < cache.length[:, None]
        seen = jnp.broadcast_to(seen[:, None], (*positions.shape, cache.cache_length))
        return cls(cache, positions, seen, implementation=implementation)

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H], self with the window written)."""
        k, v = (jnp.einsum("BTKH->BKTH", x) for x in (k, v))
        # Written first and read from what was written: XLA then updates the cache in place.
        cache = self.cache.write(self.layer, self.entries, k, v)
        after = self.replace(cache=cache, layer=self.layer + 1)
        name = flash.choose_decoding(self.implementation, *flash.platform(), q.shape[3], q.dtype.name)
        if name == "cudnn":
            keys, values = cache.read(self.layer, 0, cache.cache_length)
            return flash.cudnn_cached(q, keys, values, self.seen), after
        size = 4 * q.shape[0] * q.shape[1] * q.shape[2] * cache.cache_length // devices_over("batch", "heads")
        parts, turns = -(-size // SCORE_BYTES), None
        if cache.rows is not None:  # A prefill: of a long cache no more is read than has been filled.
            parts = max(parts, cache.cache_length // PREFILL_PART)
            filled = jnp.max(jnp.where(self.seen.any(axis=(0, 1)), jnp.arange(cache.cache_length) + 1, 0))
            turns = -(-filled // -(-cache.cache_length // parts))
        if parts == 1:
            keys, values = cache.read(self.layer, 0, cache.cache_length)
            return masked_attention(q, keys, values, self.seen), after
        return in_parts(q, cache, self.layer, self.seen, parts, turns), after


def in_parts(
    q: jax.Array, cache: KVCache, layer: jax.Array | int, seen: jax.Array, parts: int, turns: jax.Array | None
) -> jax.Array:
    """Attention [B, T, N, H] with the scores of one part of the cache at a time: a running maximum, sum and weighted
    sum of values. Only the first `turns` parts are read; None: all.
    """
    size = -(-cache.cache_length // parts)
    queries = by_kv_head(q, jax.tree.leaves(cache.k)[0].shape[-3])

    def add(i, carry):
        top, total, out = carry  # [B, K, G * T], the same, [B, K, G * T, H]
        first = jnp.minimum(i * size, cache.cache_length - size)  # the last part may overlap the one before
        keys, values = cache.read(layer, first, size)
        here = jax.lax.dynamic_slice_in_dim(seen, first, size, axis=2) & (first + jnp.arange(size) >= i * size)
        scores = masked_scores(queries, keys, here)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        # As long as a query has seen nothing its weights are 1; what it sees first multiplies them by 0.
        weights, old = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        part = jnp.einsum(
            "BKMS,BKSH->BKMH", weights.astype(q.dtype), values.astype(q.dtype), preferred_element_type=jnp.float32
        )
        return new_top, total * old + weights.sum(axis=-1), out * old[..., None] + part

    shape = queries.shape
    start = jnp.full(shape[:-1], LOWEST), jnp.zeros(shape[:-1]), jnp.zeros(shape)
    _, total, out = jax.lax.fori_loop(0, parts if turns is None else turns, add, start)
    # Nothing was added up where no part was read: padding.
    return by_token((out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype), q.shape[1])
