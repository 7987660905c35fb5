"""The head: from hidden states to a few numbers per token. Logits of a whole batch never exist."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from refusion_jax.model import tables
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.layers import devices_over
from refusion_jax.model.tiles import Tiles

LOGIT_BYTES = 2**29  # of float32 logits that one device holds at a time: 883 tokens of Qwen3's vocabulary


def output_table(params: dict) -> jax.Array | Tiles:
    """The head's table [vocab, hidden], the embedding itself when tied; or the tiles of its transpose."""
    return _head(params)["embedding"]


def _head(params: dict) -> dict:
    return params["head" if "head" in params else "embed"]


def over_vocabulary(
    config: ModelConfig, params: dict, hidden: jax.Array, fn: Callable[..., Any], *per_token: jax.Array
) -> Any:
    """Applies `fn` to the logits of every token, as many tokens at a time as LOGIT_BYTES allow.

    The table is read once for each of these chunks, which are of all rows together. The backward pass computes logits
    again; the products that make the gradients of hidden states and table take the logits' gradient in the compute
    dtype, and the table's is summed over chunks in float32.

    Args:
      hidden: [batch, length, hidden] in the compute dtype.
      fn: (logits [tokens, vocab] float32, -inf for rows past the logical vocabulary, *per_token) -> tree of
        [tokens, ...]. It should reduce over the vocabulary with sums, maxima and comparisons, which stay local where
        that is sharded.
      per_token: arrays [batch, length, ...] that `fn` is given the same tokens of; nothing is differentiated by them.

    Returns:
      `fn`'s tree of [batch, length, ...].
    """
    chex.assert_shape(hidden, (None, None, config.hidden_size))
    chex.assert_equal_shape_prefix((hidden, *per_token), 2)
    batch, length, _ = hidden.shape
    # Rows are split over devices: every chunk takes an equal part of each device's tokens.
    shards = tables.batch_shards(batch)
    own = batch // shards * length
    chunks = -(-own * config.vocab_size * 4 // devices_over("vocab") // LOGIT_BYTES)
    size = -(-own // chunks)
    rows = "batch" if shards > 1 else None
    real = jnp.arange(config.vocab_size) < config.logical_vocab_size
    scale = _head(params)["embedding_scale"] if config.quantise else None

    def split(x):
        """[batch, length, ...] -> [chunk, shard, size, ...]"""
        x = x.reshape(shards, own, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, chunks * size - own), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(shards, chunks, size, *x.shape[2:]), 1, 0)

    def join(x):
        """[chunk, shard, size, ...] -> [batch, length, ...]"""
        x = jnp.moveaxis(x, 0, 1).reshape(shards, chunks * size, *x.shape[3:])[:, :own]
        return x.reshape(batch, length, *x.shape[2:])

    def logits_of(table, hidden):
        if isinstance(table, Tiles):
            return table.product(hidden.reshape(-1, hidden.shape[2]), jnp.float32).reshape(*hidden.shape[:2], -1)
        logits = jnp.einsum("STD,VD->STV", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = logits if scale is None else logits * scale
        return nn.with_logical_constraint(logits, (rows, None, "vocab"))

    def reduce(logits, per_token):
        logits = jnp.where(real, logits, -jnp.inf)
        found = fn(*(x.reshape(-1, *x.shape[2:]) for x in (logits, *per_token)))
        return jax.tree.map(lambda x: x.reshape(*logits.shape[:2], *x.shape[1:]), found)

    @jax.custom_vjp
    def apply(table, hidden, per_token):
        if scale is None and not isinstance(table, Tiles):  # int8 is to be read as it is
            table = tables.gathered(table, hidden.dtype)  # one copy for all chunks
        parts = jax.tree.map(split, (hidden, per_token))
        return jax.tree.map(join, jax.lax.map(lambda part: reduce(logits_of(table, part[0]), part[1]), parts))

    def forward(table, hidden, per_token):
        return apply(table, hidden, per_token), (table, hidden, per_token)

    def backward(residuals, slopes):
        parameter, hidden, per_token = residuals
        table = tables.gathered(parameter, hidden.dtype)

        def one(total, part):
            hidden, per_token, slopes = part
            _, pull = jax.vjp(lambda logits: _real(reduce(logits, per_token)), logits_of(table, hidden))
            cotangent = pull(slopes)[0].astype(hidden.dtype)
            total += jnp.einsum("STV,STD->SVD", cotangent, hidden, preferred_element_type=jnp.float32)
            return nn.with_logical_constraint(total, (rows, "vocab", None)), jnp.einsum("STV,VD->STD", cotangent, table)

        zero = nn.with_logical_constraint(jnp.zeros((shards, *table.shape), jnp.float32), (rows, "vocab", None))
        total, of_hidden = jax.lax.scan(one, zero, jax.tree.map(split, (hidden, per_token, _real(slopes))))
        return tables.sum_of_shards(total, hidden.dtype).astype(parameter.dtype), join(of_hidden), None

    apply.defvjp(forward, backward)
    return apply(output_table(params), hidden, per_token)


def _real(tree: Any) -> list[jax.Array]:
    """The floating-point leaves, which have gradients."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
