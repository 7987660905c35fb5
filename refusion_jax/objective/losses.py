"""Cross-entropy over the head, in chunks, so that logits of a whole batch never exist (method section 3)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from refusion_jax.objective.slots import Term


@struct.dataclass
class TokenLoss:
    """Per token: cross_entropy [batch, length] float32 (natural log) and correct [batch, length] bool (argmax = target)."""

    cross_entropy: jax.Array
    correct: jax.Array


def token_loss(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, *, logical_vocab_size: int, chunk: int
) -> TokenLoss:
    """Cross-entropy of every token's target under softmax(hidden @ table.T), in float32.

    Works through the length in chunks under remat: at most [batch, chunk, vocab] logits exist, forward or backward.

    Args:
      hidden: [batch, length, hidden] in the compute dtype.
      table: [vocab, hidden]; rows at or past logical_vocab_size take no part.
      targets: [batch, length] int32.
      logical_vocab_size: number of real ids.
      chunk: tokens per row worked on at a time.
    """
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    # One gathered copy of the table for all chunks.
    table = nn.with_logical_constraint(table.astype(hidden.dtype), ("vocab", None))
    real = jnp.arange(table.shape[0]) < logical_vocab_size

    @jax.checkpoint
    def one(hidden: jax.Array, targets: jax.Array) -> TokenLoss:
        logits = jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
        logits = nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
        logits = jnp.where(real, logits, -jnp.inf)
        # A masked sum, not a gather: it stays local where the vocabulary is sharded.
        chosen = jnp.arange(table.shape[0]) == targets[..., None]
        target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
        return TokenLoss(jax.nn.logsumexp(logits, axis=-1) - target, target >= jnp.max(logits, axis=-1))

    split = lambda x: jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)
    _, losses = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (split(hidden), split(targets)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :length]
    return jax.tree.map(join, losses)


def numerator(term: Term, cross_entropy: jax.Array) -> jax.Array:
    """The term's weighted sum; tokens without weight give exactly 0 whatever their cross-entropy is."""
    return jnp.sum(jnp.where(term.weights > 0, term.weights * cross_entropy, 0.0))
