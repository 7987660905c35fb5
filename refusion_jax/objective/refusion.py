"""ReFusion's objective: slot corruption and the two terms of the loss (method sections 2 and 3).

Runs on the device inside the jitted step. All randomness of an example comes from (key, example id) alone, so one pass
over an example is corrupted the same way in whatever row, batch, microbatch or device it lands.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.metrics.flops import Work
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.common import (
    Inputs,
    Layout,
    PackedBatch,
    Term,
    TokenLoss,
    count_in_segment,
    cross_entropy,
    each,
    example_keys,
    layout,
    rank_of_group,
)
from refusion_jax.settings import choice, not_negative

Q_MIN = 1e-3  # smallest masking probability
CAUSAL = 4  # the draw of an example's key that comes behind the four of `_draw`


@struct.dataclass
class _Draws:
    """What is random about every token's example and slot; all [batch, length].

    Attributes:
      size: of the slots of its example.
      t: masking level of its example.
      slot: index of its slot in the response.
      mask, order: one number for each slot, which decides about masking and about order.
    """

    size: jax.Array
    t: jax.Array
    slot: jax.Array
    mask: jax.Array
    order: jax.Array

    @property
    def q(self) -> jax.Array:
        """Masking probability of the token's example."""
        return (1 - Q_MIN) * self.t + Q_MIN


