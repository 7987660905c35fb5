"""How probable a model of a diffusion objective holds answers: estimates of bounds, and exactly where that can be had.

    Masked   the fixed-count estimator of LLaDA's code: so many masks in an answer, each number as likely
    Block    the bound of its objective, of levels and masks drawn many times; blocks of one token: exactly
    Sedd, and Masked with a divergence for a loss    the bound of the objective

Autoregressive models and ReFusion's are exact, in one pass: evaluation/likelihood.py. A bound is below the logarithm of
the probability; more draws make an estimate of it less noisy and no higher.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.errors import UserError
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.objective.block import Block
from refusion_jax.objective.common import Inputs, PackedBatch, sums_per_example
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.sedd import Sedd

WIDTH = 64  # rows are padded to a multiple


def log_likelihood(
    objective: Masked | Block | Sedd,
    model: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    samples: int = 128,
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    numbers: Sequence[int] | None = None,
) -> np.ndarray:
    """Estimates of log p(answer | prompt), in nats, [answers] float64; no normalisation by length.

    Args:
      params: as `model.scan_layers` wants them.
      key: an answer's draws are from it and the answer's number alone.
      samples: corrupted copies of an answer, a multiple of batch_size; where there is nothing random, one is taken.
      cfg_scale: classifier-free guidance, of Masked's cross-entropy only: logits are those without the prompt, moved
        (1 + scale) times as far as the prompt moves them.
      numbers: of the answers; default: 0, 1, 2, ..

    Raises:
      UserError: the objective has no bound, or samples, guidance and objective do not fit together.
    """
    counted = isinstance(objective, Masked) and objective.loss == "cross_entropy"
    _check(objective, samples, batch_size, cfg_scale, counted)
    exact = isinstance(objective, Block) and objective.block_size == 1
    found = np.zeros(len(answers))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        once = exact or (counted and len(answer) == 1)
        rows, passes = (1, 1) if once else (batch_size, samples // batch_size)
        tokens = np.zeros((1, -(-(len(prompt) + len(answer)) // WIDTH) * WIDTH), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        of_answer = jax.random.fold_in(key, index if numbers is None else numbers[index])
        lengths = np.int32(len(prompt)), np.int32(len(prompt) + len(answer))
        for i in range(passes):
            draw = jax.random.fold_in(of_answer, i)
            if counted:
                found[index] -= _counted(objective, model, rows, cfg_scale, params, tokens, *lengths, draw) / passes
            else:
                found[index] -= _bound(conditional(objective), model, rows, params, tokens, *lengths, draw) / passes
    return found


def _check(objective: Any, samples: int, batch_size: int, cfg_scale: float, counted: bool) -> None:
    if not isinstance(objective, Masked | Block | Sedd):
        raise UserError(
            f"The objective {objective.kind!r} has exact likelihoods, which are in refusion_jax.evaluation.likelihood; "
            "here are estimates for masked, block and sedd."
        )
    if isinstance(objective, Masked) and (objective.schedule == "spindle" or objective.loss == "diffusionbert"):
        raise UserError(
            "objective.schedule = 'spindle' masks by the frequencies of the true tokens, so its loss bounds no "
            "likelihood. Evaluate the model as one trained with schedule = 'linear'."
        )
    if samples < 1 or batch_size < 1 or samples % batch_size:
        raise UserError(
            f"samples = {samples} is not a positive multiple of batch_size = {batch_size}, the copies that are "
            "forwarded together; choose one that is."
        )
    if cfg_scale and not counted:
        raise UserError(
            f"cfg_scale is {cfg_scale}, but guidance is defined for the objective 'masked' with cross-entropy only; "
            "leave it at 0."
        )


def conditional(objective: Masked | Block | Sedd) -> Masked | Block | Sedd:
    """The objective whose sum is the bound of a response, given its prompt: each block with a level of its own, the
    whole interval of levels, no weights but the bound's.
    """
    if isinstance(objective, Sedd):
        return Sedd(maskable="response", norm="token")
    if isinstance(objective, Masked):
        return dataclasses.replace(objective, maskable="response", norm="token")
    whole = {"clip": (1.0, 1.0)} if objective.block_size == 1 else {"level": "block", "stratified": True}
    return Block(block_size=objective.block_size, softmax=objective.softmax, **whole)


@functools.partial(jax.jit, static_argnums=(0, 1))
def bounds(objective: Any, model: ModelConfig, params: dict, inputs: Inputs) -> jax.Array:
    """Sum of weights * loss of each row, [rows] float32, in nats where the objective's norm is token; D3PM's clean rows
    count to the rows that they are copies of.
    """
    sums = sum(sums_per_example(model, objective, params, inputs, examples=1).values())[:, 0]
    return sums.reshape(len(inputs.terms), -1).sum(axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _bound(objective, model, rows, params, tokens, prompt_length, length, key) -> jax.Array:
    """Mean over rows of the bound of one answer, with as many draws."""
    column = lambda value: jnp.full((rows, 1), value, jnp.int32)
    ids = jax.random.bits(key, (rows, 1), jnp.uint32)
    batch = PackedBatch(jnp.tile(tokens, (rows, 1)), column(prompt_length), column(length), ids)
    return jnp.mean(bounds(objective, model, params, objective.corrupt(key, batch, model, jnp.inf)))


def stratified_counts(k: jax.Array, answer: jax.Array, rows: int) -> jax.Array:
    """[rows] int32, numbers of masks from 1 to `answer`: k and others at equal distances behind it, round the end."""
    steps = k + jnp.arange(rows) * (answer / jnp.float32(rows))
    return ((jnp.round(steps).astype(jnp.int32) - 1) % answer) + 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _counted(objective, model, rows, cfg_scale, params, tokens, prompt_length, length, key) -> jax.Array:
    """LLaDA's estimate of -log p from one iteration: a random subset of the answer in every row."""
    first, rest = jax.random.split(key)
    answer = length - prompt_length
    counts = stratified_counts(jax.random.randint(first, (), 1, answer + 1), answer, rows)
    place = jnp.arange(tokens.shape[1])
    inside = (place >= prompt_length) & (place < length)
    number = jnp.where(inside, jax.random.uniform(rest, (rows, tokens.shape[1])), jnp.inf)
    masked = inside & (jnp.argsort(jnp.argsort(number, axis=1), axis=1) < counts[:, None])
    return counted_loss(objective, model, cfg_scale, params, tokens, prompt_length, length, masked)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def counted_loss(
    objective: Masked,
    model: ModelConfig,
    cfg_scale: float,
    params: dict,
    tokens: jax.Array,
    prompt_length: jax.Array,
    length: jax.Array,
    masked: jax.Array,
) -> jax.Array:
    """Mean over rows of (answer / number of masks) * cross-entropy at the masks, a scalar.

    Args:
      tokens: [1, width] prompt, answer and padding.
      masked: [rows, width] bool.
    """
    chex.assert_shape(tokens, (1, masked.shape[1]))
    rows, width = masked.shape
    place = jnp.broadcast_to(jnp.arange(width), (rows, width))
    context = Packed((place < length).astype(jnp.int32), see="all", implementation=model.attention)

    def hidden_of(tokens):
        return Qwen3(model).apply({"params": params}, tokens, place, context)[0]

    noisy = jnp.where(masked, model.mask_token_id, tokens)
    hidden = hidden_of(noisy)
    if cfg_scale:  # logits are linear in hidden states
        without = hidden_of(jnp.where(place < prompt_length, model.mask_token_id, noisy))
        hidden = without + (1 + cfg_scale) * (hidden - without)
    weights = jnp.where(masked, (length - prompt_length) / masked.sum(axis=1, keepdims=True), 0.0)
    targets = jnp.broadcast_to(tokens, masked.shape)
    if objective.alignment == "shift":
        weights, targets = (jnp.roll(x, -1, axis=1) for x in (weights, targets))
    losses = over_vocabulary(model, params, hidden, functools.partial(objective.per_token, model), targets)
    return jnp.sum(jnp.where(weights > 0, weights * losses.loss, 0.0)) / rows
