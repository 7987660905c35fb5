"""A batch of rows being decoded: requests join and leave, and one place forwards, reduces, commits and prefills.

    engine = Engine(params, model, config, batch=8, max_prompt_length=512)
    row = engine.add(Prompt(ids, config))         # None: no row is free
    for answer in engine.step(forwards=16): ...   # what has been finished
    engine.cancel(row)

A sampler (plan_and_infill.py, autoregressive.py) is a frozen, hashable dataclass with `model`, `length` (of an answer),
`window` (tokens of a forward), `held_back` (prompt tokens left to the first window), and functions of one row:
`start(request) -> row`, `ask(row) -> window`, `advance(row, window, seen) -> (row, tokens committed)`. A process
compiles one loop for each (sampler, batch, length of the cache), and prefills of a few widths; settings of a request
are traced.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from refusion_jax.errors import UserError
from refusion_jax.model.cache import KVCache
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3, unstacked
from refusion_jax.parallel import sharding
from refusion_jax.sampling import reduction
from refusion_jax.sampling.autoregressive import Autoregressive
from refusion_jax.sampling.config import MAX_STOP_IDS, Generation, SamplerConfig, Settings, check_prompts
from refusion_jax.sampling.plan_and_infill import PlanAndInfill
from refusion_jax.sampling.state import Canvas, Request, State

# Tokens a forward takes in about the time that reading the weights takes, on chips made for this. On a CPU every token
# costs.
FREE_TOKENS = 160
# A prefill forwards at most so many tokens of prompts per shard of the batch: one row's, or of several rows that need
# less.
PREFILL_TOKENS = 256
PREFILL_WIDTHS = (16, 64, 256)
STATIC = ("method", "gen_length", "slot_size", "blocks", "speculate", "window")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request: what to answer, and how.

    Attributes:
      tokens: ids of the prompt.
      config: its traced part (thresholds, temperature, top-k, top-p) is this request's own; the rest must be the
        engine's.
      index: returned with the answer; with `seed` it chooses the random stream.
      limit: tokens the answer may have; 0: as many as the engine's config says.
      stop_ids: ids that end the answer besides the model's EOS.
    """

    tokens: Sequence[int]
    config: SamplerConfig
    index: int = 0
    seed: int = 0
    limit: int = 0
    stop_ids: tuple[int, ...] = ()


@struct.dataclass
class Chunk:
    """Prompt tokens to prefill: of `slots` rows of each shard of the batch; leaves [shard, slot, ...].

    Attributes:
      row: index within the shard; past its end: padding.
      tokens: [shard, slot, width] ids.
      offset, count: entries in the cache before these tokens; how many of them are no padding.
      last: bool, the prompt is in the cache afterwards and the row starts.
      seed, index, request: of the row (the request's key is made from seed and index).
    """

    row: Any
    tokens: Any
    offset: Any
    count: Any
    last: Any
    seed: Any
    index: Any
    request: Request


def make_sampler(
    model: ModelConfig, config: SamplerConfig, batch: int, mesh: Mesh | None = None
) -> PlanAndInfill | Autoregressive:
    """The static part of a decoding with these settings: what compiled programs are kept by."""
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    # A TPU reads a layer's slice of stacked weights in place; CPUs and GPUs would copy it first.
    model = dataclasses.replace(model, remat="none", scan_layers=platform == "tpu")
    if config.method == "autoregressive":
        return Autoregressive(model, config.gen_length)
    n, k = config.slots // config.blocks, config.slot_size
    free = 0 if platform == "cpu" else FREE_TOKENS // batch
    tokens = {"off": 0, "auto": free, "on": max(FREE_TOKENS, 2 * n * k)}[config.speculate]
    carry = config.speculate != "off"
    chunks = max(n, (config.window or tokens) // k) if carry else n
    return PlanAndInfill(model, slots=n, slot_size=k, blocks=config.blocks, chunks=chunks, carry=carry)


def static_part(config: SamplerConfig) -> dict[str, Any]:
    """The settings that are compiled in; the others are each request's own."""
    return {name: getattr(config, name) for name in STATIC}


def cache_bucket(entries: int) -> int:
    """Length of a cache that holds so many entries: 128, 256, 384, 512, 768, 1024, ..: a few programs serve all
    lengths.
    """
    power = max(128, 1 << (entries - 1).bit_length())
    return power if power < 512 or entries > power * 3 // 4 else power * 3 // 4


# ---------------------------------------------------------------------------------------------- what is compiled


def empty(sampler, batch: int, cache_length: int) -> State:
    """A batch without requests: every row is done."""
    settings = Settings(
        *(jnp.float32(0),) * 3, jnp.int32(0), jnp.float32(1), jnp.int32(0), jnp.zeros(MAX_STOP_IDS, int)
    )
    row = sampler.start(Request(jnp.int32(1), jnp.int32(0), jax.random.key(0), settings)).replace(done=jnp.bool_(True))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), row)
    return State(KVCache.empty(sampler.model, batch, cache_length), rows).placed()


