"""DiffusionBERT's spindle schedule: in an example, frequent tokens are masked late and rare ones early.

The frequency f of an id is log(1 + count), over the largest of these; that of the padding id is 0. g of a token is its
f less the mean of f over its example.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig

KEPT_MAX = 0.999  # largest probability of not being masked
HYBRID = 1e-2  # weight of the cross-entropy of all tokens beside the divergence
TINY = 1e-20  # what probabilities are raised by inside logarithms


def frequencies(model: ModelConfig, path: str) -> np.ndarray:
    """f of every id, [vocab] float32, from a file of counts (numpy's `.npy`).

    Raises:
      UserError: there is no such file, or it does not hold one count for every id of the model.
    """
    try:
        counts = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"objective.counts = {path!r} cannot be read ({error}); name a .npy file with the count of every id, as "
            "tools/count_tokens.py writes it."
        ) from error
    if counts.ndim != 1 or not model.logical_vocab_size <= len(counts) or counts.min() < 0 or counts.max() == 0:
        raise UserError(
            f"objective.counts = {path!r} is an array of shape {counts.shape}; it must hold one count, at least 0, for "
            f"each of the model's {model.logical_vocab_size} ids. tools/count_tokens.py makes it of a config's data."
        )
    found = np.log1p(counts[: model.vocab_size].astype(np.float64))
    found = np.pad(found, (0, model.vocab_size - len(found)))
    found /= found.max()
    if model.pad_token_id is not None:
        found[model.pad_token_id] = 0
    return found.astype(np.float32)


def centred(frequency: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """g of every token, [batch, length] float32.

    Args:
      frequency: [vocab] float32.
      tokens, segment_ids: [batch, length] int32.
    """
    chex.assert_equal_shape([tokens, segment_ids])
    own = jnp.asarray(frequency)[tokens]
    total = functools.partial(jax.ops.segment_sum, num_segments=tokens.shape[1] + 1)
    mean = lambda f, s: (total(f, s) / jnp.maximum(total(jnp.ones_like(f), s), 1))[s]
    return own - jax.vmap(mean)(own, segment_ids)


def kept(t: jax.Array, g: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Probability of not being masked at level t in [0, 1], and its derivative; all [batch, length]."""
    free = 1 - t + g * strength * jnp.sin(jnp.pi * t)
    slope = g * strength * jnp.pi * jnp.cos(jnp.pi * t) - 1
    inside = (free > 0) & (free < KEPT_MAX)
    return jnp.clip(free, 0, KEPT_MAX), jnp.where(inside, slope, 0.0)


def divergence(entropy: jax.Array, stays: jax.Array, before: jax.Array, step: jax.Array) -> jax.Array:
    """Divergence at a mask of the reverse step, of the true token's from the model's, and `HYBRID` cross-entropies.

    Args:
      entropy: [tokens], -log of the probability p of the token.
      stays: [tokens], the mask's own probability.
      before: [tokens], probability of the token not to be masked before the step; 0: there is no divergence, as of
        tokens that are not masked.
      step: [tokens], of what is not masked before, the share that the step masks.
    """
    token, other = before * step, 1 - before
    rest = jnp.maximum(1 - (1 - stays) * before, 0.0)
    # Over the two states that the truth can be in; the model's may be in those of the other ids besides.
    true = jnp.stack([token, other]) / (token + other)
    model = jnp.stack([jnp.exp(-entropy) * token, rest]) / ((1 - stays) * token + rest)
    found = jnp.sum(true * (jnp.log(true + TINY) - jnp.log(model + TINY)), axis=0)
    return found + HYBRID * entropy
