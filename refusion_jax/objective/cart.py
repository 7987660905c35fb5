"""CART, a weight of masked tokens: by the number and nearness of the unmasked ones around them (Dream)."""

import jax
import jax.numpy as jnp


def context_weights(clean: jax.Array, segment_ids: jax.Array, p: float) -> jax.Array:
    """Weights of CART: the sum over a token's unmasked neighbours, in its example, of p (1 - p)^(distance - 1) / 2.

    Args:
      clean: [batch, length] bool, tokens that are not masked.
      segment_ids: [batch, length] int32.

    Returns:
      [batch, length] float32.
    """

    def behind(clean, segment_ids):
        """Of the neighbours before a token: the sum is that of the one before, decayed, and that one's own part."""
        same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))
        own = jnp.where(same, jnp.roll(clean, 1, axis=1) * 0.5 * p, 0.0)
        decay = jnp.where(same, 1 - p, 0.0)
        then = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        return jax.lax.associative_scan(then, (decay, own), axis=1)[1]

    ahead = jnp.flip(behind(jnp.flip(clean, 1), jnp.flip(segment_ids, 1)), 1)
    return behind(clean, segment_ids) + ahead
