"""Qwen3 as a functional decoder: tokens at explicit positions in, hidden states out."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from refusion_jax.model import layers
from refusion_jax.model.attention import CachedAttention, SegmentAttention
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig

# What the backward pass may keep of a layer; the rest is computed again. "none" keeps everything. Take "minimal" where it fits,
# else "full", and "none" for small models only. Compiled for 8B with 8 rows of 4096 on each TPU v5p: none 337 GiB of temporaries,
# minimal 49 GiB, full 27 GiB; the operations of a step are as 1.00 to 1.17 to 1.23.
REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.save_only_these_names("qkv", "attended"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Qwen3(nn.Module):
    """The decoder. It returns hidden states; whoever needs logits owns the head (see `output_table`)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        window_mask: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Forwards tokens, causally in buffer order, each at its own rotary position.

        Args:
          tokens: [batch, length] int32.
          positions: [batch, length] int32, a token's index in the final text; need not ascend.
          segment_ids: [batch, length] int32; tokens see their own segment only, 0 is padding. None: one segment.
          cache: forward the tokens as a window on top of `cache.length` committed entries. The window's keys and
            values are written behind them (entries past the end of the cache are dropped); `length` stays as it is.
          window_mask: with a cache, [batch, query, key] bool inside the window. None: causal.

        Returns:
          Hidden states [batch, length, hidden] after the final norm, in the compute dtype; with a cache also the cache.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        embedding = layers.Table(c, name="embed")()
        if not c.tie_embeddings:
            layers.Table(c, name="head")()
        # Gathered over fsdp before the look-up, so that rows come out sharded by batch and not by hidden unit.
        embedding = nn.with_logical_constraint(embedding.astype(dtype), ("vocab", None))
        x = nn.with_logical_constraint(embedding[tokens], ("batch", "length", "hidden"))

        angles = layers.rotary_angles(positions, c.head_dim, c.rope_theta)
        if cache is None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            context = SegmentAttention(segments, c.attention)
        else:
            context = CachedAttention.start(cache, window_mask, tokens.shape[1])

        block = layers.Block
        if c.remat != "none" and cache is None:
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        (x, context), _ = stack(c, name="layers")((x, context), angles)
        x = layers.RMSNorm(c.rms_norm_eps, name="final_norm")(x)
        if cache is None:
            return x
        return x, cache.replace(k=context.k, v=context.v)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Random parameters, as boxed arrays that carry their logical axis names (`nn.unbox` for plain ones)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(
        config, attention="xla"
    )  # parameters do not depend on it, and one token suits no kernel
    return Qwen3(config).init(key, tokens, tokens)["params"]


def output_table(params: dict) -> jax.Array:
    """The head's table [vocab, hidden]; the embedding itself when tied."""
    return params["head" if "head" in params else "embed"]["embedding"]


def logits(config: ModelConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden]; -inf for rows past the logical vocabulary."""
    table = output_table(params).astype(hidden.dtype)
    scores = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(config.vocab_size) < config.logical_vocab_size, scores, -jnp.inf)
