"""From hidden states to the few numbers per token that decoding decides with; logits never leave this file."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import output_table
from refusion_jax.sampling.config import Settings

# Most float32 logits held at once. 2^26 (256 MB) is one pass for a Qwen3 window of 441 tokens, all rows together.
MAX_LOGITS = 2**26


@struct.dataclass
class Reduced:
    """All [batch, window], probabilities in float32 at temperature 1."""

    top: jax.Array  # most probable id
    top_prob: jax.Array  # its probability
    next_prob: jax.Array  # probability of the given next token
    draft: jax.Array  # sampled id; `top` when greedy
    draft_prob: jax.Array


def reduce_logits(
    config: ModelConfig, params: dict, hidden: jax.Array, next_tokens: jax.Array, keys: jax.Array, settings: Settings
) -> Reduced:
    """Reduces the logits of hidden states [batch, window, hidden]; padded rows of the table, mask and begin excluded.

    Args:
      next_tokens: [batch, window] ids whose probability is asked for.
      keys: [batch, window] PRNG keys of the draft at each token.
    """
    table = output_table(params).astype(hidden.dtype)
    ids = jnp.arange(config.vocab_size)
    allowed = ids < config.logical_vocab_size
    for never in (config.mask_token_id, config.begin_token_id):
        allowed &= ids != (-1 if never is None else never)

    def reduce(part):
        hidden, next_tokens, keys = part
        logits = jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
        logits = jnp.where(allowed, logits, -jnp.inf)
        total = jax.nn.logsumexp(logits, axis=-1)
        # A comparison and a sum, not a gather: it stays a local reduction when the vocabulary is sharded.
        prob = lambda token: jnp.exp(jnp.max(jnp.where(ids == token[..., None], logits, -jnp.inf), axis=-1) - total)
        top = jnp.argmax(logits, axis=-1)
        draft = jax.lax.cond(settings.temperature > 0, lambda: _sample(logits, keys, settings), lambda: top)
        return Reduced(top, prob(top), prob(next_tokens), draft, prob(draft))

    batch, window = next_tokens.shape
    parts = next(
        n
        for n in range(1, window + 1)
        if window % n == 0 and (batch * window // n * config.vocab_size <= MAX_LOGITS or n == window)
    )
    split = lambda x: jnp.moveaxis(x.reshape(batch, parts, window // parts, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, window)
    return jax.tree.map(join, jax.lax.map(reduce, (split(hidden), split(next_tokens), split(keys))))


def _sample(logits: jax.Array, keys: jax.Array, settings: Settings) -> jax.Array:
    """Ids drawn from logits [batch, window, vocab] after temperature, top-k, then top-p; one key per token."""
    logits = logits / jnp.maximum(settings.temperature, 1e-6)

    def cut_to_k(logits):
        return _cut(logits, lambda kept: jnp.sum(kept, axis=-1) >= settings.top_k)

    def cut_to_p(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        return _cut(logits, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1) >= settings.top_p)

    logits = jax.lax.cond(settings.top_k > 0, cut_to_k, lambda x: x, logits)
    logits = jax.lax.cond(settings.top_p < 1, cut_to_p, lambda x: x, logits)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
    return jnp.argmax(logits + noise, axis=-1)


def _cut(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keeps the fewest of the largest logits [batch, window, vocab] that are enough, and those equal to the least of them.

    The least one is found bit by bit, from sums over the vocabulary: sorting would gather it from its shards.

    Args:
      enough: from flags [batch, window, vocab] to [batch, window]. If even all are not enough, all are kept.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats

    def narrow(i, least):
        higher = least + (jnp.int32(1) << (31 - i))  # of the first bit: from the lowest integer to 0
        return jnp.where(enough(ordered >= higher[..., None]), higher, least)

    least = jax.lax.fori_loop(0, 32, narrow, jnp.full(logits.shape[:-1], jnp.iinfo(jnp.int32).min))
    return jnp.where(ordered >= least[..., None], logits, -jnp.inf)
