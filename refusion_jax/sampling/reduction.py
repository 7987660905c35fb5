"""From hidden states to the few numbers per token that decoding decides with; logits never leave this file."""

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import output_table
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
    parts = next(n for n in range(1, window + 1) if window % n == 0 and (batch * window // n * config.vocab_size <= MAX_LOGITS or n == window))
    split = lambda x: jnp.moveaxis(x.reshape(batch, parts, window // parts, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, window)
    return jax.tree.map(join, jax.lax.map(reduce, (split(hidden), split(next_tokens), split(keys))))


def _sample(logits: jax.Array, keys: jax.Array, settings: Settings) -> jax.Array:
    """Ids drawn from logits [batch, window, vocab] after temperature, top-k, then top-p; one key per token."""
    logits = logits / jnp.maximum(settings.temperature, 1e-6)

    def cut(logits):
        ranked = -jnp.sort(-logits, axis=-1)
        kept = (jnp.arange(logits.shape[-1]) < settings.top_k) | (settings.top_k == 0)
        probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(probs, axis=-1) - probs < settings.top_p
        least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    logits = jax.lax.cond((settings.top_k > 0) | (settings.top_p < 1), cut, lambda x: x, logits)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
    return jnp.argmax(logits + noise, axis=-1)
