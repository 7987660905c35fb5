"""Many prompts through a batch of fixed size: the compiled loop, refilling of finished rows, results as they come."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from refusion_jax.errors import UserError
from refusion_jax.model import flash
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.sampling.autoregressive import Autoregressive
from refusion_jax.sampling.config import Generation, SamplerConfig, Settings, check_prompts
from refusion_jax.sampling.plan_and_infill import PlanAndInfill

# Tokens a forward takes in about the time that reading the weights takes, on chips made for this. On a CPU every token costs.
FREE_TOKENS = 160


def make_sampler(model: ModelConfig, config: SamplerConfig, batch_size: int) -> PlanAndInfill | Autoregressive:
    """The static part of a decoding with these settings: what compiled programs are kept by."""
    if config.method == "autoregressive":
        return Autoregressive(model, config.gen_length)
    n, k = config.slots // config.blocks, config.slot_size
    carry = config.speculate != "off"
    free = 0 if flash.platform()[0] == "cpu" else FREE_TOKENS // batch_size
    tokens = {"off": 0, "auto": free, "on": max(FREE_TOKENS, 2 * n * k)}[config.speculate]
    chunks = max(n, (config.window or tokens) // k) if carry else n
    return PlanAndInfill(
        model, slots=n, slot_size=k, blocks=config.blocks, chunks=chunks, carry_plan=carry, carry_guesses=carry
    )


@functools.partial(jax.jit, static_argnames=("sampler", "batch", "cache_length"))
def empty(sampler, batch: int, cache_length: int):
    return sampler.empty(batch, cache_length).placed()


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="state")
def prefill(sampler, params, state, settings, rows, prompts, lengths, keys):
    return sampler.prefill(params, state, settings, rows, prompts, lengths, keys).placed()


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="state")
def run(sampler, params: dict, state, settings: Settings, max_steps: jax.Array, until_done: jax.Array):
    """Steps until `until_done` rows are done or `max_steps` have been made; returns the state and the steps made."""

    def go_on(carry):
        steps, state = carry
        return (steps < max_steps) & (jnp.sum(state.rows.done) < until_done)

    def body(carry):
        steps, state = carry
        return steps + 1, sampler.step(params, state, settings)

    steps, state = jax.lax.while_loop(go_on, body, (jnp.int32(0), state))
    return state.placed(), steps


def bucket(length: int) -> int:
    """Padded length of a prompt: 32, 64, 128, then multiples of 128."""
    return next((size for size in (32, 64) if length <= size), -(-length // 128) * 128)


@dataclasses.dataclass
class Report:
    """What a call of `stream` or `generate` did, filled in as it goes."""

    batch: int = 0
    window: int = 0  # tokens of a row's window
    cache_length: int = 0
    steps: int = 0  # forwards of the whole batch
    prefills: int = 0  # forwards over new prompts


def stream(
    params: dict,
    model: ModelConfig,
    config: SamplerConfig,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    start: int = 0,
    every: int = 0,
    max_prompt_length: int = 0,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> Iterator[Generation]:
    """Decodes prompts, a batch at a time, and yields each answer as it is finished.

    A finished row gets the next prompt at once: nothing is compiled again, no row waits for another. The tokens of a
    prompt depend on the prompt, the settings, the seed and the prompt's index only.

    Args:
      params: parameters of the model.
      prompts: ids of each prompt.
      batch_size: rows of the batch; a power of two that is enough when there are fewer prompts.
      start: index of the first prompt to decode; the answers are those of a call that decodes all.
      every: also yield what there is of every unfinished answer after every so many forwards; 0: never.
      max_prompt_length: make room for prompts of this length; 0: the longest given. Setting it keeps one compiled
        program over several calls.
      mesh: devices to decode on (rows over data x fsdp, weights over tensor).
      report: filled with counts.

    Raises:
      UserError: a prompt, the settings and the model do not fit together.
    """
    check_prompts(prompts, model, config)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    longest = max(map(len, prompts), default=0)
    if max_prompt_length and longest > max_prompt_length:
        raise UserError(
            f"Prompt {[len(p) > max_prompt_length for p in prompts].index(True)} has {longest} tokens, more than the "
            f"cache has room for beside the answer (max_prompt_length {max_prompt_length}); shorten it or raise "
            "max_prompt_length."
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    batch = min(batch_size, 1 << max(0, len(prompts) - start - 1).bit_length())
    batch = -(-batch // shards) * shards
    sampler, settings = make_sampler(model, config, batch), Settings.of(config)
    cache_length = bucket(max_prompt_length or longest) + config.length + sampler.window
    report = report if report is not None else Report()
    report.batch, report.window, report.cache_length = batch, sampler.window, cache_length
    root = jax.random.key(seed)

    with sharding.use(mesh, sharding.DECODE_RULES) if mesh else contextlib.nullcontext():
        state = empty(sampler, batch, cache_length)
        waiting = list(range(start, len(prompts)))[::-1]
        owner = [None] * batch  # which prompt each row decodes
        while waiting or any(prompt is not None for prompt in owner):
            free = [row for row in range(batch) if owner[row] is None]
            while waiting and free:
                # As many at once as the mesh has shards of rows; a row past the batch is padding.
                rows = [free.pop(0) for _ in range(min(shards, len(free), len(waiting)))]
                taken = [waiting.pop() for _ in rows]
                for row, index in zip(rows, taken):
                    owner[row] = index
                padded = np.zeros((shards, bucket(max(len(prompts[i]) for i in taken))), np.int32)
                for line, index in zip(padded, taken):
                    line[: len(prompts[index])] = prompts[index]
                spare = shards - len(rows)
                lengths = np.array([len(prompts[i]) for i in taken] + [1] * spare)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(root, np.array(taken + [0] * spare))
                state = prefill(
                    sampler, params, state, settings, np.array(rows + [batch] * spare), padded, lengths, keys
                )
                report.prefills += 1
            idle = sum(prompt is None for prompt in owner)
            state, steps = run(sampler, params, state, settings, every or 2**30, idle + 1)
            report.steps += int(steps)
            rows = jax.device_get(
                {
                    name: getattr(state.rows, name)
                    for name in ("done", "count", "tokens", "offsets", "rounds", "forwards", "tokens_forwarded")
                }
            )
            for row, index in enumerate(owner):
                finished = bool(rows["done"][row])
                if index is None or not (finished or every):
                    continue
                if finished:
                    owner[row] = None
                yield Generation.of(index, {name: value[row] for name, value in rows.items()}, model.eos_token_id)


def generate(
    params: dict, model: ModelConfig, config: SamplerConfig, prompts: Sequence[Sequence[int]], **options
) -> list[Generation]:
    """The answers to all prompts, in their order. Arguments as for `stream`."""
    answers = [answer for answer in stream(params, model, config, prompts, **options) if answer.finished]
    return sorted(answers, key=lambda answer: answer.index)
