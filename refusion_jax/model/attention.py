"""Attention contexts: which keys a query sees, and where they come from.

A context is what the caller of the model passes along: a small struct with `attend(q, k, v) -> (out, context)`, called
once by every layer. The model never chooses one.

    Packed            rows of several examples, each seeing its own: causal, all, block-causal, or with extra visibility
    TwoStream         block diffusion in training: a noisy and a clean copy of every token
    Cached.appended   decoding: a window behind the entries of a cache (cached_attention.py)
    Cached.in_place   decoding: a window that overwrites its own positions in a cache, stale entries included
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from refusion_jax.model import flash

QUERY_CHUNK = 512  # queries whose scores exist at a time in training


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


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible) -> jax.Array:
    """Attention in plain XLA, `QUERY_CHUNK` queries at a time, forward and backward.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      visible: from indices of queries [query] to the mask [batch, query, length] of keys that they see.

    Returns:
      [batch, length, heads, head_dim] in q's dtype.
    """
    length = q.shape[1]
    if length <= QUERY_CHUNK:
        return masked_attention(q, k, v, visible(jnp.arange(length)))
    chunks = -(-length // QUERY_CHUNK)
    pad = chunks * QUERY_CHUNK - length
    split = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(q.shape[0], chunks, QUERY_CHUNK, *q.shape[2:])

    @jax.checkpoint
    def attend(q, rows):
        return masked_attention(q, k, v, visible(jnp.minimum(rows, length - 1)))

    rows = jnp.arange(chunks * QUERY_CHUNK).reshape(chunks, QUERY_CHUNK)
    out = jax.lax.map(lambda chunk: attend(*chunk), (jnp.moveaxis(split, 1, 0), rows))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], chunks * QUERY_CHUNK, *q.shape[2:])[:, :length]


@struct.dataclass
class Packed:
    """Rows of packed examples: a token sees tokens of its own segment only, and of these those that `see` says.

    Attributes:
      segment_ids: [batch, length] int32, 0 is padding.
      see: "causal" (itself and those before it in the buffer), "all", or "block" (those of its own and earlier blocks).
      blocks: [batch, length] int32, the block of every token; for "block" only.
      extra: [1 or batch, length, length] bool (query, key), seen besides, inside the segment; None: nothing.
      implementation: of the kernel (`flash.choose` for "auto").
    """

    segment_ids: jax.Array
    blocks: jax.Array | None = None
    extra: jax.Array | None = None
    see: str = struct.field(pytree_node=False, default="causal")
    implementation: str = struct.field(pytree_node=False, default="auto")

    def visible(self, rows: jax.Array) -> jax.Array:
        """Mask [batch, query, length] of queries with the given indices [query]."""
        same = self.segment_ids[:, rows, None] == self.segment_ids[:, None, :]
        if self.see == "all":
            return same
        if self.see == "causal":
            seen = (rows[:, None] >= jnp.arange(self.segment_ids.shape[1]))[None]
        else:
            seen = self.blocks[:, rows, None] >= self.blocks[:, None, :]
        return same & (seen if self.extra is None else seen | self.extra[:, rows])

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H] under the checkpoint name "attended", self)."""
        platform, kind = flash.platform()
        plain = self.see == "block" or self.extra is not None  # no kernel has these
        name = (
            "xla" if plain else flash.choose(self.implementation, platform, kind, q.shape[1], q.shape[3], q.dtype.name)
        )
        if name == "xla":
            return checkpoint_name(chunked_attention(q, k, v, self.visible), "attended"), self
        causal = self.see == "causal"
        if name == "splash":
            kernel = functools.partial(flash.splash, causal=causal, interpret=platform == "cpu")
            return flash.per_device(kernel, q, k, v, self.segment_ids), self
        kernel = functools.partial(flash.cudnn, causal=causal)
        return checkpoint_name(flash.per_device(kernel, q, k, v, self.segment_ids), "attended"), self


@struct.dataclass
class TwoStream:
    """Block diffusion in training: rows hold every token twice, noisy and clean, in any arrangement.

    Inside its segment a noisy token sees the noisy tokens of its own block and the clean ones of earlier blocks; a clean
    token sees the clean ones of its own and earlier blocks.

    Attributes:
      segment_ids, blocks: [batch, length] int32.
      clean: [batch, length] bool.
    """

    segment_ids: jax.Array
    blocks: jax.Array
    clean: jax.Array

    def visible(self, rows: jax.Array) -> jax.Array:
        """Mask [batch, query, length] of queries with the given indices [query]."""
        same = self.segment_ids[:, rows, None] == self.segment_ids[:, None, :]
        query, key, clean = self.blocks[:, rows, None], self.blocks[:, None, :], self.clean[:, None, :]
        from_noisy = jnp.where(clean, key < query, key == query)
        from_clean = clean & (key <= query)
        return same & jnp.where(self.clean[:, rows, None], from_clean, from_noisy)

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H] under the checkpoint name "attended", self)."""
        return checkpoint_name(chunked_attention(q, k, v, self.visible), "attended"), self
