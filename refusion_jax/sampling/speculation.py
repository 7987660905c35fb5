"""Fewer forwards for the same tokens: chunks that a plan-and-infill window carries because they may be needed next.

    plan       the next plan, right if every main token up to the first stop id is committed; sees those tokens
    guess      a chosen slot cut where its draft may be rejected: the predict forward that would follow. When it
               predicts what was verified already, that verify is known too, and completion goes on to the next
               rejected token at once

Letters as in plan_and_infill.py, whose functions call these.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.sampling.reduction import Seen
from refusion_jax.sampling.slots import Row
from refusion_jax.sampling.state import first

if TYPE_CHECKING:
    from refusion_jax.sampling.plan_and_infill import PlanAndInfill


@struct.dataclass
class Carried:
    """Chunks that may be needed next."""

    plan: jax.Array  # [n] bool: slots of the next plan
    next_block: jax.Array  # bool: it is the next block's
    guess: jax.Array  # [n, k] bool: slot and cut
    likely: jax.Array  # [n, k] bool: guesses that come first


@struct.dataclass
class Guess:
    """What the guesses of a window saw."""

    seen: Seen  # leaves [n, k, k]: slot, cut, token
    there: jax.Array  # [n, k] bool: guesses that the window had room for


def carry(
    sampler: "PlanAndInfill",
    row: Row,
    main: jax.Array,
    stop_at: jax.Array,
    stop_slot: jax.Array,
    drafted: jax.Array,
) -> Carried:
    """What a row's window carries besides its main chunks.

    Args:
      main: [n] bool, slots with a main chunk.
      stop_at: [n] index of the first stop id in each slot's fill; k: none.
      stop_slot: the first main slot with one; n: none.
      drafted: bool, whether main chunks are drafts, so that there is something to guess.
    """
    n, k = sampler.slots, sampler.slot_size
    slot, column = jnp.arange(n), jnp.arange(k)

    holes = sampler.holes(row)
    ended = (stop_slot < n) & (holes == holes[stop_slot % n]) & (slot >= stop_slot)
    after = row.remaining & ~(main & (slot <= stop_slot)) & ~ended
    open_next = sampler.open_slots(row.settings, row.closed)[jnp.minimum(row.block + 1, sampler.blocks - 1)]
    next_block = ~after.any() & (stop_slot == n) & open_next.any() & (row.block + 1 < sampler.blocks)
    plan = jnp.where(next_block, open_next, after) & drafted & ~row.predicting.any()
    plan &= main.sum() + plan.sum() <= sampler.chunks

    # Every place a draft may be rejected at, the likely ones (low confidence) first, in the order they are met.
    unsure = row.chosen & ~row.predicting & (row.prefix < k) & (stop_at >= row.prefix) & drafted
    guess = unsure[:, None] & (column > row.prefix[:, None])
    return Carried(plan, next_block, guess, likely=row.confidence <= row.settings.own["token_threshold"])


def follow(
    fill: jax.Array, rejected: jax.Array, guess: Guess, alone: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """How far the verify of each slot leads when guesses are followed.

    Where a guess predicts again what was verified up to the next rejected token, the verify that would follow is known:
    it stops at that token. So a slot stops at the first rejected token whose guess does not do so.

    Args:
      fill: [n, k] ids that were verified.
      rejected: [n, k] bool.
      guess: what the guesses saw.
      alone: [n] bool, slots that saw only what they see in a completion.

    Returns:
      (stop, guessed, top, top_prob): [n] tokens accepted, [n] bool whether a guess predicted behind them, and what it
      predicted, [n, k] ids and probabilities.
    """
    k = fill.shape[1]
    column = jnp.arange(k)
    repeated = first((guess.seen.top != fill[:, None]) & (column >= column[:, None]))  # [n, k] by cut
    following = first(rejected[:, None] & (column > column[:, None]))
    known = guess.there & ((repeated > following) | (repeated == k)) & alone[:, None]
    stop = first(rejected & ~known)
    here = jnp.minimum(stop, k - 1)[:, None]
    guessed = jnp.take_along_axis(guess.there, here, axis=1)[:, 0]
    at_stop = lambda x: jnp.take_along_axis(x, here[:, None], axis=1)[:, 0]
    return stop, guessed, at_stop(guess.seen.top), at_stop(guess.seen.top_prob)
