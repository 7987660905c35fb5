"""From logits to the few numbers per token that decoding decides with; run by `over_vocabulary`, logits never leave
it.

What is asked of the logits is a struct with a method `answer(model, logits, sampled)`: `Query` here, and those that a
sampler has for itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import Settings


@struct.dataclass
class Query:
    """What is asked of the logits at each token of a window; leaves have the window's axes first.

    Attributes:
      next_tokens: ids whose probability is asked for.
      key: raw PRNG keys [..., 2] of the draft at each token.
      temperature, top_k, top_p: of the draft.
    """

    next_tokens: jax.Array
    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, next_tokens: jax.Array, keys: jax.Array, settings: Settings) -> "Query":
        """Of one row's window: tokens [window], keys [window], and settings that hold for all of them."""
        spread = lambda x: jnp.broadcast_to(x, next_tokens.shape)
        of_draft = map(spread, (settings.temperature, settings.top_k, settings.top_p))
        return cls(next_tokens, jax.random.key_data(keys), *of_draft)

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> "Seen":
        return reduce(model, logits, self, sampled)


@struct.dataclass
class Seen:
    """What a window's logits say, by token; probabilities in float32 at temperature 1."""

    top: jax.Array  # most probable id
    top_prob: jax.Array  # its probability
    next_prob: jax.Array  # probability of the given next token
    draft: jax.Array  # sampled id; `top` when greedy
    draft_prob: jax.Array


def reduce(model: ModelConfig, logits: jax.Array, query: Query, sampled: bool) -> Seen:
    """Reduces logits [tokens, vocab]; the mask and begin ids take no part (padded rows of the table are -inf already).

    Args:
      sampled: whether any token has a temperature; else the draft is `top`.
    """
    ids = jnp.arange(model.vocab_size)
    for never in (model.mask_token_id, model.begin_token_id):
        logits = logits if never is None else jnp.where(ids == never, -jnp.inf, logits)
    total = jax.nn.logsumexp(logits, axis=-1)

    def prob(token):
        # A comparison and a maximum, not a gather: it stays a local reduction when the vocabulary is sharded.
        return jnp.exp(jnp.max(jnp.where(ids == token[..., None], logits, -jnp.inf), axis=-1) - total)

    top, top_prob = jnp.argmax(logits, axis=-1), jnp.exp(jnp.max(logits, axis=-1) - total)
    draft, draft_prob = top, top_prob
    if sampled:
        draft = jnp.where(query.temperature > 0, sample(logits, query), top)
        draft_prob = prob(draft)
    return Seen(top, top_prob, prob(query.next_tokens), draft, draft_prob)


def sample(logits: jax.Array, query: Query) -> jax.Array:
    """Ids drawn from logits [tokens, vocab] after temperature, top-k, then top-p; each token has its own key and
    settings.
    """
    logits = logits / jnp.maximum(query.temperature, 1e-6)[:, None]
    logits = at_most_p(at_most_k(logits, query.top_k), query.top_p)
    return jnp.argmax(with_noise(logits, query.key), axis=-1)


def at_most_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """The k largest logits of every token, and those equal to the least of them; 0: all."""

    def cut(logits):
        count = jnp.where(top_k > 0, top_k, logits.shape[-1])
        return _cut(logits, lambda kept: jnp.sum(kept, axis=-1) >= count)

    return jax.lax.cond((top_k > 0).any(), cut, lambda x: x, logits)


def at_most_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The fewest largest logits of every token whose probability reaches top_p; 1: all."""
    top_p = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)  # 0, as less than that counts, none at all would reach

    def cut(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        kept = _cut(logits, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1) >= top_p)
        return jnp.where((top_p < 1)[:, None], kept, logits)

    return jax.lax.cond((top_p < 1).any(), cut, lambda x: x, logits)


def with_noise(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Logits [tokens, vocab] whose largest is a draw from them, by raw keys [tokens, 2]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.wrap_key_data(key), logits.shape[-1:]))(keys)
    return logits + noise


def _cut(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keeps the fewest of the largest logits [..., vocab] that are enough, and those equal to the least of them.

    The least one is found bit by bit, from sums over the vocabulary: sorting would gather it from its shards.

    Args:
      enough: from flags [..., vocab] to [...]. If even all are not enough, all are kept.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats

    def narrow(i, least):
        higher = least + (jnp.int32(1) << (31 - i))  # of the first bit: from the lowest integer to 0
        return jnp.where(enough(ordered >= higher[..., None]), higher, least)

    least = jax.lax.fori_loop(0, 32, narrow, jnp.full(logits.shape[:-1], jnp.iinfo(jnp.int32).min))
    return jnp.where(ordered >= least[..., None], logits, -jnp.inf)
