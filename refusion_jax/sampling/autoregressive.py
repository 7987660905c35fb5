"""Left-to-right decoding, one token per forward: the baseline, on the same cache and in the same loop."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.attention import Appended
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.reduction import reduce_logits
from refusion_jax.sampling.state import State


@struct.dataclass
class Row:
    """Where the decoding of a prompt stands; every leaf has a leading batch axis."""

    done: jax.Array
    prompt_length: jax.Array
    key: jax.Array
    count: jax.Array  # tokens so far; the last one is not in the cache yet
    tokens: jax.Array  # [length]
    offsets: jax.Array
    rounds: jax.Array
    forwards: jax.Array
    tokens_forwarded: jax.Array


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """The static part of a decoding; the same three functions as `PlanAndInfill`."""

    model: ModelConfig
    length: int
    window: int = 1

    def empty(self, batch: int, cache_length: int) -> State:
        zeros = jnp.zeros(batch, jnp.int32)
        index = jnp.broadcast_to(jnp.arange(self.length), (batch, self.length))
        rows = Row(
            done=zeros == 0,
            prompt_length=zeros,
            key=jax.vmap(jax.random.key)(zeros),
            count=zeros,
            tokens=jnp.zeros_like(index),
            offsets=index,
            rounds=index,
            forwards=zeros,
            tokens_forwarded=zeros,
        )
        return State(cache=KVCache.empty(self.model, batch, cache_length), rows=rows)

    def prefill(
        self,
        params: dict,
        state: State,
        settings: Settings,
        rows: jax.Array,
        prompts: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
    ) -> State:
        """Puts new prompts into rows of the batch and decodes their first token; arguments as in `PlanAndInfill`."""
        count, padded = prompts.shape
        fresh = self.empty(count, padded)
        fresh_rows = fresh.rows.replace(done=jnp.zeros(count, bool), prompt_length=lengths, key=keys)
        positions = jnp.broadcast_to(jnp.arange(padded), prompts.shape)
        causal = jnp.broadcast_to(jnp.tri(padded, dtype=bool), (count, padded, padded))
        context = Appended(fresh.cache, causal)
        hidden, context = Qwen3(self.model).apply({"params": params}, prompts, positions, context)
        cache = context.cache
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        fresh_rows = self.advance(params, fresh_rows, last, lengths, settings)
        return state.insert(State(cache.commit(lengths), fresh_rows), rows, padded)

    def step(self, params: dict, state: State, settings: Settings) -> State:
        """One token of every row."""
        rows = state.rows
        tokens = jnp.take_along_axis(rows.tokens, rows.count[:, None] - 1, axis=1)
        positions = (rows.prompt_length + rows.count - 1)[:, None]
        context = Appended(state.cache, jnp.ones((len(tokens), 1, 1), bool))
        hidden, context = Qwen3(self.model).apply({"params": params}, tokens, positions, context)
        return State(context.cache.commit(~rows.done), self.advance(params, rows, hidden, 1, settings))

    def advance(
        self, params: dict, rows: Row, hidden: jax.Array, forwarded: jax.Array | int, settings: Settings
    ) -> Row:
        """Appends the token that follows from hidden states [batch, 1, hidden]."""
        keys = jax.vmap(jax.random.fold_in)(rows.key, rows.count)
        token = reduce_logits(
            self.model, params, hidden, jnp.zeros((len(keys), 1), jnp.int32), keys[:, None], settings
        ).draft
        at = jnp.where(rows.done, self.length, rows.count)[:, None]
        tokens = rows.tokens.at[jnp.arange(len(at))[:, None], at].set(token, mode="drop")
        active = ~rows.done
        count = rows.count + active
        return rows.replace(
            done=rows.done | (token[:, 0] == self.model.eos_token_id) | (count == self.length),
            count=count,
            tokens=tokens,
            forwards=rows.forwards + active,
            tokens_forwarded=rows.tokens_forwarded + active * forwarded,
        )
