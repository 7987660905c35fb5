"""What the samplers have in common: the canvas an answer is written on, and the batch being decoded."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from refusion_jax.model.cache import KVCache
from refusion_jax.sampling.config import Settings


@struct.dataclass
class Request:
    """What a sampler starts a row from; every leaf is of one row.

    Attributes:
      prompt_length: tokens of the prompt.
      last_token: of the prompt.
      key: PRNG key of the row.
      settings: of this request.
      prompt: [cache_length] its ids and padding, where a sampler forwards prompts itself; else None.
      own: what else the method wants to know of the prompt (`SamplerConfig.own`); nothing where there is no prompt.
    """

    prompt_length: jax.Array
    last_token: jax.Array
    key: jax.Array
    settings: Settings
    prompt: jax.Array | None = None
    own: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class Canvas:
    """The answer of one row, by position in the response.

    Attributes:
      tokens: [length] ids.
      when: [length] how many tokens had been committed before this one; -1: still open. Its argsort is the commit
        order.
      round: [length] the round (of plan-and-infill) or pass of the loop that a token was committed in.
      count: tokens committed.
      forwards: passes of the loop that the row took part in.
      tokens_forwarded: tokens in all its passes, the prompt's included.
    """

    tokens: jax.Array
    when: jax.Array
    round: jax.Array
    count: jax.Array
    forwards: jax.Array
    tokens_forwarded: jax.Array

    @classmethod
    def empty(cls, length: int, tokens_forwarded: jax.Array) -> "Canvas":
        """Nothing committed; `tokens_forwarded` is what the prompt took."""
        zeros, zero = jnp.zeros(length, jnp.int32), jnp.int32(0)
        return cls(zeros, zeros - 1, zeros, count=zero, forwards=zero, tokens_forwarded=tokens_forwarded)

    def commit(self, offsets: jax.Array, tokens: jax.Array, count: jax.Array, round: jax.Array) -> "Canvas":
        """Writes the first `count` of `tokens` [window] at `offsets` [window], in this order."""
        index = jnp.arange(len(tokens))
        at = jnp.where(index < count, offsets, len(self.tokens))
        return self.replace(
            tokens=self.tokens.at[at].set(tokens, mode="drop"),
            when=self.when.at[at].set(self.count + index, mode="drop"),
            round=self.round.at[at].set(round, mode="drop"),
            count=self.count + count,
        )

    def forwarded(self, tokens: jax.Array) -> "Canvas":
        """One more pass with so many tokens of this row in it; 0: it took no part."""
        return self.replace(forwards=self.forwards + (tokens > 0), tokens_forwarded=self.tokens_forwarded + tokens)


@struct.dataclass
class BaseRow:
    """Where the decoding of a prompt stands: what the rows of all samplers have.

    Attributes:
      done: bool, the answer is complete, or there is none.
      key, settings: of its request.
      canvas: the answer so far.
    """

    done: jax.Array
    key: jax.Array
    settings: Settings
    canvas: Canvas

    @classmethod
    def begin(cls, request: Request, canvas: Canvas, **own: Any) -> "BaseRow":
        """A row with nothing decided; `own`: the fields that its sampler adds."""
        return cls(jnp.bool_(False), request.key, request.settings, canvas, **own)


@struct.dataclass
class State:
    """A batch being decoded; `rows` is the sampler's own row, a `BaseRow`, with a leading batch axis on every leaf."""

    cache: KVCache
    rows: Any

    def placed(self) -> "State":
        """The same, laid out over the mesh in use: rows like a batch, heads of the cache like the model's."""
        entries = ("batch", "kv_heads", "length", "head_dim")
        by_entry = lambda x: nn.with_logical_constraint(x, entries if x.ndim == 4 else ("layers", *entries))
        by_row = lambda x: nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))
        k, v = jax.tree.map(by_entry, (self.cache.k, self.cache.v))
        features = jax.tree.map(lambda x: by_row(x) if x.ndim == 3 else by_entry(x), self.cache.features)
        rows = jax.tree.map(by_row, self.rows)
        return State(KVCache(k, v, by_row(self.cache.length), features=features), rows)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`yes` where a scalar condition holds, else `no`, of every leaf of two equal trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def first(flags: jax.Array) -> jax.Array:
    """Index of the first True along the last axis; its length if there is none."""
    size = flags.shape[-1]
    return jnp.min(jnp.where(flags, jnp.arange(size), size), axis=-1)
