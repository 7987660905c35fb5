"""Masked diffusion: tokens are replaced by masks independently of each other, and every mask predicts its own token.

LLaDA, MDLM, D3PM, Dream, DiffuLLaMA and Blockwise SFT are settings of it (`METHODS`). `Masked.inputs` is the objective,
given random numbers; `Masked.draw` makes these from (key, example id) alone, so one pass over an example is corrupted
the same way in whatever row, batch, microbatch or device it lands.
"""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.metrics.flops import Work
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective import spindle
from refusion_jax.objective.cart import context_weights
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
    without_mask,
)
from refusion_jax.objective.masked_settings import refuse_impossible, refuse_unwanted
from refusion_jax.settings import choice, not_negative

T_MIN = 1e-3  # lowest level
# Of MDLM's code: log of the probability at its lowest level, and the highest level that it divides by.
LOG_P_MIN = -6.9082553  # log(1 - exp(-1e-3))
T_MAX = 1 - 1e-4


@struct.dataclass
class Draws:
    """What is random about a packed batch.

    Attributes:
      t: [batch, length] float32 in (0, 1], level of the token's example.
      u: [batch, length] float32 in [0, 1); a token is masked where it is below the token's probability.
      block: [batch, length] int32, the block of its response that the token's example learns; None without blocks.
      seen: [1 or batch, length, length] bool (query, key), what is seen besides the past; None: everything is seen.
    """

    t: jax.Array
    u: jax.Array
    block: jax.Array | None = None
    seen: jax.Array | None = None


def level(u: jax.Array) -> jax.Array:
    """Levels in [T_MIN, 1) from numbers in [0, 1)."""
    return (1 - T_MIN) * u + T_MIN


