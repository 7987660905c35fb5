"""What is compiled for decoding: the loop of a sampler over a batch, and the prefill of prompts.

A sampler (plan_and_infill.py, speculative.py, masked.py, block.py, ..) is a frozen, hashable dataclass with `model`,
`length` (of an answer), `widths` (tokens that a forward may take, ascending), `window` (the last of them), `held_back`
(prompt tokens left to the first window), and functions of one row: `start(request) -> row`, `ask(row) -> window`,
`advance(row, window, seen) -> (row, tokens committed)`. A process compiles one loop for each (sampler, batch, length of
the cache), and prefills of a few widths; settings of a request are traced.

With `in_place` a window overwrites the entries of its positions and may be as wide as the cache, a row holds its
`prompt` [cache_length] and forwards it itself, and `window.at` says which tokens' logits are asked for.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from refusion_jax.model import tiles
from refusion_jax.model.cache import KVCache
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3, unstacked
from refusion_jax.parallel import sharding
from refusion_jax.sampling import agreement, dllm_cache, masked_select, prefixes, reduction
from refusion_jax.sampling.config import SamplerConfig, Settings
from refusion_jax.sampling.state import Canvas, Request, State


@struct.dataclass
class Chunk:
    """Prompt tokens to prefill: of `slots` rows of each shard of the batch; leaves [shard, slot, ...].

    Attributes:
      row: index within the shard; past its end: padding.
      tokens, positions: [shard, slot, width] ids and their positions in the text.
      blocks: [shard, slot, width]; a token sees those of its own and of earlier blocks.
      offset, count: entries in the cache before these tokens; how many of them are no padding.
      last: bool, the prompt is in the cache afterwards and the row starts.
      seed, index, request: of the row (the request's key is made from seed and index).
    """

    row: Any
    tokens: Any
    positions: Any
    blocks: Any
    offset: Any
    count: Any
    last: Any
    seed: Any
    index: Any
    request: Request


def _platform(mesh: Mesh | None) -> str:
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def scans(mesh: Mesh | None) -> bool:
    """Whether decoding takes layers stacked: a TPU reads a slice of them in place, CPUs and GPUs would copy it
    first.
    """
    return _platform(mesh) == "tpu"


def make_sampler(model: ModelConfig, config: SamplerConfig, batch: int, mesh: Mesh | None = None) -> Any:
    """The static part of a decoding with these settings: what compiled programs are kept by."""
    return config.sampler(decode_model(model, mesh), batch, _platform(mesh))


def cache_bucket(entries: int) -> int:
    """Length of a cache that holds so many entries: 128, 256, 384, 512, 768, 1024, ..: a few programs serve all
    lengths.
    """
    power = max(128, 1 << (entries - 1).bit_length())
    return power if power < 512 or entries > power * 3 // 4 else power * 3 // 4


def empty(sampler, settings: Settings, batch: int, cache_length: int) -> State:
    """A batch without requests: every row is done. `settings` are any of this method."""
    settings = jax.tree.map(jnp.asarray, settings)
    prompt = jnp.zeros(cache_length, jnp.int32) if sampler.in_place else None
    request = Request(jnp.int32(1), jnp.int32(0), jax.random.key(0), settings, prompt)
    row = sampler.start(request).replace(done=jnp.bool_(True))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), row)
    cache = KVCache.empty(sampler.model, batch, cache_length)
    if sampler.in_place:
        cache = cache.replace(features=sampler.features(batch, cache_length))
    return State(cache, rows).placed()


def forward(sampler, params: dict, state: State) -> State:
    """One pass of every row's window, and what follows from it."""
    rows, sizes = state.rows, sampler.widths
    if sampler.in_place:  # at times all that is in the cache
        sizes = (*(size for size in sizes if size < state.cache.cache_length), state.cache.cache_length)
    window = jax.vmap(sampler.ask)(rows)
    used = jnp.where(rows.done, 0, window.used)
    choice = jnp.searchsorted(jnp.array(sizes), used.max())  # the least that is enough

    def see(width, cache):
        held = tiles.suited(params, len(rows.done) * width)
        return look(sampler, held, window, rows.settings, width, cache)

    cache, seen = by_width(see, sizes, choice, state.cache)
    if sampler.in_place and sampler.verified:
        cache, seen = verify(sampler, params, window, rows.settings, cache, seen)
    rows = rows.replace(canvas=jax.vmap(Canvas.forwarded)(rows.canvas, used))
    rows, committed = jax.vmap(sampler.advance)(rows, window, seen)
    return State(cache.commit(committed), rows)


def by_width(see: Any, widths: tuple[int, ...], choice: jax.Array, cache: KVCache) -> tuple[KVCache, reduction.Seen]:
    """`see` with the chosen one of the widths, in a loop of one turn or none: a conditional would copy the cache."""
    if len(widths) == 1:
        return see(widths[0], cache)
    seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda x: see(widths[0], x), cache)[1])
    for i, width in enumerate(widths):

        def once(carry, width=width):
            turn, cache, _ = carry
            # Of a length that the carry decides, so that XLA does not make masks ahead of the loops without a turn.
            return jnp.bool_(False), *see(width, cache.replace(length=jnp.where(turn, cache.length, 0)))

        _, cache, seen = jax.lax.while_loop(lambda carry: carry[0], once, (choice == i, cache, seen))
    return cache, seen


