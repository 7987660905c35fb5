"""dLLM-Cache: what layers make of a token is kept, and only some tokens go through them again.

Besides keys and values the outputs of attention and MLP are kept, of every layer and position; the residual stream is
always summed anew from them. Layer 0 is computed in full. In the other layers these tokens go through again: the prompt
in every `prompt_interval`-th forward, the answer in every `gen_interval`-th, and between these the `transfer_ratio` of
the answer whose values differ most from the last forward's, by cosine, in each layer by itself. Values are never stale.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from refusion_jax.model import layers, tables
from refusion_jax.model.cache import KVCache
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.config import ModelConfig

TINY = 1e-8  # least norm that a cosine divides by


@struct.dataclass
class Features:
    """Outputs of attention and MLP: of each layer [batch, cache_length, hidden] in the compute dtype.

    Attributes:
      unprompted: of the text without its prompt, for guidance: (keys, values, features) of its own; else None.
      residual: [batch, cache_length, hidden] how far the text's hidden states were from those without the prompt.
    """

    attention: tuple[jax.Array, ...]
    mlp: tuple[jax.Array, ...]
    unprompted: Any = None
    residual: jax.Array | None = None

    @classmethod
    def empty(cls, model: ModelConfig, batch: int, cache_length: int, guided: bool = False) -> "Features":
        zeros = lambda: jnp.zeros((batch, cache_length, model.hidden_size), model.dtype)
        of_layers = lambda: tuple(zeros() for _ in range(model.num_layers))
        plain = cls(of_layers(), of_layers())
        if not guided:
            return plain
        other = KVCache.empty(dataclasses.replace(model, scan_layers=False), batch, cache_length)
        return plain.replace(unprompted=(other.k, other.v, cls(of_layers(), of_layers())), residual=zeros())


@struct.dataclass
class Refresh:
    """What a forward computes again besides layer 0; leaves are of one row, or [batch].

    Attributes:
      prompt_length, limit: tokens of the prompt and of the answer.
      places: [length] position in the text of each of the answer's tokens, the first `limit` of them.
      prompt, answer: bool, all of it.
      count: how many of the answer's, where not all.
    """

    prompt_length: jax.Array
    limit: jax.Array
    places: jax.Array
    prompt: jax.Array
    answer: jax.Array
    count: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """That go through all but the first layer again."""
        return jnp.where(self.prompt, self.prompt_length, 0) + jnp.where(self.answer, self.limit, self.count)


def look(
    model: ModelConfig, params: dict, window: Any, transfer: bool, length: int, width: int, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """`forward` of a window of masked.py; with guidance hidden states are moved by scale times the residual, which is
    measured in some forwards only.
    """
    run = functools.partial(forward, model, params, transfer=transfer, length=length, width=width)
    hidden, after = run(window.text, window.refresh, cache=cache)
    if window.refresh_unprompted is None:
        return hidden, after
    k, v, features = cache.features.unprompted
    own = KVCache(k, v, cache.length, features=features)
    # A row whose residual is not measured now has no text here, so that nothing of it is written.
    measured = window.refresh_unprompted.limit > 0
    nowhere = jnp.where(measured[:, None], window.text.positions, cache.cache_length)
    text = window.text.replace(tokens=window.text.unprompted, positions=nowhere)

    def measure(carry):
        _, own, residual = carry
        without, own = run(text, window.refresh_unprompted, cache=own)
        return jnp.bool_(False), own, jnp.where(measured[:, None, None], hidden - without, residual)

    start = measured.any(), own, cache.features.residual
    _, own, residual = jax.lax.while_loop(lambda carry: carry[0], measure, start)
    kept = after.features.replace(unprompted=(own.k, own.v, own.features), residual=residual)
    return hidden + window.scale[:, None, None].astype(hidden.dtype) * residual, after.replace(features=kept)


@struct.dataclass
class _Values:
    """An attention context that only says what the values are."""

    values: jax.Array | None = None

    def attend(self, q, k, v):
        return jnp.zeros_like(q), _Values(v)


def forward(
    model: ModelConfig,
    params: dict,
    text: Any,
    refresh: Refresh,
    transfer: bool,
    length: int,
    width: int,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [batch, cache_length, hidden] of a whole text after the final norm, and the cache.

    Args:
      text: `tokens` and `positions` [batch, cache_length] of the whole text, in order; padding has positions past the
        end.
      transfer: whether any of the answer's tokens are computed again between refreshes.
      length: tokens of the longest answer.
      width: tokens that the layers behind the first take, at least `refresh.tokens`.
    """
    chex.assert_equal_shape([text.tokens, text.positions])
    rows, size = text.tokens.shape
    row, place = jnp.arange(rows)[:, None], jnp.arange(size)
    answer_at = jnp.where(jnp.arange(length) < refresh.limit[:, None], refresh.places, size)
    in_answer = jnp.zeros((rows, size), bool).at[row, answer_at].set(True, mode="drop")
    in_prompt = ~in_answer & (place < (refresh.prompt_length + refresh.limit)[:, None])
    norm = lambda p, x: layers.RMSNorm(model.rms_norm_eps).apply({"params": p}, x)
    angles = lambda at: layers.rotary_angles(at, model.head_dim, model.rope_base)
    attention = layers.Attention(model)

    attended, transformed = list(cache.features.attention), list(cache.features.mlp)
    table = params["embed"]
    x = tables.embedded(table["embedding"], table.get("embedding_scale"), text.tokens, model.dtype)
    for layer in range(model.num_layers):
        p = params[f"layer_{layer}"] if "layers" not in params else jax.tree.map(lambda x: x[layer], params["layers"])
        y, at = norm(p["attention_norm"], x), text.positions
        if layer:
            again = (in_prompt & refresh.prompt[:, None]) | (in_answer & refresh.answer[:, None])
            if transfer:
                _, found = attention.apply(
                    {"params": p["attention"]}, _take(y, answer_at), angles(answer_at), _Values()
                )
                similar = _cosine(found.values, _take_entries(cache.read(layer, 0, size)[1], answer_at))
                similar = jnp.where(answer_at < size, similar, jnp.inf)
                rank = jnp.argsort(jnp.argsort(similar, axis=1), axis=1)
                chosen = ~refresh.answer[:, None] & (rank < refresh.count[:, None])
                again = again.at[row, jnp.where(chosen, answer_at, size)].set(True, mode="drop")
                stale = jnp.where(refresh.answer[:, None], size, answer_at)  # else all of them are forwarded
                keys = _take_entries(cache.read(layer, 0, size)[0], answer_at)
                cache = cache.write(layer, stale, *(jnp.swapaxes(x, 1, 2) for x in (keys, found.values)))
            number = jnp.cumsum(again, axis=1) - 1
            at = jnp.full((rows, width), size)
            at = at.at[row, jnp.where(again, number, width)].set(jnp.broadcast_to(place, (rows, size)), mode="drop")
        context = Cached.in_place(cache, at, model.attention).replace(layer=layer)
        out, context = attention.apply({"params": p["attention"]}, _take(y, at), angles(at), context)
        cache = context.cache
        attended[layer] = attended[layer].at[row, at].set(out, mode="drop")
        x = x + attended[layer]
        out = layers.SwiGLU(model).apply({"params": p["mlp"]}, norm(p["mlp_norm"], _take(x, at)))
        transformed[layer] = transformed[layer].at[row, at].set(out, mode="drop")
        x = nn.with_logical_constraint(x + transformed[layer], ("batch", "length", "hidden"))
    features = Features(tuple(attended), tuple(transformed))
    return norm(params["final_norm"], x), cache.replace(features=features)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """[batch, n, hidden] of x [batch, size, hidden]; past its end: some."""
    return jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1)[..., None], axis=1)


def _take_entries(x: jax.Array, at: jax.Array) -> jax.Array:
    """[batch, n, heads, head_dim] of entries x [batch, heads, size, head_dim]."""
    at = jnp.minimum(at, x.shape[2] - 1)
    return jnp.swapaxes(jnp.take_along_axis(x, at[:, None, :, None], axis=2), 1, 2)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """[batch, n] float32, of all heads [batch, n, heads, head_dim] together."""
    a, b = (x.astype(jnp.float32).reshape(*x.shape[:2], -1) for x in (a, b))
    norm = lambda x: jnp.maximum(jnp.linalg.norm(x, axis=-1), TINY)
    return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))