def forward(sampler, params: dict, state: State) -> State:
    """One pass of every row's window, and what follows from it."""
    model, rows = sampler.model, state.rows
    window = jax.vmap(sampler.ask)(rows)
    context = Cached.appended(state.cache, window.mask, model.attention)
    hidden, context = Qwen3(model).apply({"params": params}, window.tokens, window.positions, context)
    leaves, tree = jax.tree.flatten(window.query)

    def head(sampled: bool):
        reduce = lambda logits, *query: reduction.reduce(model, logits, tree.unflatten(query), sampled)
        return lambda: over_vocabulary(model, params, hidden, reduce, *leaves)

    seen = jax.lax.cond((rows.settings.temperature > 0).any(), head(True), head(False))
    rows = rows.replace(canvas=jax.vmap(Canvas.forwarded)(rows.canvas, jnp.where(rows.done, 0, window.used)))
    rows, committed = jax.vmap(sampler.advance)(rows, window, seen)
    return State(context.cache.commit(committed), rows)


def run(sampler, params: dict, state: State, forwards: jax.Array, active: jax.Array) -> tuple[State, jax.Array]:
    """Passes until one of the `active` rows that are not done is, or so many have been made; and how many were."""

    def go_on(carry):
        steps, state = carry
        return (steps < forwards) & (jnp.sum(~state.rows.done) >= active)

    def body(carry):
        steps, state = carry
        return steps + 1, forward(sampler, params, state)

    steps, state = jax.lax.while_loop(go_on, body, (jnp.int32(0), state))
    return state.placed(), steps


def prefill(sampler, params: dict, state: State, chunk: Chunk) -> State:
    """Puts prompt tokens into the cache; rows whose prompts are complete start."""
    shards, slots, width = chunk.tokens.shape
    flat = lambda x: x.reshape(shards * slots, *x.shape[2:])
    own = state.cache.length.shape[0] // shards  # rows of a shard
    to = flat(jnp.where(chunk.row < own, chunk.row + own * jnp.arange(shards)[:, None], state.cache.length.size))
    offset, count = flat(chunk.offset), flat(chunk.count)
    causal = jnp.broadcast_to(jnp.tri(width, dtype=bool), (shards * slots, width, width))
    # Padding is forwarded too: it comes last, and what it leaves in the cache is overwritten before it can be seen.
    view = state.cache.replace(rows=chunk.row, length=offset)
    positions = offset[:, None] + jnp.arange(width)
    context = Cached.appended(view, causal, sampler.model.attention)
    _, context = Qwen3(sampler.model).apply({"params": params}, flat(chunk.tokens), positions, context)
    cache = context.cache.replace(rows=None, length=state.cache.length.at[to].set(offset + count, mode="drop"))

    key = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))
    request = jax.tree.map(flat, chunk.request).replace(key=key(flat(chunk.seed), flat(chunk.index)))
    start = jnp.where(flat(chunk.last), to, state.cache.length.size)
    put = lambda old, new: old.at[start].set(new, mode="drop")
    return State(cache, jax.tree.map(put, state.rows, jax.vmap(sampler.start)(request))).placed()


def stop(state: State, row: jax.Array) -> State:
    """Ends a row."""
    return state.replace(rows=state.rows.replace(done=state.rows.done.at[row].set(True))).placed()


