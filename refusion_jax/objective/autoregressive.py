"""Next-token prediction on the response: the objective of the model that ReFusion starts from."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from refusion_jax.metrics.flops import Work
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.common import Inputs, PackedBatch, Term, TokenLoss, cross_entropy, layout
from refusion_jax.settings import choice


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Every token predicts its successor, if that is one of the response; mean over the targets of the global batch."""

    kind: str = "autoregressive"
    needs_mask_token: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = False

    def __post_init__(self):
        choice("objective", self, "kind", ("autoregressive",))

    def corrupt(self, key: jax.Array, batch: PackedBatch, model: ModelConfig, step: jax.Array | float) -> Inputs:
        """Nothing is changed or drawn; the prompt's last token predicts the first one of the response."""
        where = layout(batch)
        following = where.offset + 1
        has_target = (where.segment_ids > 0) & (following >= 0) & (following < where.response_length)
        weights = has_target.astype(jnp.float32)
        return Inputs(
            tokens=batch.tokens,
            positions=where.positions,
            context=Packed(where.segment_ids, implementation=model.attention),
            targets=jnp.where(has_target, jnp.roll(batch.tokens, -1, axis=1), 0),
            terms={"ar": Term(weights, jnp.sum(weights), jnp.float32(1))},
        )

    def work(self, lengths: jax.Array) -> Work:
        return Work(lengths, lengths, lengths * (lengths + 1) / 2)

    def per_token(self, model: ModelConfig, logits: jax.Array, targets: jax.Array) -> TokenLoss:
        return cross_entropy(logits, targets)
