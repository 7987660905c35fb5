"""Slot corruption: from packed examples to what the model sees and has to predict (method section 2).

Runs on the device inside the jitted step. All randomness of an example comes from (key, example id) alone, so one pass
over an example is corrupted the same way in whatever row, batch, microbatch or device it lands.
"""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.config import ObjectiveConfig

Q_MIN = 1e-3  # smallest masking probability


@struct.dataclass
class PackedBatch:
    """Rows of whole examples (prompt, then response with its EOS) laid end to end, then padding.

    Attributes:
      tokens: [batch, length] int32.
      prompt_lengths: [batch, examples] int32.
      lengths: [batch, examples] int32, prompt and response; 0: no example.
      example_ids: [batch, examples] uint32; one id for one pass over one example.
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    example_ids: jax.Array


@struct.dataclass
class Term:
    """One term of the loss: sum(weights * cross_entropy) / max(denominator, 1).

    Attributes:
      weights: [batch, length] float32, 0 where the term has no target.
      denominator: scalar float32, a count over the global batch.
    """

    weights: jax.Array
    denominator: jax.Array


@struct.dataclass
class Denoising:
    """What an objective hands to the training step; every array is [batch, length] in buffer order.

    Attributes:
      tokens, positions, segment_ids: the model's input; segment 0 is padding.
      targets: int32; meaningful where a term has weight.
      terms: the loss terms by name.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    targets: jax.Array
    terms: dict[str, Term]


@struct.dataclass
class Layout:
    """Where every token of a packed row stands; all [batch, length].

    Attributes:
      segment_ids: 1-based index of the token's example in its row, 0 for padding.
      positions: index in prompt + response.
      offset: index in the response, negative in the prompt.
      response_length: of the token's example.
    """

    segment_ids: jax.Array
    positions: jax.Array
    offset: jax.Array
    response_length: jax.Array


def layout(batch: PackedBatch) -> Layout:
    """Layout of a packed batch, from the lengths of its examples."""
    index = jnp.arange(batch.tokens.shape[1])
    ends = jnp.cumsum(batch.lengths, axis=1)
    example = jax.vmap(lambda e: jnp.searchsorted(e, index, side="right"))(ends)  # == examples: padding
    padding = index[None] >= ends[:, -1:]
    of = lambda values: jnp.take_along_axis(values, jnp.minimum(example, values.shape[1] - 1), axis=1)
    positions = jnp.where(padding, 0, index[None] - of(ends - batch.lengths))
    prompt = of(batch.prompt_lengths)
    return Layout(
        segment_ids=jnp.where(padding, 0, example + 1).astype(jnp.int32),
        positions=positions.astype(jnp.int32),
        offset=jnp.where(padding, -1, positions - prompt),
        response_length=jnp.where(padding, 1, of(batch.lengths) - prompt),
    )