def grow(state: State, cache_length: int) -> State:
    """The same with a longer cache."""
    longer = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, cache_length - x.shape[-2]), (0, 0)])
    k, v = jax.tree.map(longer, (state.cache.k, state.cache.v))
    return state.replace(cache=state.cache.replace(k=k, v=v)).placed()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a sampler on a mesh."""

    empty: sharding.OnMesh
    run: sharding.OnMesh
    prefill: sharding.OnMesh
    stop: sharding.OnMesh
    grow: sharding.OnMesh
    unstack: sharding.OnMesh


@functools.cache
def programs(sampler: PlanAndInfill | Autoregressive, mesh: Mesh | None) -> Programs:
    """Equal samplers on equal meshes share their programs."""
    on_mesh = functools.partial(sharding.OnMesh, mesh, sharding.DECODE_RULES)
    return Programs(
        empty=on_mesh(functools.partial(empty, sampler), static_argnums=(0, 1)),
        run=on_mesh(functools.partial(run, sampler), donate_argnums=1),
        prefill=on_mesh(functools.partial(prefill, sampler), donate_argnums=1),
        stop=on_mesh(stop, donate_argnums=0),
        grow=on_mesh(grow, static_argnums=1),
        unstack=on_mesh(unstacked),
    )


def decode_params(sampler: PlanAndInfill | Autoregressive, params: dict, mesh: Mesh | None = None) -> dict:
    """A checkpoint's parameters as the sampler's model takes them; as they are when they are so already."""
    if sampler.model.scan_layers or "layers" not in params:
        return params
    return programs(sampler, mesh).unstack(params)


# ---------------------------------------------------------------------------------------------- the engine


class Engine:
    """Rows of a batch, and the requests that they serve. Nothing is held open between calls."""

    def __init__(
        self,
        params: dict,
        model: ModelConfig,
        config: SamplerConfig,
        batch: int,
        *,
        max_prompt_length: int = 0,
        mesh: Mesh | None = None,
    ):
        """Makes an empty batch.

        Args:
          params: of a checkpoint, or as `decode_params` gives them.
          config: its static part holds for all requests.
          batch: rows; rounded up to a multiple of the mesh's data x fsdp.
          max_prompt_length: makes room for prompts of this length at once; the cache grows when a longer one comes.
          mesh: devices to decode on (rows over data x fsdp, weights over tensor).

        Raises:
          UserError: settings and model do not fit together.
        """
        check_prompts([], model, config)
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
        self.batch = -(-batch // self._shards) * self._shards
        self.model, self.config = model, config
        self.sampler = make_sampler(model, config, self.batch, mesh)
        self._programs = programs(self.sampler, mesh)
        self._params = decode_params(self.sampler, params, mesh)
        self.cache_length = self._needed(max_prompt_length)
        self._state = self._programs.empty(self.batch, self.cache_length)
        self._owner: list[Prompt | None] = [None] * self.batch
        self._left: dict[int, int] = {}  # of rows that do not decode yet: prompt tokens in the cache
        self.steps = 0  # passes of the whole batch
        self.prefills = 0  # passes over prompts

    def add(self, prompt: Prompt) -> int | None:
        """The row that will answer a prompt; None when all are taken.

        Raises:
          UserError: the prompt and the model do not fit together, or its settings need another engine.
        """
        check_prompts([prompt.tokens], self.model, prompt.config)
        self._check_request(prompt)
        row = next((row for row, owner in enumerate(self._owner) if owner is None), None)
        if row is None:
            return None
        needed = self._needed(len(prompt.tokens))
        if needed > self.cache_length:
            self.cache_length = needed
            self._state = self._programs.grow(self._state, needed)
        self._owner[row], self._left[row] = prompt, 0
        return row

    def prefill(self, passes: int) -> None:
        """At most so many passes over waiting prompts; `step` begins with it."""
        for _ in range(passes):
            if not self._left:
                break
            self._state = self._programs.prefill(self._params, self._state, self._next_chunk())
            self.prefills += 1

    def step(self, forwards: int = 1, unfinished: bool = False) -> list[Generation]:
        """At most so many passes over waiting prompts, then over all rows, these until a row is done.

        Args:
          unfinished: also return what there is of the answers that are not finished.

        Returns:
          The finished answers, whose rows are free again.
        """
        self.prefill(forwards)
        decoding = [row for row, owner in enumerate(self._owner) if owner is not None and row not in self._left]
        if not decoding:
            return []
        self._state, steps = self._programs.run(self._params, self._state, np.int32(forwards), np.int32(len(decoding)))
        rows = self._state.rows
        steps, done, canvas = jax.device_get((steps, rows.done, vars(rows.canvas)))
        self.steps += int(steps)
        answers = []
        for row in decoding:
            if not (done[row] or unfinished):
                continue
            prompt = self._owner[row]
            of_row = {name: values[row] for name, values in canvas.items()}
            stops = (self.model.eos_token_id, *prompt.stop_ids)
            limit = prompt.limit or self.sampler.length
            answers.append(Generation.of(prompt.index, of_row, stops, limit, bool(done[row])))
            if done[row]:
                self._owner[row] = None
        return answers

    def cancel(self, row: int) -> None:
        """Frees a row; its answer is never returned."""
        self._owner[row] = None
        self._left.pop(row, None)
        self._state = self._programs.stop(self._state, np.int32(row))

    def forward(self, steps: int) -> None:
        """So many passes over all rows, whether they are done or not, to be timed."""
        self._state, _ = self._programs.run(self._params, self._state, np.int32(steps), np.int32(0))
        jax.block_until_ready(self._state)

    def compiled(self) -> jax.stages.Compiled:
        """The loop, compiled by itself, to be looked at."""
        return self._programs.run.lower(self._params, self._state, np.int32(0), np.int32(0)).compile()

    @property
    def busy(self) -> int:
        """Rows with a request."""
        return sum(owner is not None for owner in self._owner)

    def _needed(self, prompt_length: int) -> int:
        return cache_bucket(prompt_length + self.sampler.length + self.sampler.window)

    def _check_request(self, prompt: Prompt) -> None:
        if static_part(prompt.config) != static_part(self.config):
            raise UserError(
                f"Request {prompt.index} wants {static_part(prompt.config)}, but this engine was made for "
                f"{static_part(self.config)}. Use another engine; for a shorter answer set `limit`."
            )
        if not 0 <= prompt.limit <= self.sampler.length:
            raise UserError(f"Request {prompt.index} has limit {prompt.limit}; choose from 1 to {self.sampler.length}.")
        if len(prompt.stop_ids) >= MAX_STOP_IDS:
            raise UserError(
                f"Request {prompt.index} has {len(prompt.stop_ids)} stop_ids; at most {MAX_STOP_IDS - 1} are possible."
            )

    def _next_chunk(self) -> Chunk:
        """The next tokens of waiting prompts, on the host: the first in line decides the width, others that need no
        more join.
        """
        own = self.batch // self._shards
        left = {row: len(self._owner[row].tokens) - self.sampler.held_back - at for row, at in self._left.items()}
        longest = next(iter(left.values()))
        width = next((width for width in PREFILL_WIDTHS if width >= longest), PREFILL_WIDTHS[-1])
        slots = min(PREFILL_TOKENS // width, own)
        chosen: list[list[int]] = [[] for _ in range(self._shards)]
        for row, count in left.items():
            if len(chosen[row // own]) < slots and (count <= width or row == next(iter(left))):
                chosen[row // own].append(row)
        parts = [[self._part(row, width) for row in rows] for rows in chosen]
        nothing = jax.tree.map(np.zeros_like, next(part for rows in parts for part in rows)).replace(row=np.int32(own))
        stack = lambda *leaves: np.stack(leaves)
        rows = [jax.tree.map(stack, *part, *[nothing] * (slots - len(part))) for part in parts]
        chunk = jax.tree.map(stack, *rows)
        chex.assert_shape(chunk.tokens, (self._shards, slots, width))
        return chunk

    def _part(self, row: int, width: int) -> Chunk:
        """The next at most `width` prompt tokens of a row; they count as prefilled."""
        prompt, at = self._owner[row], self._left[row]
        total = len(prompt.tokens) - self.sampler.held_back
        count = min(width, total - at)
        tokens = np.zeros(width, np.int32)
        tokens[:count] = prompt.tokens[at : at + count]
        self._left[row] += count
        if at + count == total:
            del self._left[row]
        settings = Settings.of(
            prompt.config, self.model.eos_token_id, limit=prompt.limit or self.sampler.length, stop_ids=prompt.stop_ids
        )
        return Chunk(
            row=np.int32(row % (self.batch // self._shards)),
            tokens=tokens,
            offset=np.int32(at),
            count=np.int32(count),
            last=np.bool_(at + count == total),
            seed=np.uint32(prompt.seed),
            index=np.uint32(prompt.index),
            request=Request(np.int32(len(prompt.tokens)), np.int32(prompt.tokens[-1]), None, settings),
        )
