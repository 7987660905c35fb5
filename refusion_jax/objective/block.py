"""Block diffusion: blocks are denoised one after the other, each given the clean ones before it.

A row is forwarded as two streams, a noisy and a clean copy of every token; a noisy block sees itself and the clean
blocks before it, so one forward pass learns all blocks (`model.attention.TwoStream`). BD3-LM, SDAR and dllm's variant
are settings of it (`METHODS`). `Block.inputs` is the objective, given random numbers; `Block.draw` makes these from
(key, example id) alone.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.metrics.flops import Work
from refusion_jax.model.attention import TwoStream
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.common import (
    Inputs,
    Layout,
    PackedBatch,
    Term,
    TokenLoss,
    cross_entropy,
    each,
    example_keys,
    layout,
    normaliser,
    rank_of_group,
    without_mask,
)
from refusion_jax.objective.masked import T_MIN
from refusion_jax.settings import choice, positive


@struct.dataclass
class Draws:
    """What is random about a packed batch.

    Attributes:
      t: [batch, length] float32 in (0, 1], level of the token's block.
      masked: [batch, length] bool, before what must not be masked is restored.
    """

    t: jax.Array
    masked: jax.Array


@dataclasses.dataclass(frozen=True)
class Block:
    """Denoising of blocks under block-causal attention. Blocks are counted from the start of an example.

    Attributes:
      block_size: tokens of a block; 1 with clip (1, 1): the exact autoregressive likelihood.
      maskable: response, or all_but_first: all tokens but an example's first.
      level: what has a level of its own: every block, or the example.
      stratified: the levels of the n blocks of an example fall into n equal parts of the interval, in random order.
      clip: interval of the levels.
      resample: the numbers of a whole block are drawn again until the share of it that is masked lies in `clip`.
      schedule: probability p of masking at level t: linear (t) or cosine (sin(pi t / 2)).
      weight: of a masked token: elbo (p' / p, the likelihood's bound) or uniform.
      norm: what the sum is divided by: token (maskable tokens of the batch), batch (examples), sequence (an example's
        own maskable tokens, then examples).
      softmax: raw (over all ids) or subs (without the mask).
    """

    kind: str = "block"
    block_size: int = 4
    maskable: str = "response"
    level: str = "example"
    stratified: bool = False
    clip: tuple[float, ...] = (T_MIN, 1.0)
    resample: bool = False
    schedule: str = "linear"
    weight: str = "elbo"
    norm: str = "token"
    softmax: str = "raw"
    needs_mask_token: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        choice("objective", self, "kind", ("block",))
        positive("objective", self, "block_size")
        choice("objective", self, "maskable", ("response", "all_but_first"))
        choice("objective", self, "level", ("block", "example"))
        choice("objective", self, "schedule", ("linear", "cosine"))
        choice("objective", self, "weight", ("elbo", "uniform"))
        choice("objective", self, "norm", ("token", "batch", "sequence"))
        choice("objective", self, "softmax", ("raw", "subs"))
        if len(self.clip) != 2 or not 0 < self.clip[0] <= self.clip[1] <= 1:
            raise UserError(
                f"objective.clip is {self.clip}; give the lowest and the highest level, 0 < lowest <= highest <= 1."
            )
        if self.stratified and self.level == "example":
            raise UserError(
                "objective.stratified spreads the levels of an example's blocks, but with level = 'example' they have "
                "one in common. Set level = 'block', or stratified = False."
            )
        if self.resample:
            self._check_resample()

    def _check_resample(self):
        low, high = self._bounds()
        if self.schedule != "linear" or (low, high) == (0, 1):
            raise UserError(
                "objective.resample holds the masked share of a block inside objective.clip, which needs a clip "
                f"narrower than ({T_MIN}, 1) and schedule = 'linear'. Set these, or resample = False."
            )
        if not any(low <= count / self.block_size <= high for count in range(self.block_size + 1)):
            raise UserError(
                f"objective.resample can never end: no number of masks in a block of {self.block_size} is a share from "
                f"{low} to {high}. Widen objective.clip, enlarge block_size, or set resample = False."
            )

    def _bounds(self) -> tuple[float, float]:
        """Lowest and highest share of masks; the lowest level of all is no bound."""
        low, high = self.clip
        return (low if low > T_MIN else 0), high

    def corrupt(self, key: jax.Array, batch: PackedBatch, model: ModelConfig, step: jax.Array | float) -> Inputs:
        """Masks tokens of the noisy copy.

        Args:
          key: PRNG key of the run.
          batch: the packed examples.
          model: its mask token is what masked tokens become.
          step: does not matter here.
        """
        return self.inputs(batch, model, self.draw(key, batch))

    def work(self, lengths: jax.Array) -> Work:
        """Two streams, of which one goes through the head. A token of either sees all up to its block's end."""
        whole, rest = jnp.floor(lengths / self.block_size), lengths % self.block_size
        seen = self.block_size**2 * whole * (whole + 1) / 2 + rest * lengths
        return Work(2 * lengths, lengths, 2 * seen)

    def per_token(self, model: ModelConfig, logits: jax.Array, targets: jax.Array) -> TokenLoss:
        return cross_entropy(without_mask(model, logits) if self.softmax == "subs" else logits, targets)

    def draw(self, key: jax.Array, batch: PackedBatch) -> Draws:
        """All that is random, from (key, example id) alone."""
        where = layout(batch)
        uniform, at = each(jax.random.uniform), each(jax.random.fold_in)
        level_key, order_key, mask_key = example_keys(key, batch, 3)
        # For every token from its block's index or its position, so that the shape of the row does not matter.
        block = where.positions // self.block_size
        if self.level == "block":
            number = uniform(at(where.of_example(level_key), block))
        else:
            number = where.of_example(uniform(level_key))
        if self.stratified:
            first, order = self._first(where), uniform(at(where.of_example(order_key), block))
            starts = first == jnp.arange(first.shape[1])
            stratum = rank_of_group(jnp.where(starts, order, jnp.inf), where.segment_ids, first)
            number = (stratum + number) / -(-where.length // self.block_size)
        t = self.level_of(number)
        token_key = at(where.of_example(mask_key), where.positions)
        numbers = lambda round: uniform(each(lambda k: jax.random.fold_in(k, round))(token_key))
        return Draws(t, self.masks(where, t, numbers))

    def level_of(self, number: jax.Array) -> jax.Array:
        """Levels in `clip` from numbers in [0, 1)."""
        low, high = self.clip
        return low + (high - low) * number

    def masks(self, where: Layout, t: jax.Array, numbers: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """[batch, length] bool, before what must not be masked is restored.

        Args:
          where: of the batch.
          t: [batch, length] float32, levels.
          numbers: round -> [batch, length] in [0, 1); round 0 is for all, and round i for the i-th time that blocks are
            drawn again.
        """
        p, _ = self.probability(t)
        masked = numbers(jnp.int32(0)) < p
        if not self.resample:
            return masked
        first, (low, high) = self._first(where), self._bounds()
        in_block = jax.vmap(lambda x, f: jax.ops.segment_sum(x.astype(jnp.int32), f, num_segments=x.shape[0])[f])
        whole = in_block(where.segment_ids > 0, first) == self.block_size

        def violates(masked):
            share = in_block(masked, first) / self.block_size
            return whole & ((share < low) | (share > high))  # the end of an example may be too short for any share

        def again(state):
            round, masked = state
            return round + 1, jnp.where(violates(masked), numbers(round) < p, masked)

        return jax.lax.while_loop(lambda state: violates(state[1]).any(), again, (jnp.int32(1), masked))[1]

    def inputs(self, batch: PackedBatch, model: ModelConfig, draws: Draws) -> Inputs:
        """What the model sees and has to predict, given what is random: noisy rows, and the clean ones behind them."""
        chex.assert_equal_shape([batch.tokens, draws.t, draws.masked])
        where = layout(batch)
        if self.maskable == "response":
            maskable = where.offset >= 0
        else:
            maskable = (where.segment_ids > 0) & (where.positions > 0)
        masked = maskable & draws.masked
        denominator, share = normaliser(
            self.norm, where, maskable, masked, jnp.sum(batch.lengths > 0, dtype=jnp.float32)
        )
        p, slope = self.probability(draws.t)
        weight = slope / p if self.weight == "elbo" else jnp.ones_like(p)
        twice = lambda x: jnp.concatenate([x, x], axis=1)
        noisy = jnp.where(masked, model.mask_token_id, batch.tokens)
        return Inputs(
            tokens=jnp.concatenate([noisy, batch.tokens], axis=1),
            positions=twice(where.positions),
            context=TwoStream(
                segment_ids=twice(where.segment_ids),
                blocks=twice(where.positions // self.block_size),
                clean=jnp.concatenate([jnp.zeros_like(masked), jnp.ones_like(masked)], axis=1),
            ),
            targets=jnp.where(masked, batch.tokens, 0),
            terms={"mdm": Term(jnp.where(masked, weight / share, 0.0), denominator, jnp.float32(1))},
        )

    def probability(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """p and its derivative at levels t."""
        if self.schedule == "linear":
            return t, jnp.ones_like(t)
        return jnp.sin(jnp.pi / 2 * t), jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t)

    def _first(self, where: Layout) -> jax.Array:
        """Index [batch, length] of the first token of every token's block in its row."""
        return jnp.arange(where.positions.shape[1]) - where.positions % self.block_size


# Published methods, with the settings of their authors.
METHODS = {
    "bd3": Block(maskable="all_but_first", level="block", stratified=True, softmax="subs"),
    "sdar": Block(),
    "dllm": Block(block_size=32),
}