def corrupt(key: jax.Array, batch: PackedBatch, config: ObjectiveConfig, mask_token_id: int) -> Denoising:
    """Cuts responses into slots, masks some, permutes the clean ones and moves the masked ones behind them.

    Args:
      key: PRNG key of the run.
      batch: the packed examples.
      config: masking, normalisation, slot sizes and the weight cap.
      mask_token_id: what masked tokens become.

    Returns:
      The corrupted batch with the terms "ar" and "mdm" (method sections 2 and 3). Padding stays at the end of a row.
    """
    where = layout(batch)
    example = jnp.maximum(where.segment_ids - 1, 0)
    index = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    padding = where.segment_ids == 0
    in_response = where.offset >= 0

    # Per example: slot size and masking level, gathered to its tokens.
    keys = jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(batch.example_ids)
    size_key, level_key, mask_key, order_key = jnp.moveaxis(
        jax.vmap(jax.vmap(lambda k: jax.random.split(k, 4)))(keys), -1, 0
    )
    sizes = jnp.asarray(config.slot_sizes, jnp.int32)
    size = sizes[jax.vmap(jax.vmap(lambda k: jax.random.randint(k, (), 0, len(config.slot_sizes))))(size_key)]
    t = jax.vmap(jax.vmap(jax.random.uniform))(level_key)
    of = lambda values: jnp.take_along_axis(values, example, axis=1)
    size, t = of(size), of(t)
    q = (1 - Q_MIN) * t + Q_MIN

    # Per slot: one number that decides about masking, one that decides about order. Drawn for every token from its
    # slot's index, so that they do not depend on the shape of the row.
    slot = jnp.where(in_response, where.offset // size, 0)
    draw = jax.vmap(jax.vmap(lambda k, s: jax.random.uniform(jax.random.fold_in(k, s))))
    mask_draw, order_draw = draw(of(mask_key), slot), draw(of(order_key), slot)
    if config.masking == "released":
        masked = in_response & (mask_draw < q)
    else:
        slots = -(-where.response_length // size)
        first = index - jnp.where(in_response, where.offset % size, 0)
        rank = _rank_of_slot(jnp.where(in_response & (first == index), mask_draw, jnp.inf), where.segment_ids, first)
        masked = in_response & (rank < jnp.floor(t * slots).astype(jnp.int32))
    clean = in_response & ~masked

    # Buffer order: examples as they stand; in each prompt, clean slots by their draw, masked slots by position.
    # The sort is stable, so tokens of one slot keep their order.
    group = jnp.where(padding, 3, jnp.where(masked, 2, jnp.where(clean, 1, 0)))
    segment_order = jnp.where(padding, jnp.iinfo(jnp.int32).max, where.segment_ids)
    *_, order = jax.lax.sort(
        (segment_order, group, jnp.where(clean, order_draw, 0.0), jnp.where(clean, slot, 0), index),
        dimension=1,
        is_stable=True,
        num_keys=4,
    )
    moved = lambda values: jnp.take_along_axis(values, order, axis=1)

    # Targets in original order: a clean token predicts its successor in the same slot, a mask its own token.
    successor = jnp.roll(batch.tokens, -1, axis=1)
    has_successor = clean & ((where.offset + 1) % size != 0) & (where.offset + 1 < where.response_length)
    targets = jnp.where(masked, batch.tokens, jnp.where(has_successor, successor, 0))
    terms = loss_terms(
        ar=has_successor,
        mdm=masked,
        q=q,
        response_length=where.response_length,
        segment_ids=where.segment_ids,
        examples=jnp.sum(batch.lengths > 0),
        config=config,
    )
    return Denoising(
        tokens=moved(jnp.where(masked, mask_token_id, batch.tokens)),
        positions=moved(where.positions),
        segment_ids=moved(where.segment_ids),
        targets=moved(targets),
        terms={name: term.replace(weights=moved(term.weights)) for name, term in terms.items()},
    )


def loss_terms(*, ar, mdm, q, response_length, segment_ids, examples, config: ObjectiveConfig) -> dict[str, Term]:
    """Weights and denominators of the two terms (table of method section 3).

    Args:
      ar, mdm: [batch, length] bool, tokens with an autoregressive target and masked tokens.
      q: [batch, length] float32, masking probability of the token's example.
      response_length: [batch, length] int32, of the token's example.
      segment_ids: [batch, length] int32, of the token.
      examples: scalar, number of examples in the global batch.
      config: normalisation and the weight cap.
    """
    count = jnp.asarray(examples, jnp.float32)
    if config.normalisation == "released":
        level = 1 / q
        if config.mdm_weight_cap:
            level = jnp.minimum(level, config.mdm_weight_cap)
        return {
            "ar": Term(ar.astype(jnp.float32), jnp.sum(ar, dtype=jnp.float32)),
            "mdm": Term(jnp.where(mdm, level / response_length, 0.0), count),
        }
    return {
        name: Term(jnp.where(chosen, 1.0 / jnp.maximum(_count_in_segment(chosen, segment_ids), 1), 0.0), count)
        for name, chosen in (("ar", ar), ("mdm", mdm))
    }


def _count_in_segment(chosen: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[batch, length] bool -> for every token the number of chosen ones in its segment. A row is one sum by segment."""
    length = chosen.shape[1]
    counts = jax.vmap(lambda c, s: jax.ops.segment_sum(c.astype(jnp.int32), s, num_segments=length + 1))(
        chosen, segment_ids
    )
    return jnp.take_along_axis(counts, segment_ids, axis=1)


def _rank_of_slot(draw: jax.Array, segment_ids: jax.Array, first: jax.Array) -> jax.Array:
    """Rank [batch, length] of each token's slot among the slots of its example.

    Args:
      draw: [batch, length] float32, the slot's draw at its first token, inf elsewhere.
      segment_ids: [batch, length] int32.
      first: [batch, length] int32, index of the first token of the token's slot.
    """
    index = jnp.broadcast_to(jnp.arange(draw.shape[1]), draw.shape)
    segments, _, order = jax.lax.sort((segment_ids, draw, index), dimension=1, num_keys=2)
    rank = index - jax.vmap(lambda s: jnp.searchsorted(s, s, side="left"))(segments)
    rows = jnp.arange(draw.shape[0])[:, None]
    rank = jnp.zeros_like(index).at[rows, order].set(rank)
    return jnp.take_along_axis(rank, first, axis=1)