@dataclasses.dataclass(frozen=True)
class Refusion:
    """The hybrid objective: autoregressive inside clean slots, denoising of masked ones (method sections 2 and 3).

    Attributes:
      masking: released (each slot with probability q) or paper (floor(t K) slots).
      normalisation: released (token mean; 1 / (q R) weights) or paper (means over examples).
      ar_weight, mdm_weight: weights of the two terms.
      mdm_weight_cap: upper bound of 1 / q in the released weights 1 / (q R); 0: none.
      slot_sizes: one is drawn uniformly for each example.
      causal_share: probability that an example is one slot as long as its response and not masked: every response token
        is predicted by its predecessor, the first one by the prompt's last token. Such examples make the term `causal`
        (of scale 1), which with 1 is the autoregressive objective's loss; the others make the other two.
    """

    kind: str = "refusion"
    masking: str = "released"
    normalisation: str = "released"
    ar_weight: float = 1.0
    mdm_weight: float = 1.0
    mdm_weight_cap: float = 0.0
    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    causal_share: float = 0.0
    needs_mask_token: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False

    def __post_init__(self):
        choice("objective", self, "kind", ("refusion",))
        choice("objective", self, "masking", ("released", "paper"))
        choice("objective", self, "normalisation", ("released", "paper"))
        if not self.slot_sizes or min(self.slot_sizes) < 1:
            raise UserError(f"objective.slot_sizes is {self.slot_sizes}; give at least one slot size, each at least 1.")
        not_negative("objective", self, "ar_weight", "mdm_weight", "mdm_weight_cap")
        if not 0 <= self.causal_share <= 1:
            raise UserError(
                f"objective.causal_share is {self.causal_share}; it is a share of the examples, between 0 and 1."
            )

    def work(self, lengths: jax.Array) -> Work:
        return Work(lengths, lengths, lengths * (lengths + 1) / 2)

    def corrupt(self, key: jax.Array, batch: PackedBatch, model: ModelConfig, step: jax.Array | float) -> Inputs:
        """Cuts responses into slots, masks some, permutes the clean ones and moves the masked ones behind them.

        Args:
          key: PRNG key of the run.
          batch: the packed examples.
          model: its mask token is what masked tokens become.
          step: does not matter here.

        Returns:
          The corrupted batch with its terms: ar, mdm and, with a causal_share, causal. Padding stays at the end of a
          row.
        """
        where = layout(batch)
        draws = self._draw(key, batch, where)
        causal_examples = self._causal(key, batch)
        causal = where.of_example(causal_examples) & (where.segment_ids > 0)
        draws = draws.replace(order=jnp.where(causal, 0.0, draws.order))
        masked = self._masked(where, draws) & ~causal
        clean = (where.offset >= 0) & ~masked
        order = _buffer_order(where, draws, masked, clean)

        def moved(values):
            return jnp.take_along_axis(values, order, axis=1)

        # Targets in original order: a clean token predicts its successor in the same slot, a mask its own token.
        following = where.offset + 1
        in_slot = jnp.where(causal, following >= 0, clean & (following % draws.size != 0))
        has_successor = in_slot & (following < where.response_length)
        targets = jnp.where(has_successor, jnp.roll(batch.tokens, -1, axis=1), 0)
        terms = self.terms(
            ar=has_successor & ~causal,
            mdm=masked,
            q=draws.q,
            response_length=where.response_length,
            segment_ids=where.segment_ids,
            examples=jnp.sum((batch.lengths > 0) & ~causal_examples),
        )
        if self.causal_share:
            weights = (has_successor & causal).astype(jnp.float32)
            terms["causal"] = Term(weights, jnp.sum(weights), jnp.float32(1))
        return Inputs(
            tokens=moved(jnp.where(masked, model.mask_token_id, batch.tokens)),
            positions=moved(where.positions),
            context=Packed(moved(where.segment_ids), implementation=model.attention),
            targets=moved(jnp.where(masked, batch.tokens, targets)),
            terms={name: term.replace(weights=moved(term.weights)) for name, term in terms.items()},
        )

    def per_token(self, model: ModelConfig, logits: jax.Array, targets: jax.Array) -> TokenLoss:
        return cross_entropy(logits, targets)

    def terms(self, *, ar, mdm, q, response_length, segment_ids, examples) -> dict[str, Term]:
        """Weights and denominators of the two terms (table of method section 3).

        Args:
          ar, mdm: [batch, length] bool, tokens with an autoregressive target and masked tokens.
          q: [batch, length] float32, masking probability of the token's example.
          response_length: [batch, length] int32, of the token's example.
          segment_ids: [batch, length] int32, of the token.
          examples: scalar, number of examples in the global batch that are cut into slots.
        """
        count = jnp.asarray(examples, jnp.float32)
        if self.normalisation == "released":
            level = 1 / q
            if self.mdm_weight_cap:
                level = jnp.minimum(level, self.mdm_weight_cap)
            ar_weights, ar_count = ar.astype(jnp.float32), jnp.sum(ar, dtype=jnp.float32)
            mdm_weights = jnp.where(mdm, level / response_length, 0.0)
        else:
            ar_weights, mdm_weights = (
                jnp.where(chosen, 1.0 / jnp.maximum(count_in_segment(chosen, segment_ids), 1), 0.0)
                for chosen in (ar, mdm)
            )
            ar_count = count
        return {
            "ar": Term(ar_weights, ar_count, jnp.float32(self.ar_weight)),
            "mdm": Term(mdm_weights, count, jnp.float32(self.mdm_weight)),
        }

    def _causal(self, key: jax.Array, batch: PackedBatch) -> jax.Array:
        """[batch, examples] bool: examples that stay clean and in their natural order."""
        draw = each(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, i), CAUSAL)))
        return draw(batch.example_ids) < self.causal_share

    def _draw(self, key: jax.Array, batch: PackedBatch, where: Layout) -> _Draws:
        """All that is random, from (key, example id) alone."""
        size_key, level_key, mask_key, order_key = example_keys(key, batch, 4)
        sizes = jnp.asarray(self.slot_sizes, jnp.int32)
        size = where.of_example(sizes[each(lambda k: jax.random.randint(k, (), 0, len(sizes)))(size_key)])
        # For every token from its slot's index, so that a slot's numbers do not depend on the shape of the row.
        slot = jnp.where(where.offset >= 0, where.offset // size, 0)
        draw = each(lambda k, s: jax.random.uniform(jax.random.fold_in(k, s)))
        return _Draws(
            size=size,
            t=where.of_example(each(jax.random.uniform)(level_key)),
            slot=slot,
            mask=draw(where.of_example(mask_key), slot),
            order=draw(where.of_example(order_key), slot),
        )

    def _masked(self, where: Layout, draws: _Draws) -> jax.Array:
        """[batch, length] bool: tokens of the slots that are masked."""
        in_response = where.offset >= 0
        if self.masking == "released":
            return in_response & (draws.mask < draws.q)
        index = jnp.arange(where.offset.shape[1])
        first = index - jnp.where(in_response, where.offset % draws.size, 0)
        draw = jnp.where(in_response & (first == index), draws.mask, jnp.inf)
        slots = -(-where.response_length // draws.size)
        chosen = jnp.floor(draws.t * slots).astype(jnp.int32)
        return in_response & (rank_of_group(draw, where.segment_ids, first) < chosen)


def _buffer_order(where: Layout, draws: _Draws, masked: jax.Array, clean: jax.Array) -> jax.Array:
    """Index [batch, length] of the token that comes at each place of the buffer.

    Examples as they stand; in each the prompt, clean slots by their draw, masked slots by position; padding last. The
    sort is stable, so tokens of one slot keep their order.
    """
    padding = where.segment_ids == 0
    group = jnp.where(padding, 3, jnp.where(masked, 2, jnp.where(clean, 1, 0)))
    segment = jnp.where(padding, jnp.iinfo(jnp.int32).max, where.segment_ids)
    index = jnp.broadcast_to(jnp.arange(padding.shape[1]), padding.shape)
    keys = (segment, group, jnp.where(clean, draws.order, 0.0), jnp.where(clean, draws.slot, 0))
    return jax.lax.sort((*keys, index), dimension=1, is_stable=True, num_keys=len(keys))[-1]
