"""Score entropy (SEDD) of the absorbing graph: the model learns ratios of probabilities, not a distribution.

The score of id y at a mask, the ratio of the probability of the sequence with y there to that with the mask, is
exp(logit of y) / ((e^sigma - 1) (V - 1)), V - 1 being the number of ids without the mask. All that depends on the level
is this one factor, so it leaves the network out and makes the loss's weight 1 / t.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from refusion_jax.metrics.flops import Work
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.common import Inputs, PackedBatch, TokenLoss, cross_entropy, without_mask
from refusion_jax.objective.masked import Draws, Masked
from refusion_jax.settings import choice


@dataclasses.dataclass(frozen=True)
class Sedd:
    """Score entropy of independently masked tokens under bidirectional attention.

    Attributes:
      maskable: all tokens, or response.
      norm: what the sum is divided by: batch (examples), or token (maskable tokens of the batch).
    """

    kind: str = "sedd"
    maskable: str = "all"
    norm: str = "batch"
    needs_mask_token: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        choice("objective", self, "kind", ("sedd",))
        choice("objective", self, "maskable", ("all", "response"))
        choice("objective", self, "norm", ("batch", "token"))

    @property
    def corruption(self) -> Masked:
        """Tokens are masked as in MDLM, and weights are the same."""
        return Masked(maskable=self.maskable, schedule="log_linear", norm=self.norm)

    def corrupt(self, key: jax.Array, batch: PackedBatch, model: ModelConfig, step: jax.Array | float) -> Inputs:
        """Masks tokens; arguments as in `Masked.corrupt`."""
        return self.corruption.corrupt(key, batch, model, step)

    def work(self, lengths: jax.Array) -> Work:
        return self.corruption.work(lengths)

    def draw(self, key: jax.Array, batch: PackedBatch) -> Draws:
        """All that is random, from (key, example id) alone."""
        return self.corruption.draw(key, batch, 0)

    def inputs(self, batch: PackedBatch, model: ModelConfig, draws: Draws) -> Inputs:
        """What the model sees and has to predict, given what is random."""
        return self.corruption.inputs(batch, model, draws)

    def per_token(self, model: ModelConfig, logits: jax.Array, targets: jax.Array) -> TokenLoss:
        """Score entropy at a mask, over its factor sigma' / (e^sigma - 1) = 1 / t; 0 where the scores are the ratios.

        With z the logits without the mask's, less log(V - 1): sum(exp(z)) - z of the target - 1.
        """
        logits = without_mask(model, logits) - jnp.log(jnp.float32(model.logical_vocab_size - 1))
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        found = cross_entropy(logits, targets)
        return found.replace(loss=jnp.exp(normaliser) + found.loss - normaliser - 1)