@dataclasses.dataclass(frozen=True)
class Masked:
    """Denoising of independently masked tokens under bidirectional attention.

    Attributes:
      alignment: same (logits at i predict token i) or shift (token i + 1; the first token of an example is no target).
      maskable: response, or all tokens.
      schedule: probability p of masking at level t, which is uniform: linear (t), log_linear (0.999 t), log_uniform
        (log p is linear in t, so that all weights are equal), or spindle (by the token's frequency, spindle.py; its
        bound holds only for a reverse process that knows the frequencies).
      counts, strength: of spindle: a .npy file with the count of every id, and how much they matter.
      diffusion_steps: levels are multiples of 1 / diffusion_steps; 0: continuous. For log_linear and spindle.
      weight: of a masked token: elbo (p' / p, the likelihood's bound), 1-t, uniform, or cart (by the number and
        nearness of unmasked tokens).
      cart_p: of the geometric distribution of distances in cart.
      norm: what the sum is divided by: token (maskable tokens of the batch), masked (masked ones of the batch), batch
        (examples), sequence (an example's own maskable tokens, then examples), masked_sequence (its own masked tokens,
        then examples).
      softmax: raw (over all ids) or subs (without the mask).
      loss: cross_entropy, or a divergence of the reverse step of `diffusion_steps`, in which the mask's own probability
        counts: d3pm, with a term for reading clean examples, whose rows are forwarded too; or diffusionbert, with a
        hundredth of the cross-entropy of all tokens.
      block_size: 0, or blocks that a response is cut into, of which one is drawn to be learnt; what comes before it is
        masked with probability prefix_mask_rate, what comes after it with suffix_mask_prob.
      eos_as_one: the EOS tokens that a response ends with are masked all or none.
      anneal_steps: optimizer steps in which attention goes from causal to bidirectional: at step s a token sees each
        later one with probability (s + 1) / anneal_steps. 0: bidirectional from the start.
    """

    kind: str = "masked"
    alignment: str = "same"
    maskable: str = "response"
    schedule: str = "linear"
    counts: str = ""
    strength: float = 0.3
    diffusion_steps: int = 0
    weight: str = "elbo"
    cart_p: float = 0.1
    norm: str = "sequence"
    softmax: str = "raw"
    loss: str = "cross_entropy"
    block_size: int = 0
    prefix_mask_rate: float = 0.0
    suffix_mask_prob: float = 1.0
    eos_as_one: bool = False
    anneal_steps: int = 0
    needs_mask_token: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        refuse_unwanted(self)
        choice("objective", self, "kind", ("masked",))
        choice("objective", self, "alignment", ("same", "shift"))
        choice("objective", self, "maskable", ("response", "all"))
        choice("objective", self, "schedule", ("linear", "log_linear", "log_uniform", "spindle"))
        choice("objective", self, "weight", ("elbo", "1-t", "uniform", "cart"))
        choice("objective", self, "norm", ("token", "masked", "batch", "sequence", "masked_sequence"))
        choice("objective", self, "softmax", ("raw", "subs"))
        choice("objective", self, "loss", ("cross_entropy", "d3pm", "diffusionbert"))
        not_negative("objective", self, "diffusion_steps", "block_size", "anneal_steps", "strength")
        for name in ("cart_p", "prefix_mask_rate", "suffix_mask_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it is a probability, from 0 to 1.")
        refuse_impossible(self)

    def corrupt(self, key: jax.Array, batch: PackedBatch, model: ModelConfig, step: jax.Array | float) -> Inputs:
        """Masks tokens; nothing moves.

        Args:
          key: PRNG key of the run.
          batch: the packed examples.
          model: its mask token is what masked tokens become.
          step: of the optimizer; matters to `anneal_steps` only.
        """
        return self.inputs(batch, model, self.draw(key, batch, step))

    def work(self, lengths: jax.Array) -> Work:
        """While attention is annealed, as if it were not."""
        rows = 2 if self.loss == "d3pm" else 1
        return Work(rows * lengths, rows * lengths, rows * lengths**2)

    def per_token(
        self, model: ModelConfig, logits: jax.Array, targets: jax.Array, level: jax.Array | None = None
    ) -> TokenLoss:
        """level: [tokens] float32, of D3PM's steps, 0 where the input was clean; or [tokens, 2], see `spindle`."""
        if self.softmax == "subs":
            logits = without_mask(model, logits)
        found = cross_entropy(logits, targets)
        if self.loss == "cross_entropy":
            return found
        is_mask = jnp.arange(logits.shape[-1]) == model.mask_token_id
        stays = jnp.sum(jnp.where(is_mask, jax.nn.softmax(logits, axis=-1), 0.0), axis=-1)
        if self.loss == "diffusionbert":
            return found.replace(loss=spindle.divergence(found.loss, stays, level[:, 0], level[:, 1]))
        return found.replace(loss=jnp.where(level > 0, self._reverse_step(found.loss, stays, level), found.loss))

    def _reverse_step(self, entropy: jax.Array, stays: jax.Array, t: jax.Array) -> jax.Array:
        """Divergence at a mask of the step that ends at t, from its cross-entropy and the mask's own probability."""
        d = 1 / self.diffusion_steps
        t = jnp.where(t > 0, t, 1.0)
        s = t - d
        now = jnp.log1p((1 - t) * stays / t)
        before = jnp.where(s > 0, jnp.log1p((1 - s) * stays / jnp.where(s > 0, s, 1.0)), 0.0)
        return self.diffusion_steps * (now + d / t * entropy - (1 - d / t) * before)

    def draw(self, key: jax.Array, batch: PackedBatch, step: jax.Array | float) -> Draws:
        """All that is random, from (key, example id) alone; arguments as in `corrupt`."""
        where = layout(batch)
        uniform, at = each(jax.random.uniform), each(jax.random.fold_in)
        level_key, mask_key, block_key, see_key = example_keys(key, batch, 4)
        draws = Draws(
            t=where.of_example(level(uniform(level_key))),
            # For every token from its position, so that its number does not depend on the shape of the row.
            u=uniform(at(where.of_example(mask_key), where.positions)),
        )
        if self.block_size:
            blocks = -(-where.response_length // self.block_size)
            block = jnp.floor(where.of_example(uniform(block_key)) * blocks).astype(jnp.int32)
            draws = draws.replace(block=jnp.minimum(block, blocks - 1))
        if self.anneal_steps:
            numbers = jax.vmap(_of_pairs)(at(where.of_example(see_key), where.positions), where.positions)
            draws = draws.replace(seen=numbers < (step + 1) / self.anneal_steps)
        return draws

    def inputs(self, batch: PackedBatch, model: ModelConfig, draws: Draws) -> Inputs:
        """What the model sees and has to predict, given what is random.

        Raises:
          UserError: the model lacks the EOS token that `eos_as_one` is about.
        """
        chex.assert_equal_shape([batch.tokens, draws.t, draws.u])
        where = layout(batch)
        maskable = where.offset >= 0 if self.maskable == "response" else where.segment_ids > 0
        t = self._step_end(draws.t) if self.diffusion_steps else draws.t
        g = None
        if self.schedule == "spindle":
            g = spindle.centred(spindle.frequencies(model, self.counts), batch.tokens, where.segment_ids)
        probability, trainable = self._probability(t, g), maskable
        if self.block_size:
            block = where.offset // self.block_size
            trainable = maskable & (block == draws.block)
            outside = jnp.where(block < draws.block, self.prefix_mask_rate, self.suffix_mask_prob)
            probability = jnp.where(trainable, probability, outside)
        if self.alignment == "shift":
            trainable &= where.positions > 0
        u = _tail_as_one(batch, where, maskable, model, draws.u) if self.eos_as_one else draws.u
        masked = maskable & (u < probability)
        trained = masked & trainable

        denominator, share = normaliser(
            self.norm, where, trainable, trained, jnp.sum(batch.lengths > 0, dtype=jnp.float32)
        )
        weights = jnp.where(trained, self._weight(t, g, where, masked) / share, 0.0)
        targets = jnp.where(trained, batch.tokens, 0)
        if self.alignment == "shift":  # the first token of a row has no weight, so nothing comes round
            weights, targets = (jnp.roll(x, -1, axis=1) for x in (weights, targets))
        inputs = Inputs(
            tokens=jnp.where(masked, model.mask_token_id, batch.tokens),
            positions=where.positions,
            context=Packed(
                where.segment_ids,
                see="all" if draws.seen is None else "causal",
                extra=draws.seen,
                implementation=model.attention,
            ),
            targets=targets,
            terms={"mdm": Term(weights, denominator, jnp.float32(1))},
        )
        if self.loss == "d3pm":
            return _with_clean_rows(inputs, batch, maskable, jnp.minimum(t, T_MAX))
        if self.loss == "diffusionbert":
            return self._with_unmasked(inputs, batch, maskable & ~masked, t, g)
        return inputs

    def _with_unmasked(
        self, inputs: Inputs, batch: PackedBatch, unmasked: jax.Array, t: jax.Array, g: jax.Array
    ) -> Inputs:
        """With targets that are not masked, and what `spindle.divergence` wants to know; t: where steps end."""
        term, start = inputs.terms["mdm"], t - 1 / self.diffusion_steps
        first = t < 1.5 / self.diffusion_steps
        before = jnp.where(first, 1.0, spindle.kept(start, g, self.strength)[0])
        return inputs.replace(
            targets=jnp.where(unmasked, batch.tokens, inputs.targets),
            terms={"mdm": term.replace(weights=jnp.where(unmasked, 1.0, term.weights))},
            level=jnp.stack([jnp.where(unmasked, 0.0, before), 1 / (self.diffusion_steps * (1 - start))], axis=-1),
        )

    def _step_end(self, t: jax.Array) -> jax.Array:
        """The multiple of 1 / diffusion_steps above t."""
        return jnp.minimum(jnp.floor(t * self.diffusion_steps) + 1, self.diffusion_steps) / self.diffusion_steps

    def _probability(self, t: jax.Array, g: jax.Array | None) -> jax.Array:
        if self.schedule == "spindle":
            return 1 - spindle.kept(t, g, self.strength)[0]
        if self.schedule == "linear":
            return t
        if self.schedule == "log_linear":
            return (1 - T_MIN) * t
        return jnp.exp(LOG_P_MIN + t * (jnp.log1p(-T_MIN) - LOG_P_MIN))

    def _weight(self, t: jax.Array, g: jax.Array | None, where: Layout, masked: jax.Array) -> jax.Array:
        """[batch, length] float32, where masked."""
        if self.weight == "1-t":
            return 1 - t
        if self.weight == "uniform" or self.loss != "cross_entropy":  # where the loss has its weight in it
            return jnp.ones_like(t)
        if self.weight == "cart":
            return context_weights((where.segment_ids > 0) & ~masked, where.segment_ids, self.cart_p)
        if self.schedule == "log_uniform":
            return jnp.full_like(t, -LOG_P_MIN)
        if self.schedule == "spindle":
            share, slope = spindle.kept(t, g, self.strength)
            return -slope / (1 - share)
        return 1 / (jnp.minimum(t, T_MAX) if self.diffusion_steps else t)


def _of_pairs(query_keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Numbers [query, key] in [0, 1) from the keys of the queries and the positions of the keys, both [length]."""
    pair = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    return jax.vmap(lambda key: jax.vmap(lambda position: pair(key, position))(positions))(query_keys)


def _with_clean_rows(inputs: Inputs, batch: PackedBatch, maskable: jax.Array, t: jax.Array) -> Inputs:
    """Behind the rows the same again without masks, whose maskable tokens are targets of the term "reconstruction"."""
    term = inputs.terms["mdm"]
    twice = lambda x: jnp.concatenate([x, x])
    nothing = jnp.zeros_like(term.weights)
    return Inputs(
        tokens=jnp.concatenate([inputs.tokens, batch.tokens]),
        positions=twice(inputs.positions),
        context=inputs.context.replace(segment_ids=twice(inputs.context.segment_ids)),
        targets=twice(batch.tokens),
        terms={
            "mdm": term.replace(weights=jnp.concatenate([term.weights, nothing])),
            "reconstruction": term.replace(weights=jnp.concatenate([nothing, maskable.astype(jnp.float32)])),
        },
        level=jnp.concatenate([t, jnp.zeros_like(t)]),
    )


def _tail_as_one(batch: PackedBatch, where: Layout, maskable: jax.Array, model: ModelConfig, u: jax.Array) -> jax.Array:
    """`u` with one number, that of the first, for all EOS tokens at the end of a response."""
    if model.eos_token_id is None:
        raise UserError(
            "objective.eos_as_one is about EOS tokens, but the model has none: set config.model.eos_token_id, or "
            "eos_as_one = False."
        )
    length = u.shape[1]
    other = (where.segment_ids > 0) & ~(maskable & (batch.tokens == model.eos_token_id))
    last_other = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=length + 1))(
        jnp.where(other, where.positions, -1), where.segment_ids
    )
    tail = jnp.take_along_axis(last_other, where.segment_ids, axis=1) + 1  # its first position
    first = jnp.arange(length) - where.positions + tail
    return jnp.where(where.positions >= tail, jnp.take_along_axis(u, jnp.minimum(first, length - 1), axis=1), u)


# Published methods, with the settings of their authors.
METHODS = {
    "llada_pretrain": Masked(maskable="all", norm="token"),
    "llada": Masked(),
    "mdlm": Masked(maskable="all", schedule="log_linear", norm="token", softmax="subs"),
    "d3pm": Masked(maskable="all", schedule="log_linear", norm="token", loss="d3pm", diffusion_steps=1000),
    "dream": Masked(alignment="shift", norm="masked"),
    "diffullama": Masked(alignment="shift", norm="masked", anneal_steps=10000),
    "blockwise_sft": Masked(block_size=32, weight="uniform", norm="masked_sequence"),
}
