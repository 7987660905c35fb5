"""Attention: within the segments of a packed row (training) and on top of a cache (decoding).

Both kinds are a small struct that a layer calls with its queries, keys and values, so that the layer itself does not
know which it serves.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from refusion_jax.model import flash
from refusion_jax.model.cache import KVCache

QUERY_CHUNK = 512  # queries whose scores exist at a time in the XLA implementation
KEY_CHUNK = 512  # cached keys whose scores exist at a time


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


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention within segments in plain XLA, `QUERY_CHUNK` queries at a time, forward and backward.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      segment_ids: [batch, length]; a token sees its own segment only, nothing later in the buffer.

    Returns:
      [batch, length, heads, head_dim] in q's dtype.
    """
    length = q.shape[1]
    index = jnp.arange(length)

    def attend(q: jax.Array, segments: jax.Array, rows: jax.Array) -> jax.Array:
        mask = (segments[:, :, None] == segment_ids[:, None, :]) & (rows[:, None] >= index)
        return masked_attention(q, k, v, mask)

    if length <= QUERY_CHUNK:
        return attend(q, segment_ids, index)
    chunks = -(-length // QUERY_CHUNK)
    pad = chunks * QUERY_CHUNK - length

    def split(x: jax.Array, axis: int) -> jax.Array:  # [.., length, ..] -> [chunks, .., QUERY_CHUNK, ..]
        x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, QUERY_CHUNK, *x.shape[axis + 1 :]), axis, 0)

    out = jax.lax.map(
        lambda chunk: jax.checkpoint(attend)(*chunk), (split(q, 1), split(segment_ids, 1), split(index, 0))
    )
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], chunks * QUERY_CHUNK, *q.shape[2:])[:, :length]


@struct.dataclass
class SegmentAttention:
    """Causal attention within the segments of each row, by the named implementation (`flash.choose` for "auto")."""

    segment_ids: jax.Array  # [batch, length]
    implementation: str = struct.field(pytree_node=False, default="auto")

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H] under the checkpoint name "attended", self)."""
        platform, kind = flash.platform()
        name = flash.choose(self.implementation, platform, kind, q.shape[1], q.shape[3], q.dtype.name)
        if name == "splash":
            kernel = functools.partial(flash.splash, interpret=platform == "cpu")
            return flash.per_device(kernel, q, k, v, self.segment_ids), self
        attention = functools.partial(flash.per_device, flash.cudnn) if name == "cudnn" else segment_attention
        return checkpoint_name(attention(q, k, v, self.segment_ids), "attended"), self


@struct.dataclass
class CachedAttention:
    """Attention of a window on top of the committed entries of a cache.

    Each layer writes the window's keys and values at `length .. length + window` of its own slice of the stacked cache,
    which travels in the carry of the scan over layers: XLA then updates it in place. Keys are read `KEY_CHUNK` at a time and
    no further than the longest row has come, so neither time nor temporaries follow the size of the cache.
    """

    k: jax.Array  # [layer, batch, kv_head, cache_length, head_dim]
    v: jax.Array
    length: jax.Array  # [batch] committed entries
    chunks: jax.Array  # scalar: chunks of the cache that hold all of them
    window_mask: jax.Array  # [batch, window, window] bool (query, key)
    layer: jax.Array  # scalar int32

    @classmethod
    def start(cls, cache: KVCache, window_mask: jax.Array | None, window: int) -> "CachedAttention":
        """Attention context of the first layer; `window_mask` [batch, query, key] bool, None = causal."""
        if window_mask is None:
            window_mask = jnp.broadcast_to(jnp.tri(window, dtype=bool), (cache.length.size, window, window))
        chunks = -(-jnp.max(cache.length) // KEY_CHUNK)
        return cls(
            k=cache.k, v=cache.v, length=cache.length, chunks=chunks, window_mask=window_mask, layer=jnp.int32(0)
        )

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H], self with the window written)."""
        batch, window, heads, dim = q.shape
        k, v = (jnp.einsum("BTKH->BKTH", x).astype(self.k.dtype) for x in (k, v))
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(k.shape[1])[None, :, None]
        entry = (self.length[:, None] + jnp.arange(window))[:, None]  # [B, 1, T]
        write = lambda old, new: old.at[self.layer, row, head, entry].set(new, mode="drop", unique_indices=True)
        keys, values = write(self.k, k), write(self.v, v)
        grouped = q.reshape(batch, window, k.shape[1], -1, dim)

        def accumulate(carry, k, v, mask):
            """One more chunk of keys [B, K, S, H] under mask [B, T, S]: the running softmax."""
            top, total, out = carry  # [B, K, G, T], the same, [B, K, G, T, H] in float32
            scores = (
                jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
                * dim**-0.5
            )
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights, old = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            part = jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
            )
            return new_top, total * old + weights.sum(axis=-1), out * old[..., None] + part

        def committed(i, carry):
            size = min(KEY_CHUNK, keys.shape[3])
            first = jnp.minimum(i * size, keys.shape[3] - size)  # the last chunk may overlap the one before
            read = lambda x: jax.lax.dynamic_slice(x, (self.layer, 0, 0, first, 0), (1, *k.shape[:2], size, dim))[0]
            entry = first + jnp.arange(size)
            mask = (entry < self.length[:, None]) & (entry >= i * size)
            return accumulate(carry, read(keys), read(values), mask[:, None])

        shape = (batch, k.shape[1], heads // k.shape[1], window)
        carry = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, dim))
        for first in range(0, window, KEY_CHUNK):
            part = slice(first, first + KEY_CHUNK)
            carry = accumulate(carry, k[:, :, part], v[:, :, part], self.window_mask[:, :, part])
        _, total, out = jax.lax.fori_loop(0, self.chunks, committed, carry)
        out = (out / total[..., None]).astype(q.dtype)
        return jnp.einsum("BKGTH->BTKGH", out).reshape(q.shape), self.replace(k=keys, v=values, layer=self.layer + 1)
