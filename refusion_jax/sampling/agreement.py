"""Guided diffusion: a causal pass of the same weights says which proposals agree with what it would draft itself.

The tokens that the diffusion pass proposes for a block go, with what is decided, through the model once more, each seen
by later ones alone, behind a cache of its own in which entry = position. That cache is exact: of a block the proposals
are decided from left to right, so that the keys of decided tokens are those of the text as it stays, and prompts are
forwarded into it when their rows start.

Where logits predict the next token (alignment shift), the pass takes the block's tokens and the one before. Where they
predict their own (same), it takes the block's tokens, and for each a mask in its place that sees those before it: such
a model says nothing of a token behind one that it sees.

Letters: M tokens of a block, S entries of the cache, W of the pass (M, or 2 M with masks).
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.cache import KVCache
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import Qwen3


@struct.dataclass
class Kept:
    """Keys and values of the causal passes, as in `KVCache`."""

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]

    @classmethod
    def empty(cls, model: ModelConfig, batch: int, cache_length: int) -> "Kept":
        cache = KVCache.empty(model, batch, cache_length)
        return cls(cache.k, cache.v)


@struct.dataclass
class Block:
    """What there is of a row's block when it is asked about; leaves are of one row, or have the batch first.

    Attributes:
      before: the token before the block.
      tokens, open: [M] ids, and bool, which of them are still to be decided: there stand proposals.
      start: position of the first.
      used: tokens of the block that lie within the answer.
      spare: first entry behind the answer, where masks are put.
    """

    before: jax.Array
    tokens: jax.Array
    open: jax.Array
    start: jax.Array
    used: jax.Array
    spare: jax.Array


def forward(
    model: ModelConfig, params: dict, block: Block, proposals: jax.Array, shift: bool, kept: Kept
) -> tuple[jax.Array, Kept]:
    """Hidden states [batch, M, hidden] whose logits predict each token of the block from those before it.

    Args:
      proposals: [batch, M] ids for what is open.
      shift: whether logits predict the next token.
    """
    place = jnp.arange(block.tokens.shape[1])
    tokens = jnp.where(block.open, proposals, block.tokens)
    positions = block.start[:, None] + place
    size = jax.tree.leaves(kept.k)[0].shape[-2]
    inside = place < block.used[:, None]
    entries = jnp.where(inside, positions, size)
    if shift:
        tokens = jnp.concatenate([block.before[:, None], tokens[:, :-1]], axis=1)
        positions, entries = positions - 1, jnp.where(inside, positions - 1, size)
    else:
        tokens = jnp.concatenate([tokens, jnp.full_like(tokens, model.mask_token_id)], axis=1)
        entries = jnp.concatenate([entries, jnp.where(inside, block.spare[:, None] + place, size)], axis=1)
        positions = jnp.tile(positions, 2)
    entry = jnp.arange(size)
    seen = (entry < positions[..., None]) | (entry == entries[..., None])
    hidden, kept = _pass(model, params, tokens, positions, entries, seen, None, kept)
    return hidden[:, -len(place) :], kept


def read(model: ModelConfig, params: dict, prompts: jax.Array, rows: jax.Array, kept: Kept) -> Kept:
    """With prompts [slots, S], padding behind them, in the entries of their `rows` (as in `KVCache`). What padding
    leaves is overwritten before it can be seen.
    """
    entry = jnp.arange(prompts.shape[1])
    entries = jnp.broadcast_to(entry, prompts.shape)
    seen = jnp.broadcast_to(entry <= entry[:, None], (*prompts.shape, len(entry)))
    return _pass(model, params, prompts, entries, entries, seen, rows, kept)[1]


def _pass(model, params, tokens, positions, entries, seen, rows, kept):
    cache = KVCache(kept.k, kept.v, jnp.zeros(len(tokens), jnp.int32), rows=rows)
    context = Cached(cache, entries, seen, implementation=model.attention)
    hidden, context = Qwen3(model).apply({"params": params}, tokens, positions, context)
    return hidden, kept.replace(k=context.cache.k, v=context.cache.v)
