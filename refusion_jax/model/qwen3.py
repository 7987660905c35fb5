"""Qwen3 as a functional decoder: tokens at explicit positions in, hidden states out."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from refusion_jax.model import layers, tables
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig

# What the backward pass may keep of a layer; the rest is computed again. "none" keeps everything. Take "minimal" where
# it fits, else "full", and "none" for small models only. Compiled for 8B with 8 rows of 4096 on each TPU v5p: none
# 256 GiB of temporaries, minimal 49 GiB, full 27 GiB; the operations of a step are as 1.00 to 1.17 to 1.23.
REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.save_only_these_names("qkv", "attended"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Qwen3(nn.Module):
    """The decoder. It returns hidden states; whoever needs logits owns the head (model/head.py)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, context: Any) -> tuple[jax.Array, Any]:
        """Forwards tokens, each at its own rotary position, seeing what the context lets them see.

        Args:
          tokens: [batch, length] int32.
          positions: [batch, length] int32, a token's index in the final text; need not ascend.
          context: one of attention.py's.

        Returns:
          Hidden states [batch, length, hidden] after the final norm, in the compute dtype; and the context as the last
          layer leaves it (with a cache: the window written into it).
        """
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, positions])
        c = self.config
        embedding, scale = layers.Table(c, name="embed")()
        if self.is_initializing() and not c.tie_embeddings:
            layers.Table(c, name="head")()
        x = tables.embedded(embedding, scale, tokens, c.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "hidden"))
        angles = layers.rotary_angles(positions, c.head_dim, c.rope_base)

        block = layers.Block
        if c.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        if c.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            (x, context), _ = stack(c, name="layers")((x, context), angles)
        else:
            for i in range(c.num_layers):
                (x, context), _ = block(c, name=f"layer_{i}")((x, context), angles)
        return layers.RMSNorm(c.rms_norm_eps, name="final_norm")(x), context


def unstacked(params: dict) -> dict:
    """Stacked parameters ("layers") as a model without `scan_layers` takes them ("layer_0", "layer_1", ...)."""
    layers = params["layers"]
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    count = len(jax.tree.leaves(layers)[0])
    return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}


def stacked(params: dict) -> dict:
    """The inverse of `unstacked`; parameters that are stacked stay as they are."""
    if "layers" in params:
        return params
    layers = [params[f"layer_{i}"] for i in range(sum(name.startswith("layer_") for name in params))]
    rest = {name: tree for name, tree in params.items() if not name.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Random parameters, layers stacked, boxed with their logical axis names (`nn.unbox` for plain arrays)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(config, scan_layers=True)
    return Qwen3(config).init(key, tokens, tokens, Packed(tokens, implementation="xla"))["params"]
