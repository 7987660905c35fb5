"""Exact attention in plain XLA, a block of queries and keys at a time, forward and backward.

Rows of packed examples need few of the pairs of blocks: those that no token of the row needs are skipped. Scores exist
for one pair of one row at a time, and the softmax over a query's blocks of keys is a running one, as in the kernels.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from refusion_jax.model.layers import by_kv_head, by_token, devices_over

BLOCK = 256  # queries and keys
LOWEST = jnp.finfo(jnp.float32).min
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def masked_scores(queries: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 scores [B, K, G * T, S] of queries [B, K, G * T, H] on keys [B, K, S, H]; the lowest number where the
    mask [B, T, S] is False.
    """
    scores = _product("BKMH,BKSH->BKMS", queries, keys.astype(queries.dtype))
    of_heads = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    of_heads = jnp.where(mask[:, None, None], of_heads * keys.shape[-1] ** -0.5, LOWEST)
    return of_heads.reshape(scores.shape)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention in float32 under an explicit mask, with all scores at once.

    Args:
      q: [batch, query, heads, head_dim].
      k, v: [batch, kv_heads, key, head_dim]; each kv head serves heads / kv_heads query heads.
      mask: [batch, query, key] bool, True where a query may see a key.

    Returns:
      [batch, query, heads, head_dim] in q's dtype. A query that may see nothing gets finite values.
    """
    weights = jax.nn.softmax(masked_scores(by_kv_head(q, k.shape[1]), k, mask), axis=-1).astype(q.dtype)
    return by_token(jnp.einsum("BKMS,BKSH->BKMH", weights, v.astype(q.dtype)), q.shape[1])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, context: Any, *, causal: bool) -> jax.Array:
    """Attention of rows under a context's mask; under a mesh each device has its own rows and heads, and skips alone.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      context: `visible(queries, keys)` gives the mask [batch, query, key] of tokens with these indices; its arrays have
        the batch as first axis, or 1.
      causal: whether no query sees a key that comes later in the row.

    Returns:
      [batch, length, heads, head_dim] in q's dtype, under the checkpoint name "attended".
    """
    batch, length = q.shape[:2]
    chex.assert_shape((k, v), (batch, length, None, q.shape[3]))
    if length <= BLOCK:
        everywhere = jnp.arange(length)
        k, v = (jnp.einsum("BSKH->BKSH", x) for x in (k, v))
        return checkpoint_name(masked_attention(q, k, v, context.visible(everywhere, everywhere)), "attended")
    attend = functools.partial(_rows, causal)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(context, q, k, v)
    rows = "batch" if batch % devices_over("batch") == 0 else None
    queries, keys = (nn.logical_to_mesh_axes((rows, None, heads)) for heads in ("heads", "kv_heads"))
    by_row = nn.logical_to_mesh_axes((rows,))
    contexts = jax.tree.map(lambda x: by_row if x.shape[0] == batch else PartitionSpec(), context)
    specs = (contexts, queries, keys, keys)
    return jax.shard_map(attend, in_specs=specs, out_specs=queries, check_vma=False)(context, q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(causal, context, q, k, v):
    return _rows_forward(causal, context, q, k, v)[0]


def _rows_forward(causal, context, q, k, v):
    def one_row(row):
        row, q, k, v = row

        def add(state, i, j, mask):
            top, total, out = state  # [K, G * T], the same, [K, G * T, H]
            mask = jnp.tile(mask, (groups, 1))
            scores = jnp.where(mask, _scores(q[i], k[j]), LOWEST)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights, old = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0), jnp.exp(top - new_top)
            part = _product("KMS,KSH->KMH", weights.astype(v.dtype), v[j])
            return new_top, total * old + weights.sum(axis=-1), out * old[..., None] + part

        start = jnp.full(q.shape[:-1], LOWEST), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
        top, total, out = _over_pairs(causal, length, context, row, add, start, by=(0, 0, 0))
        total = jnp.where(total > 0, total, 1.0)  # 0 where a query sees nothing
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    batch, length, heads = q.shape[:3]
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    parts = _split(q, kv_heads), _split(k, kv_heads), _split(v, kv_heads)
    out, normaliser = jax.lax.map(one_row, (jnp.arange(batch), *parts))
    # Both are kept where a remat policy keeps "attended", so that the backward pass does not run this again.
    out, normaliser = checkpoint_name(_join(out, q), "attended"), checkpoint_name(normaliser, "attended")
    return out, (context, q, k, v, out, normaliser)


def _rows_backward(causal, residuals, cotangent):
    def one_row(row):
        row, q, k, v, out, cotangent, normaliser = row
        dot = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [block, K, G * T]

        def add(state, i, j, mask):
            d_q, d_k, d_v = state  # [K, G * T, H], [K, S, H], [K, S, H]
            mask = jnp.tile(mask, (groups, 1))
            weights = jnp.where(mask, jnp.exp(_scores(q[i], k[j]) - normaliser[i][..., None]), 0.0)
            d_weights = _product("KMH,KSH->KMS", cotangent[i], v[j]) - dot[i][..., None]
            d_scores = (weights * d_weights * q.shape[-1] ** -0.5).astype(q.dtype)
            return (
                d_q + _product("KMS,KSH->KMH", d_scores, k[j]),
                d_k + _product("KMS,KMH->KSH", d_scores, q[i]),
                d_v + _product("KMS,KMH->KSH", weights.astype(v.dtype), cotangent[i]),
            )

        start = jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(k.shape)
        return [x.astype(q.dtype) for x in _over_pairs(causal, length, context, row, add, start, by=(0, 1, 1))]

    context, q, k, v, out, normaliser = residuals
    batch, length, heads = q.shape[:3]
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    parts = jnp.arange(batch), *(_split(x, kv_heads) for x in (q, k, v, out, cotangent)), normaliser
    found = jax.lax.map(one_row, parts)
    return None, *(_join(x, like) for x, like in zip(found, (q, k, v), strict=True))


_rows.defvjp(_rows_forward, _rows_backward)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """[K, G * T, H], [K, S, H] -> [K, G * T, S] float32."""
    return _product("KMH,KSH->KMS", q, k) * q.shape[-1] ** -0.5


def _split(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, head_dim] -> [batch, block, K, G * BLOCK, head_dim], padded to whole blocks; the G heads
    of a kv head one after another.
    """
    batch, length, heads, dim = x.shape
    count = -(-length // BLOCK)
    x = jnp.pad(x, ((0, 0), (0, count * BLOCK - length), (0, 0), (0, 0)))
    return by_kv_head(x.reshape(-1, BLOCK, heads, dim), kv_heads).reshape(batch, count, kv_heads, -1, dim)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `_split`, to the shape of `like`."""
    batch, length, heads, dim = like.shape
    return by_token(x.reshape(-1, *x.shape[2:]), BLOCK).reshape(batch, -1, heads, dim)[:, :length]


def _over_pairs(
    causal: bool, length: int, context: Any, row: jax.Array, add: Callable, start: tuple, by: tuple[int, ...]
) -> tuple:
    """Runs `add` over the pairs (query block, key block) of a row that have anything to see.

    Args:
      add: (state, i, j, mask [BLOCK, BLOCK]) -> state, of blocks i and j.
      start: arrays [block, ...]; the state of a pair is what they hold for it.
      by: for each of them whether it is of query blocks (0) or of key blocks (1).
    """
    count = -(-length // BLOCK)
    pairs = [pair for pair in itertools.product(range(count), repeat=2) if pair[1] <= pair[0] or not causal]
    own = jax.tree.map(lambda x: x if len(x) == 1 else jax.lax.dynamic_slice_in_dim(x, row, 1), context)

    def step(carry, pair):
        queries, keys = (block * BLOCK + jnp.arange(BLOCK) for block in pair)
        mask = own.visible(*(jnp.minimum(x, length - 1) for x in (queries, keys)))[0] & (keys < length)
        state = tuple(x[pair[axis]] for x, axis in zip(carry, by, strict=True))
        state = jax.lax.cond(mask.any(), lambda state: add(state, *pair, mask), lambda state: state, state)
        return tuple(x.at[pair[axis]].set(y) for x, y, axis in zip(carry, state, by, strict=True)), None

    return jax.lax.scan(step, start, tuple(jnp.array(pairs).T))[0]
