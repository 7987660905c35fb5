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

from refusion_jax.model import blockwise, flash


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

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Mask [batch, query, key] of tokens with the given indices [query] and [key]."""
        same = self.segment_ids[:, queries, None] == self.segment_ids[:, None, keys]
        if self.see == "all":
            return same
        if self.see == "causal":
            seen = (queries[:, None] >= keys)[None]
        else:
            seen = self.blocks[:, queries, None] >= self.blocks[:, None, keys]
        return same & (seen if self.extra is None else seen | self.extra[:, queries[:, None], keys])

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H] under the checkpoint name "attended", self)."""
        platform, kind = flash.platform()
        causal = self.see == "causal"
        plain = self.see == "block" or self.extra is not None  # no kernel has these
        name = (
            "xla" if plain else flash.choose(self.implementation, platform, kind, q.shape[1], q.shape[3], q.dtype.name)
        )
        if name == "xla":
            return blockwise.attention(q, k, v, self, causal=causal and self.extra is None), self
        if name == "splash":
            kernel = functools.partial(flash.splash, causal=causal, interpret=platform == "cpu")
            return flash.per_device(kernel, q, k, v, self.segment_ids), self
        kernel = functools.partial(flash.cudnn, causal=causal)
        return checkpoint_name(flash.per_device(kernel, q, k, v, self.segment_ids), "attended"), self


@struct.dataclass
class TwoStream:
    """Block diffusion in training: rows hold every token twice, noisy and clean, in any arrangement.

    Inside its segment a noisy token sees the noisy tokens of its own block and the clean ones of earlier blocks; a
    clean token sees the clean ones of its own and earlier blocks.

    Attributes:
      segment_ids, blocks: [batch, length] int32.
      clean: [batch, length] bool.
    """

    segment_ids: jax.Array
    blocks: jax.Array
    clean: jax.Array

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Mask [batch, query, key] of tokens with the given indices [query] and [key]."""
        same = self.segment_ids[:, queries, None] == self.segment_ids[:, None, keys]
        query, key, clean = self.blocks[:, queries, None], self.blocks[:, None, keys], self.clean[:, None, keys]
        from_noisy = jnp.where(clean, key < query, key == query)
        from_clean = clean & (key <= query)
        return same & jnp.where(self.clean[:, queries, None], from_clean, from_noisy)

    def attend(self, q, k, v):
        """q [B, T, N, H], k and v [B, T, K, H] -> ([B, T, N, H] under the checkpoint name "attended", self)."""
        return blockwise.attention(q, k, v, self, causal=False), self
