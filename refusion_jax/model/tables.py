"""Gradients of the tables [vocab, hidden], embedding and head.

Tens of thousands of tokens add into one row, that of the mask token. A sum in bfloat16 stops growing when its parts are
less than 1/256 of it, so each device sums its tokens in float32; that sum is rounded once and then reduced over the
mesh.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from refusion_jax.model.layers import devices_over, scaled


def batch_shards(batch: int) -> int:
    """Parts that `batch` rows are split into over the mesh; 1 where it does not divide them."""
    devices = devices_over("batch")
    return devices if batch % devices == 0 else 1


def gathered(table: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The table in `dtype`, whole in its hidden axis on every device; what crosses the network is in that dtype."""
    return nn.with_logical_constraint(table.astype(dtype), ("vocab", None))


def embedded(table: jax.Array, scale: jax.Array | None, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows [batch, length, hidden] of tokens [batch, length] in `dtype`; of an int8 table times `scale` [vocab]."""
    if scale is None:
        return look_up(table, tokens, dtype)
    return scaled(table[tokens].astype(dtype), scale[tokens][..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows [batch, length, hidden] of tokens [batch, length] in `dtype`; the gradient of a row is summed in float32."""
    return gathered(table, dtype)[tokens]


def _look_up_forward(table, tokens, dtype):
    # The table goes along for its shape alone.
    return look_up(table, tokens, dtype), (tokens, table)


def _look_up_backward(dtype, residuals, cotangent):
    tokens, table = residuals
    vocab, hidden = table.shape
    own = vocab // devices_over("vocab")

    def scatter(tokens, cotangent):
        """[row, token], [row, token, hidden] of this device -> [own, hidden] for its part of the vocabulary."""
        names = _axes("vocab")
        row = tokens - own * jax.lax.axis_index(names) if names else tokens
        row = jnp.where((row >= 0) & (row < own), row, own)
        return jnp.zeros((own, hidden), jnp.float32).at[row].add(cotangent.astype(jnp.float32), mode="drop")

    if batch_shards(len(tokens)) == 1:
        return jnp.zeros((vocab, hidden), jnp.float32).at[tokens].add(cotangent.astype(jnp.float32)).astype(
            table.dtype
        ), None
    rows = PartitionSpec(_axes("batch"))
    total = jax.shard_map(
        lambda tokens, cotangent: _reduce(scatter(tokens, cotangent), cotangent.dtype),
        in_specs=(rows, rows),
        out_specs=nn.logical_to_mesh_axes(("vocab", "embed")),
        check_vma=False,
    )(tokens, cotangent)
    return total.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def sum_of_shards(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[vocab, hidden] from the float32 sums [shard, vocab, hidden] that the devices made of their own tokens."""
    if len(parts) == 1:
        return parts[0].astype(dtype)
    return jax.shard_map(
        lambda part: _reduce(part[0], dtype),
        in_specs=PartitionSpec(_axes("batch"), *nn.logical_to_mesh_axes(("vocab", None))),
        out_specs=nn.logical_to_mesh_axes(("vocab", "embed")),
        check_vma=False,
    )(parts)


def _axes(logical: str) -> tuple[str, ...]:
    """Mesh axes that a logical axis is split over."""
    return tuple(jax.tree.leaves(tuple(nn.logical_to_mesh_axes((logical,)))))


def _reduce(part: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Inside a shard_map: the sum of the devices' parts, each device keeping its piece of the hidden axis."""
    part = part.astype(dtype)
    for name in _axes("embed"):
        part = jax.lax.psum_scatter(part, name, scatter_dimension=1, tiled=True)
    rest = tuple(name for name in _axes("batch") if name not in _axes("embed"))
    return jax.lax.psum(part, rest) if rest else part
