"""What all objectives share: the batch they are given, what they make of it, and the sums over tokens.

An objective is a frozen dataclass whose fields are its settings (`config.objective`), with

    corrupt(key, batch, model, step) -> Inputs      what the model sees and has to predict
    per_token(model, logits, targets) -> TokenLoss  of logits [tokens, vocab], for `over_vocabulary`; Inputs.level, if
                                                    it is there, is a fourth argument
    needs_mask_token                                whether the model must have a mask token
    bidirectional                                   whether a token sees what comes after it in its example
    work(lengths) -> Work                           what an example of so many tokens puts through the model, for each
                                                    of lengths, float32 of any shape

The loss is the sum over terms of scale * sum(weights * loss of the token) / max(denominator, 1).
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3


@struct.dataclass
class PackedBatch:
    """Rows of whole examples (prompt, then response with its EOS) laid end to end, then padding.

    Attributes:
      tokens: [batch, length] int32.
      prompt_lengths: [batch, examples] int32.
      lengths: [batch, examples] int32, prompt and response; 0: no example.
      example_ids: [batch, examples] uint32; one id for one pass over one example.
      first_positions: [batch, examples] int32, position of each example's first token; None: 0.
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    example_ids: jax.Array
    first_positions: jax.Array | None = None


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

    @property
    def length(self) -> jax.Array:
        """Prompt and response of the token's example."""
        return self.positions - self.offset + self.response_length

    def of_example(self, values: jax.Array) -> jax.Array:
        """[batch, length]: for every token what [batch, examples] says of its example; of padding what of the first."""
        return jnp.take_along_axis(values, jnp.maximum(self.segment_ids - 1, 0), axis=1)


@struct.dataclass
class Term:
    """One term of the loss.

    Attributes:
      weights: [batch, length] float32, 0 where the term has no target.
      denominator: scalar float32, a count over the global batch.
      scale: scalar float32, the term's weight in the loss.
    """

    weights: jax.Array
    denominator: jax.Array
    scale: jax.Array

    def numerator(self, loss: jax.Array) -> jax.Array:
        """Weighted sum of a loss [batch, length]; a token without weight gives exactly 0 whatever its loss is."""
        return jnp.sum(self.weighted(loss))

    def weighted(self, loss: jax.Array) -> jax.Array:
        return jnp.where(self.weights > 0, self.weights * loss, 0.0)


@struct.dataclass
class Inputs:
    """What an objective hands to the training step; arrays are [batch, length] in buffer order.

    Every array in it has the batch as its first axis, or is the same for all rows (a scalar, or a first axis of 1), so
    that it can be split into microbatches.

    Attributes:
      tokens, positions: the model's input.
      context: what a token sees, one of model/attention.py's; it has `segment_ids` [batch, length].
      targets: int32; meaningful where a term has weight. Where they, and with them weights and level, are shorter than
        the tokens, they are of the first ones, and the rest is only seen.
      level: float32, what the loss of a token depends on besides, [batch, length, ...]; None: nothing.
      terms: the loss terms by name, which metrics carry too.
    """

    tokens: jax.Array
    positions: jax.Array
    context: Any
    targets: jax.Array
    terms: dict[str, Term]
    level: jax.Array | None = None


@struct.dataclass
class TokenLoss:
    """Per token: loss [batch, length] float32 (natural log) and correct [batch, length] bool (argmax = target)."""

    loss: jax.Array
    correct: jax.Array


def layout(batch: PackedBatch) -> Layout:
    """Layout of a packed batch, from the lengths of its examples."""
    chex.assert_rank([batch.tokens, batch.lengths], 2)
    chex.assert_equal_shape([batch.prompt_lengths, batch.lengths, batch.example_ids])
    chex.assert_equal_shape_prefix([batch.tokens, batch.lengths], 1)
    chex.assert_type([batch.tokens, batch.lengths, batch.example_ids], [jnp.int32, jnp.int32, jnp.uint32])
    index = jnp.arange(batch.tokens.shape[1])
    ends = jnp.cumsum(batch.lengths, axis=1)
    example = jax.vmap(lambda e: jnp.searchsorted(e, index, side="right"))(ends)  # == examples: padding
    padding = index[None] >= ends[:, -1:]

    def of_example(values):
        return jnp.take_along_axis(values, jnp.minimum(example, values.shape[1] - 1), axis=1)

    positions = jnp.where(padding, 0, index[None] - of_example(ends - batch.lengths))
    prompt = of_example(batch.prompt_lengths)
    return Layout(
        segment_ids=jnp.where(padding, 0, example + 1).astype(jnp.int32),
        positions=positions.astype(jnp.int32),
        offset=jnp.where(padding, -1, positions - prompt),
        response_length=jnp.where(padding, 1, of_example(batch.lengths) - prompt),
    )


def example_keys(key: jax.Array, batch: PackedBatch, count: int) -> tuple[jax.Array, ...]:
    """`count` keys [batch, examples] for each example, from (key, example id) alone."""
    keys = each(lambda i: jax.random.split(jax.random.fold_in(key, i), count))(batch.example_ids)
    return tuple(jnp.moveaxis(keys, -1, 0))


