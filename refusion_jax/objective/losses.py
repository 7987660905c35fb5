"""What is summed over tokens for a loss term (method section 3)."""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.objective.slots import Term


@struct.dataclass
class TokenLoss:
    """Per token: cross_entropy [batch, length] float32 (natural log) and correct [batch, length] bool (argmax = target)."""

    cross_entropy: jax.Array
    correct: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array) -> TokenLoss:
    """Of targets [tokens] under logits [tokens, vocab], in float32; for `over_vocabulary`."""
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return TokenLoss(jax.nn.logsumexp(logits, axis=-1) - target, target >= jnp.max(logits, axis=-1))


def numerator(term: Term, cross_entropy: jax.Array) -> jax.Array:
    """The term's weighted sum; tokens without weight give exactly 0 whatever their cross-entropy is."""
    return jnp.sum(jnp.where(term.weights > 0, term.weights * cross_entropy, 0.0))