def look(
    sampler, params: dict, window: Any, settings: Settings, width: int, cache: KVCache
) -> tuple[KVCache, reduction.Seen]:
    """The cache with the first `width` tokens of every window in it, and what the model says of them."""
    model, first = sampler.model, lambda x: x[:, :width]
    if sampler.in_place:
        hidden, cache = look_in_place(sampler, params, window, width, cache)
        query, padding = window.query, 0
    else:
        context = Cached.appended(cache, first(window.mask)[..., :width], model.attention)
        hidden, context = Qwen3(model).apply({"params": params}, first(window.tokens), first(window.positions), context)
        cache, query, padding = context.cache, jax.tree.map(first, window.query), sampler.window - width
    seen = answered(model, params, hidden, query, settings)
    return cache, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))), seen)


def answered(model: ModelConfig, params: dict, hidden: jax.Array, query: Any, settings: Settings) -> reduction.Seen:
    """What the logits of hidden states say to a query, token by token."""
    leaves, tree = jax.tree.flatten(query)

    def head(sampled: bool):
        reduce = lambda logits, *query: tree.unflatten(query).answer(model, logits, sampled)
        return lambda: over_vocabulary(model, params, hidden, reduce, *leaves)

    return jax.lax.cond((settings.temperature > 0).any(), head(True), head(False))


def verify(
    sampler, params: dict, window: Any, settings: Settings, cache: KVCache, seen: masked_select.Scores
) -> tuple[KVCache, masked_select.Scores]:
    """The same with whether a causal pass over the drafts would draft, by the same draws, what they are."""
    shift = sampler.alignment == "shift"
    hidden, kept = agreement.forward(sampler.model, params, window.block, seen.draft, shift, cache.features)
    own = answered(sampler.model, params, hidden, window.query, settings)
    return cache.replace(features=kept), seen.replace(agreed=own.draft == seen.draft)


