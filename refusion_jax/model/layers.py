"""The layers of Qwen3, as explicit einsums over named parameters.

Axis letters: B batch, T query length (or window), S key length (or cache length), D hidden, N query heads, K key/value
heads, H head_dim, F mlp, L layers, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from refusion_jax.model.config import ModelConfig
from refusion_jax.model.tiles import Tiles


def devices_over(*axes: str) -> int:
    """Number of devices that the logical axes are split over together, by the mesh and rules in use; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in jax.tree.leaves(tuple(nn.logical_to_mesh_axes(axes))))


def weight(
    module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...], fan_in: int, inputs: int = 1
) -> jax.Array | Tiles:
    """A matrix parameter with logical axis names, in float32, drawn with standard deviation fan_in^-1/2; or the tiles
    that it was made into.

    In a quantised model it is int8 (nothing is drawn), and parameter `<name>_scale` in float32 has a factor for every
    output channel, which `projected` applies.

    Args:
      inputs: number of leading axes that the projection sums over.
    """
    if isinstance(stored := module.get_variable("params", name), Tiles):
        return stored
    if not module.config.quantise:
        init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
        return module.param(name, init, shape, jnp.float32)
    of_channels = nn.with_logical_partitioning(nn.initializers.ones, axes[inputs:])
    module.param(f"{name}_scale", of_channels, shape[inputs:], jnp.float32)
    return module.param(name, nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, jnp.int8)


def matmul(x: jax.Array, w: jax.Array | Tiles, inputs: int = 1) -> jax.Array:
    """x [..., D] times w [D, ...], in x's dtype. All tokens are one axis: with more, XLA transposes the gradients that
    the gradient of w is made of, which takes as long as half the products on a CPU.

    Args:
      inputs: number of axes of x and w that are summed over. As one: over two, XLA may copy the matrix of every layer
        to bring it into the order of x.
    """
    tokens = x.shape[: x.ndim - inputs]
    flat = x.reshape(math.prod(tokens), -1)
    if isinstance(w, Tiles):
        y = w.product(flat)
    else:
        y = jnp.tensordot(flat, w.reshape(-1, *w.shape[inputs:]).astype(x.dtype), 1)
    return y.reshape(*tokens, *y.shape[1:])


def scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """y with its last axes multiplied by `scale`, in y's dtype; the product in float32."""
    return (y * scale).astype(y.dtype)


def projected(module: nn.Module, name: str, x: jax.Array, y: jax.Array, inputs: int = 1) -> jax.Array:
    """y, what the matrix of projection `name` makes of x; scaled where that is int8, and with its adapter's part.

    The adapter is a low-rank update (x a) b in the collection "lora". The product a b is never formed: added to a
    bfloat16 weight, a small update would be rounded away, and the sums would be kept for the backward pass.

    Args:
      inputs: number of trailing axes of x that the projection sums over.
    """
    if module.config.quantise:
        y = scaled(y, nn.unbox(module.get_variable("params", f"{name}_scale")))
    if not module.has_variable("lora", name):
        return y
    adapter = module.get_variable("lora", name)
    return y + jnp.tensordot(jnp.tensordot(x, adapter["a"].astype(x.dtype), inputs), adapter["b"].astype(x.dtype), 1)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square normalisation of the last axis; statistics in float32, result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [batch, length, 1, head_dim / 2] in float32 of rotary embeddings at explicit positions."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [batch, length, heads, head_dim] in float32, first half against second half."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G * T, H]: the queries of the G heads that a kv head serves, one head after another."""
    batch, length, heads, dim = q.shape
    parts = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    return jnp.einsum("BTKGH->BKGTH", parts).reshape(batch, kv_heads, -1, dim)


def by_token(out: jax.Array, length: int) -> jax.Array:
    """[B, K, G * T, H] -> [B, T, N, H], the reverse."""
    batch, kv_heads, _, dim = out.shape
    parts = out.reshape(batch, kv_heads, -1, length, dim)
    return jnp.einsum("BKGTH->BTKGH", parts).reshape(batch, length, -1, dim)


class Table(nn.Module):
    """A table with a row for every id: embedding or head [V, D], and of a quantised model the rows' scales [V]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        axes, shape = ("vocab", "embed"), (self.config.vocab_size, self.config.hidden_size)
        if not self.config.quantise:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
            return self.param("embedding", init, shape, jnp.float32), None
        of_rows = nn.with_logical_partitioning(nn.initializers.ones, axes[:1])
        scale = self.param("embedding_scale", of_rows, shape[:1], jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param("embedding", init, shape, jnp.int8), scale


class RMSNorm(nn.Module):
    """RMS normalisation with a learned scale [D]."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        return rms_norm(x, scale, self.epsilon)


class Attention(nn.Module):
    """Grouped-query attention with per-head RMS norm on queries and keys."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, angles, context):
        """x [B, T, D] -> ([B, T, D], context); `context` is one of attention.py's."""
        c = self.config
        d, n, k, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        query = weight(self, "query", ("embed", "heads", "head_dim"), (d, n, h), d)
        key = weight(self, "key", ("embed", "kv_heads", "head_dim"), (d, k, h), d)
        value = weight(self, "value", ("embed", "kv_heads", "head_dim"), (d, k, h), d)
        output = weight(self, "output", ("heads", "head_dim", "embed"), (n, h, d), n * h, inputs=2)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        query_norm = self.param("query_norm", ones, (h,), jnp.float32)
        key_norm = self.param("key_norm", ones, (h,), jnp.float32)

        def project(name, w):
            return projected(self, name, x, matmul(x, w))

        q = rotate(rms_norm(project("query", query), query_norm, c.rms_norm_eps), angles)
        keys = rotate(rms_norm(project("key", key), key_norm, c.rms_norm_eps), angles)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        keys = nn.with_logical_constraint(keys, ("batch", "length", "kv_heads", "head_dim"))
        values = nn.with_logical_constraint(project("value", value), ("batch", "length", "kv_heads", "head_dim"))
        q, keys, values = (checkpoint_name(a, "qkv") for a in (q, keys, values))
        out, context = context.attend(q, keys, values)
        return projected(self, "output", out, matmul(out, output, inputs=2), inputs=2), context


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate x) * up x)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        gate = weight(self, "gate", ("embed", "mlp"), (d, f), d)
        up = weight(self, "up", ("embed", "mlp"), (d, f), d)
        down = weight(self, "down", ("mlp", "embed"), (f, d), f)

        def project(name, x, w):
            return projected(self, name, x, matmul(x, w))

        # Elementwise, so cheaper to compute again than to keep.
        gated = jax.checkpoint(lambda gate, up: nn.silu(gate) * up, prevent_cse=False)
        inner = gated(project("gate", x, gate), project("up", x, up))
        inner = nn.with_logical_constraint(inner, ("batch", "length", "mlp"))
        return project("down", inner, down)


class Block(nn.Module):
    """One decoder layer, as the body of a scan over layers."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, angles):
        """carry = (x [B, T, D], attention context) -> (carry, None)."""
        x, context = carry
        epsilon = self.config.rms_norm_eps
        y, context = Attention(self.config, name="attention")(
            RMSNorm(epsilon, name="attention_norm")(x), angles, context
        )
        x = nn.with_logical_constraint(x + y, ("batch", "length", "hidden"))
        x = x + SwiGLU(self.config, name="mlp")(RMSNorm(epsilon, name="mlp_norm")(x))
        x = nn.with_logical_constraint(x, ("batch", "length", "hidden"))
        return (x, context), None
