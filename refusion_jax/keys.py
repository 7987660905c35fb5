"""Where randomness comes from: one root for each purpose, so that no two draws share a key."""

import zlib

import jax


def domain_key(seed: int, domain: str) -> jax.Array:
    """The root of a run's random numbers for one purpose.

    Args:
      domain: "init" (parameters), "lora" (adapters), "corruption" (of training examples) or "evaluation" (of held-out
        ones).
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(domain.encode()))
