"""How probable a model holds a continuation after a context: exactly, in the order in which its method writes.

    autoregressive    token by token: what any left-to-right model says
    plan_and_infill   slot by slot from left to right: a slot's first token from its mask given all slots before it, the
                      others token by token inside the slot

Both are products of probabilities that sum to 1 over the continuations of a length, and both are predictions that
training asked for: ReFusion's model never learnt a slot's first token from the token before it (method section 2), so
the plain left-to-right product would be about something else. One forward pass of every text is enough: the clean
tokens, each seeing those before it, and one mask for each slot that sees the clean tokens before the slot.

Other methods have a bound from below, an estimate from draws (objective/likelihood.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError
from refusion_jax.model.attention import TwoStream
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.objective import likelihood as bounds
from refusion_jax.objective.common import cross_entropy
from refusion_jax.parallel import sharding
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.programs import decode_model

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, which is not empty, and of its continuation
WIDTH = 64  # rows are padded to a power of two times this
EXACT = ("autoregressive", "plan_and_infill")


@struct.dataclass
class Rows:
    """Texts as one forward takes them; all [batch, length].

    Attributes:
      tokens: context and continuation, then the masks, then padding.
      positions: in context and continuation; of a mask, of the slot's first token.
      segment_ids: 0 for padding.
      clean: bool, no mask.
      targets: what is predicted here; counted: bool, whether anything is.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    clean: Any
    targets: Any
    counted: Any


def check(decoder: Decoder, config: SamplerConfig, pairs: Sequence[Pair]) -> None:
    """Raises a UserError if the method of `config` has no likelihood, or a text is longer than the model allows."""
    bounded = isinstance(decoder.objective, bounds.Masked | bounds.Block | bounds.Sedd)
    if config.method not in EXACT and not bounded:
        raise UserError(
            f"The method {config.method} gives no probability of a text, which this task asks for. Use one of "
            f"{', '.join(EXACT)} where the model can be decoded so, or a task whose answers are generated."
        )
    for index, (context, continuation) in enumerate(pairs):
        if len(context) + len(continuation) > decoder.model.max_position_embeddings:
            raise UserError(
                f"Text {index} has {len(context) + len(continuation)} tokens, more than the model's "
                f"{decoder.model.max_position_embeddings} positions; shorten it."
            )


def log_likelihoods(
    decoder: Decoder,
    config: SamplerConfig,
    pairs: Sequence[Pair],
    batch_size: int = 8,
    samples: int = 128,
    numbers: Sequence[int] | None = None,
) -> list[tuple[float, bool]]:
    """For each pair the log probability of the continuation, and whether every token of it is the most probable one.

    Args:
      samples: draws of a bound, rounded up to whole batches. With one, nobody knows what is most probable: False.
      numbers: of the pairs, on which a bound's draws depend; default: 0, 1, 2, ..

    Raises:
      UserError: as `check`.
    """
    check(decoder, config, pairs)
    if config.method not in EXACT:
        return _bounds(decoder, pairs, batch_size, samples, numbers)
    slot = getattr(config, "slot_size", 0)
    shards = decoder.mesh.shape["data"] * decoder.mesh.shape["fsdp"]
    batch_size = -(-batch_size // shards) * shards
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    score = _program(decoder.model, decoder.mesh)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = _rows([pairs[i] for i in chosen], batch_size, slot, decoder.model.mask_token_id)
        sums, greedy = jax.device_get(score(decoder.params, rows))
        for row, i in enumerate(chosen):
            results[i] = float(sums[row]), bool(greedy[row])
    return results


def _bounds(
    decoder: Decoder, pairs: Sequence[Pair], batch_size: int, samples: int, numbers: Sequence[int] | None
) -> list[tuple[float, bool]]:
    model = decode_model(decoder.model, decoder.mesh)
    prompts, answers = [context for context, _ in pairs], [continuation for _, continuation in pairs]
    found = bounds.log_likelihood(
        decoder.objective,
        model,
        decoder.params,
        prompts,
        answers,
        jax.random.key(0),
        samples=-(-samples // batch_size) * batch_size,
        batch_size=batch_size,
        numbers=numbers,
    )
    return [(float(value), False) for value in found]


def _rows(pairs: Sequence[Pair], batch: int, slot: int, mask_id: int | None) -> Rows:
    """Rows of a batch, on the host.

    Args:
      slot: tokens of a slot; 0: the first token of the continuation is predicted by the last one of the context.
    """
    masks = [len(range(0, len(continuation), slot)) if slot else 0 for _, continuation in pairs]
    longest = max(len(c) + len(r) + m for (c, r), m in zip(pairs, masks))
    length = WIDTH * (1 << max(0, -(-longest // WIDTH) - 1).bit_length())
    zeros = lambda dtype: np.zeros((batch, length), dtype)
    rows = Rows(zeros(np.int32), zeros(np.int32), zeros(np.int32), zeros(bool), zeros(np.int32), zeros(bool))
    for row, (context, continuation) in enumerate(pairs):
        at, total = len(context), len(context) + len(continuation)
        starts = np.arange(at, total, slot) if slot else np.empty(0, int)
        end = total + len(starts)
        rows.tokens[row, :total] = [*context, *continuation]
        rows.tokens[row, total:end] = mask_id or 0
        rows.positions[row, :end] = [*range(total), *starts]
        rows.segment_ids[row, :end] = 1
        rows.clean[row, :total] = True
        rows.targets[row, at - 1 : total - 1] = continuation
        rows.counted[row, at - 1 : total - 1] = True
        rows.counted[row, starts - 1] = False
        rows.targets[row, total:end] = rows.tokens[row, starts]
        rows.counted[row, total:end] = True
    return rows


@functools.cache
def _program(model: ModelConfig, mesh: Any) -> sharding.OnMesh:
    return sharding.OnMesh(mesh, sharding.DECODE_RULES, functools.partial(_score, decode_model(model, mesh)))


def _score(model: ModelConfig, params: dict, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(log probability, whether it is the greedy one) of each row, [batch]."""
    chex.assert_equal_shape(jax.tree.leaves(rows))
    # Of blocks of one token: a clean one sees itself and those before it, a mask itself and the clean ones before it.
    context = TwoStream(rows.segment_ids, rows.positions, rows.clean)
    hidden, _ = Qwen3(model).apply({"params": params}, rows.tokens, rows.positions, context)
    found = over_vocabulary(model, params, hidden, cross_entropy, rows.targets)
    total = -jnp.sum(jnp.where(rows.counted, found.loss, 0.0), axis=1)
    return total, jnp.all(found.correct | ~rows.counted, axis=1)