def look_in_place(sampler, params: dict, window: Any, width: int, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Hidden states [batch, asked for, hidden] of the tokens whose logits are asked for, and the cache.

    With guidance they are un + (scale + 1)(cond - un), un being those without the prompt: logits are linear in them.
    The two passes can share the cache, which both fill completely.
    """

    asked_for = lambda x: jnp.take_along_axis(x, jnp.minimum(window.at, x.shape[1] - 1)[..., None], axis=1)
    if window.refresh is not None:
        how = sampler.transfer, sampler.length, width
        hidden, cache = dllm_cache.look(sampler.model, params, window, *how, cache)
        return asked_for(hidden), cache
    text = jax.tree.map(lambda x: x[:, :width], window.text)

    def forward(tokens: jax.Array, cache: KVCache):
        context = Cached.in_place(cache, text.positions, sampler.model.attention)
        hidden, context = Qwen3(sampler.model).apply({"params": params}, tokens, text.positions, context)
        return asked_for(hidden), context.cache

    if not sampler.guided:
        return forward(text.tokens, cache)
    without, cache = forward(text.unprompted, cache)
    hidden, cache = forward(text.tokens, cache)
    scale, un, cond = window.scale[:, None, None], without.astype(jnp.float32), hidden.astype(jnp.float32)
    guided = (un + (scale + 1) * (cond - un)).astype(hidden.dtype)
    return jnp.where(scale > 0, guided, hidden), cache


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
    offset, count, tokens = flat(chunk.offset), flat(chunk.count), flat(chunk.tokens)
    cache, length, prompts = state.cache, offset + count, None
    if sampler.in_place:
        length, prompts = length + flat(chunk.request.settings.limit), tokens  # all that is forwarded is seen
        if sampler.verified:
            kept = agreement.read(sampler.model, params, tokens, chunk.row, cache.features)
            cache = cache.replace(features=kept)
    else:
        # Padding is forwarded too: it comes last, and what it leaves in the cache is overwritten before it can be seen.
        view = cache.replace(rows=chunk.row, length=offset)
        blocks = flat(chunk.blocks)
        context = Cached.appended(view, blocks[:, :, None] >= blocks[:, None], sampler.model.attention)
        held = tiles.suited(params, tokens.size)
        _, context = Qwen3(sampler.model).apply({"params": held}, tokens, flat(chunk.positions), context)
        cache = context.cache
    cache = cache.replace(rows=None, length=state.cache.length.at[to].set(length, mode="drop"))

    key = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))
    key = key(flat(chunk.seed), flat(chunk.index))
    request = jax.tree.map(flat, chunk.request).replace(key=key, prompt=prompts)
    start = jnp.where(flat(chunk.last), to, state.cache.length.size)
    put = lambda old, new: old.at[start].set(new, mode="drop")
    return State(cache, jax.tree.map(put, state.rows, jax.vmap(sampler.start)(request))).placed()


def stop(state: State, row: jax.Array) -> State:
    """Ends a row."""
    return state.replace(rows=state.rows.replace(done=state.rows.done.at[row].set(True))).placed()


def grow(sampler, state: State, cache_length: int) -> State:
    """The same with a longer cache."""
    longer = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, cache_length - x.shape[-2]), (0, 0)])
    k, v, features = jax.tree.map(longer, (state.cache.k, state.cache.v, state.cache.features))
    rows = state.rows
    if sampler.in_place:
        rows = rows.replace(prompt=jnp.pad(rows.prompt, ((0, 0), (0, cache_length - rows.prompt.shape[1]))))
    return state.replace(cache=state.cache.replace(k=k, v=v, features=features), rows=rows).placed()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a sampler on a mesh."""

    empty: sharding.OnMesh
    run: sharding.OnMesh
    prefill: sharding.OnMesh
    stop: sharding.OnMesh
    grow: sharding.OnMesh
    take: sharding.OnMesh
    put: sharding.OnMesh


@functools.cache
def programs(sampler: Any, mesh: Mesh | None) -> Programs:
    """Equal samplers on equal meshes share their programs."""
    on_mesh = functools.partial(sharding.OnMesh, mesh, sharding.DECODE_RULES)
    return Programs(
        empty=on_mesh(functools.partial(empty, sampler), static_argnums=(1, 2)),
        run=on_mesh(functools.partial(run, sampler), donate_argnums=1),
        prefill=on_mesh(functools.partial(prefill, sampler), donate_argnums=1),
        stop=on_mesh(stop, donate_argnums=0),
        grow=on_mesh(functools.partial(grow, sampler), static_argnums=1),
        take=on_mesh(prefixes.take),
        put=on_mesh(prefixes.put, donate_argnums=0),
    )


def decode_model(model: ModelConfig, mesh: Mesh | None = None) -> ModelConfig:
    """The model that takes `decode_params`."""
    return dataclasses.replace(model, remat="none", scan_layers=scans(mesh))


def decode_params(params: dict, mesh: Mesh | None = None) -> dict:
    """A checkpoint's parameters as decoding takes them on these devices; as they are when they are so already. On one
    CPU there are "tiles" too, which forwards of few tokens take.
    """
    if scans(mesh) or "layers" not in params:
        return params
    params = _unstack(mesh)(params)
    one_cpu = _platform(mesh) == "cpu" and (mesh is None or mesh.size == 1)
    return params | ({"tiles": tiles.tiled(params)} if one_cpu and tiles.pay(params) else {})


@functools.cache
def _unstack(mesh: Mesh | None) -> sharding.OnMesh:
    return sharding.OnMesh(mesh, sharding.DECODE_RULES, unstacked)
