"""The model as a function, for tests: whole forward passes, windows on a cache, and logits in full."""

import functools

import jax
import jax.numpy as jnp

from refusion_jax.model.attention import Packed
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3


def logits(config, params, hidden):
    """[batch, length, vocab] float32 of hidden states [batch, length, hidden]."""
    return over_vocabulary(config, params, hidden, lambda logits: logits)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions, segment_ids=None):
    """Hidden states of rows under causal attention; without segments every row is one example."""
    segments = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    context = Packed(segments, implementation=config.attention)
    return Qwen3(config).apply({"params": params}, tokens, positions, context)[0]


@functools.partial(jax.jit, static_argnums=0)
def forward_window(config, params, tokens, positions, cache, window_mask=None):
    """(hidden states, cache with the window written) of a window behind a cache; without a mask it is causal."""
    if window_mask is None:
        window_mask = jnp.broadcast_to(jnp.tri(tokens.shape[1], dtype=bool), (*tokens.shape, tokens.shape[1]))
    hidden, context = Qwen3(config).apply({"params": params}, tokens, positions, Cached.appended(cache, window_mask))
    return hidden, context.cache
