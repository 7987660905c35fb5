"""Attention: within the segments of a packed row (training) and on top of a cache (decoding).

Both kinds are a small struct that a layer calls with its queries, keys and values, so that the layer itself does not
know which it serves.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name  # noqa: F401  (named here once for every layer)

from refusion_jax.model.cache import KVCache


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention in float32 under an explicit mask.

    Args:
      q: [batch, query, heads, head_dim].
      k, v: [batch, key, kv_heads, head_dim]; each kv head serves heads / kv_heads query heads.
      mask: [batch, query, key] bool, True where a query may see a key.

    Returns:
      [batch, query, heads, head_dim] in q's dtype. A query that may see nothing gets finite values.
    """
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(q.dtype)).reshape(q.shape)


def causal_segment_mask(segment_ids: jax.Array) -> jax.Array:
    """[batch, length] segment ids (0: padding) -> [batch, query, key] mask: same segment, not later in the buffer."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    return same & jnp.tri(length, dtype=bool)


@struct.dataclass
class SegmentAttention:
    """Causal attention within the segments of each row, by the named implementation."""

    segment_ids: jax.Array  # [batch, length]
    implementation: str = struct.field(pytree_node=False, default="xla")

    def attend(self, q, k, v):
        return masked_attention(q, k, v, causal_segment_mask(self.segment_ids)), self


@struct.dataclass
class CachedAttention:
    """Attention of a window on top of the committed entries of a cache.

    Each layer writes the window's keys and values at `length .. length + window` of its own slice of the stacked cache,
    which travels in the carry of the scan over layers: XLA then updates it in place.
    """

    k: jax.Array  # [layer, batch, cache_length, kv_head, head_dim]
    v: jax.Array
    index: jax.Array  # [batch, window] cache index of each window token
    mask: jax.Array  # [batch, window, cache_length] bool
    layer: jax.Array  # scalar int32

    @classmethod
    def start(cls, cache: KVCache, window_mask: jax.Array | None, window: int) -> "CachedAttention":
        """Attention context of the first layer; `window_mask` [batch, query, key] bool, None = causal."""
        batch, cache_length = cache.k.shape[1:3]
        if window_mask is None:
            window_mask = jnp.broadcast_to(jnp.tri(window, dtype=bool), (batch, window, window))
        start = cache.length[:, None]
        entry = jnp.arange(cache_length)[None] - start  # [batch, cache_length] index into the window
        inside = (entry >= 0) & (entry < window)
        columns = jnp.take_along_axis(window_mask, jnp.clip(entry, 0, window - 1)[:, None, :], axis=2)
        mask = (entry < 0)[:, None, :] | (inside[:, None, :] & columns)
        return cls(k=cache.k, v=cache.v, index=start + jnp.arange(window)[None], mask=mask, layer=jnp.int32(0))

    def attend(self, q, k, v):
        rows = jnp.arange(k.shape[0])[:, None]
        read = functools.partial(jax.lax.dynamic_index_in_dim, index=self.layer, axis=0, keepdims=False)
        keys = self.k.at[self.layer, rows, self.index].set(k.astype(self.k.dtype), mode="drop", unique_indices=True)
        values = self.v.at[self.layer, rows, self.index].set(v.astype(self.v.dtype), mode="drop", unique_indices=True)
        out = masked_attention(q, read(keys), read(values), self.mask)
        return out, self.replace(k=keys, v=values, layer=self.layer + 1)
