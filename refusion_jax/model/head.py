"""The head: from hidden states to a few numbers per token. Logits of a whole batch never exist."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from refusion_jax.model.config import ModelConfig
from refusion_jax.model.layers import devices_over

LOGIT_BYTES = 2**28  # of float32 logits that one device holds at a time: 441 tokens of Qwen3's vocabulary


def output_table(params: dict) -> jax.Array:
    """The head's table [vocab, hidden]; the embedding itself when tied."""
    return params["head" if "head" in params else "embed"]["embedding"]


def over_vocabulary(
    config: ModelConfig, params: dict, hidden: jax.Array, fn: Callable[..., Any], *per_token: jax.Array
) -> Any:
    """Applies `fn` to the logits of every token, as many tokens at a time as LOGIT_BYTES allow.

    The table is read once for each of these chunks, which are of all rows together; the backward pass computes logits again.
    `fn` should reduce over the vocabulary with sums, maxima and comparisons, which stay local where it is sharded.

    Args:
      hidden: [batch, length, hidden] in the compute dtype.
      fn: (logits [tokens, vocab] float32, -inf for rows past the logical vocabulary, *per_token) -> tree of [tokens, ...].
      per_token: arrays [batch, length, ...] that `fn` is given the same tokens of.

    Returns:
      `fn`'s tree of [batch, length, ...].
    """
    batch, length, _ = hidden.shape
    # One gathered copy of the table for all chunks.
    table = nn.with_logical_constraint(output_table(params).astype(hidden.dtype), ("vocab", None))
    real = jnp.arange(config.vocab_size) < config.logical_vocab_size

    @jax.checkpoint
    def reduce(hidden, *per_token):  # [shard, tokens, ...]
        logits = jnp.einsum("STD,VD->STV", hidden, table, preferred_element_type=jnp.float32)
        rows = "batch" if shards > 1 else None
        logits = nn.with_logical_constraint(jnp.where(real, logits, -jnp.inf), (rows, None, "vocab"))
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        found = fn(flat(logits), *map(flat, per_token))
        return jax.tree.map(lambda x: x.reshape(*logits.shape[:2], *x.shape[1:]), found)

    # Rows are split over devices: every chunk takes an equal part of each device's tokens.
    shards = devices_over("batch") if batch % devices_over("batch") == 0 else 1
    own = batch // shards * length
    chunks = -(-own * config.vocab_size * 4 // devices_over("vocab") // LOGIT_BYTES)
    size = -(-own // chunks)
    by_shard = [x.reshape(shards, own, *x.shape[2:]) for x in (hidden, *per_token)]
    if chunks == 1:
        found = reduce(*by_shard)
    else:
        padded = [jnp.pad(x, ((0, 0), (0, chunks * size - own), *((0, 0),) * (x.ndim - 2))) for x in by_shard]
        split = [jnp.moveaxis(x.reshape(shards, chunks, size, *x.shape[2:]), 1, 0) for x in padded]
        found = jax.lax.map(lambda part: reduce(*part), split)
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(shards, chunks * size, *x.shape[3:])[:, :own]
        found = jax.tree.map(join, found)
    return jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[2:]), found)