def each(function: Callable) -> Callable:
    """A function of scalars or keys, of arrays [batch, n] of them."""
    return jax.vmap(jax.vmap(function))


def with_first_positions(inputs: Inputs, batch: PackedBatch) -> Inputs:
    """Inputs made of a batch, with positions that begin at the batch's `first_positions`."""
    if batch.first_positions is None:
        return inputs
    chex.assert_equal_shape([batch.first_positions, batch.lengths])
    first = jnp.pad(batch.first_positions, ((0, 0), (1, 0)))  # segment 0 is padding
    return inputs.replace(positions=inputs.positions + jnp.take_along_axis(first, inputs.context.segment_ids, axis=1))


def count_in_segment(chosen: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[batch, length] bool -> for every token the number of chosen ones in its segment. A row is one sum by segment."""
    length = chosen.shape[1]
    counts = jax.vmap(lambda c, s: jax.ops.segment_sum(c.astype(jnp.int32), s, num_segments=length + 1))(
        chosen, segment_ids
    )
    return jnp.take_along_axis(counts, segment_ids, axis=1)


def normaliser(
    norm: str, where: Layout, trainable: jax.Array, trained: jax.Array, examples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a sum of losses is divided by.

    Args:
      norm: token (trainable tokens of the batch), masked (trained ones of the batch), batch (examples), sequence (an
        example's own trainable tokens, then examples) or masked_sequence (its own trained tokens, then examples).
      trainable, trained: [batch, length] bool, tokens that could be targets, and those that are.
      examples: scalar float32, of the batch.

    Returns:
      (denominator, what a token's weight is divided by besides, [batch, length] or a scalar).
    """
    if norm in ("token", "masked"):
        return jnp.sum(trainable if norm == "token" else trained, dtype=jnp.float32), jnp.ones_like(examples)
    if norm == "batch":
        return examples, jnp.ones_like(examples)
    counted = trainable if norm == "sequence" else trained
    return examples, jnp.maximum(count_in_segment(counted, where.segment_ids), 1)


def rank_of_group(draw: jax.Array, segment_ids: jax.Array, first: jax.Array) -> jax.Array:
    """Rank [batch, length] of each token's group (slot, block) among those of its example.

    Args:
      draw: [batch, length] float32, the group's draw at its first token, inf elsewhere.
      segment_ids: [batch, length] int32.
      first: [batch, length] int32, index of the first token of the token's group.
    """
    index = jnp.broadcast_to(jnp.arange(draw.shape[1]), draw.shape)
    segments, _, order = jax.lax.sort((segment_ids, draw, index), dimension=1, num_keys=2)
    rank = index - jax.vmap(lambda s: jnp.searchsorted(s, s, side="left"))(segments)
    rows = jnp.arange(draw.shape[0])[:, None]
    rank = jnp.zeros_like(index).at[rows, order].set(rank)
    return jnp.take_along_axis(rank, first, axis=1)


def without_mask(model: ModelConfig, logits: jax.Array) -> jax.Array:
    """Logits [tokens, vocab] with none for the mask."""
    return jnp.where(jnp.arange(logits.shape[-1]) == model.mask_token_id, -jnp.inf, logits)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> TokenLoss:
    """Of targets [tokens] under logits [tokens, vocab], in float32."""
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return TokenLoss(jax.nn.logsumexp(logits, axis=-1) - target, target >= jnp.max(logits, axis=-1))


def token_losses(model: ModelConfig, objective: Any, variables: dict, inputs: Inputs) -> TokenLoss:
    """Loss and correctness of every target, [batch, length of targets], from one forward pass.

    Args:
      objective: see the module.
      variables: {"params": the model's, as `model.scan_layers` wants them} and, with adapters, "lora".
    """
    hidden, _ = Qwen3(model).apply(variables, inputs.tokens, inputs.positions, inputs.context)
    hidden = hidden[:, : inputs.targets.shape[1]]
    per_token = functools.partial(objective.per_token, model)
    of_tokens = (inputs.targets,) if inputs.level is None else (inputs.targets, inputs.level)
    return over_vocabulary(model, variables["params"], hidden, per_token, *of_tokens)


def sums_per_example(
    model: ModelConfig, objective: Any, params: dict, inputs: Inputs, examples: int
) -> dict[str, jax.Array]:
    """For every term the sum of weights * loss over the tokens of each example, [batch, examples] float32.

    Args:
      objective, params: as in `token_losses`.
      examples: examples in a row, at most; as in the PackedBatch that `inputs` are of.
    """
    losses = token_losses(model, objective, {"params": params}, inputs)

    def of_row(values, segments):
        return jax.ops.segment_sum(values, segments, num_segments=examples + 1)[1:]

    segment_ids = inputs.context.segment_ids[:, : inputs.targets.shape[1]]
    return {name: jax.vmap(of_row)(term.weighted(losses.loss), segment_ids) for name, term in inputs.terms.items()}
