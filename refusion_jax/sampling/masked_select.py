"""Masked diffusion decoding: what is asked of the logits at the open positions, and which of these are decided.

Letters: M positions of a block, V ids.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.reduction import at_most_k, at_most_p, with_noise

EVEN, LINEAR_T, KEEP_FLOOR = SCHEDULES = ("even", "linear_t", "keep_floor")


@struct.dataclass
class Scores:
    """What the logits say, by token; in float32."""

    draft: jax.Array  # sampled id; the most probable one when greedy
    confidence: jax.Array  # its probability
    margin: jax.Array  # of the most probable id's probability over the second's
    entropy: jax.Array  # nats
    doubt: jax.Array  # 1 - confidence, exact also where confidence rounds to 1
    mass: jax.Array  # mean of exp(logit) over the ids without the mask: 1 where logits are SEDD's true scores
    agreed: jax.Array | None = None  # whether a causal pass drafts the same (agreement.py); else None


@struct.dataclass
class Question:
    """What is asked of the logits at each token; leaves have the tokens' axes first.

    Attributes:
      key: raw PRNG keys [..., 2] of the draft.
      temperature, top_k, top_p: of the draft.
      score_temperature: of the probabilities that scores are; 0: those that the draft is drawn from.
      end_ids: [..., n] ids that end an answer, -1 where there are fewer.
      suppress: where these are suppressed: no, logits (the first of them is never drafted), confidence (as a draft they
        have none, and the others are of a softmax without them), both.
    """

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    score_temperature: jax.Array
    end_ids: jax.Array
    suppress: str = struct.field(pytree_node=False, default="no")

    @classmethod
    def of(cls, keys: jax.Array, settings: Settings, suppress: str) -> "Question":
        """Of one row: keys [M], and settings that hold for all of its tokens."""
        spread = lambda x: jnp.broadcast_to(x, (*keys.shape, *jnp.shape(x)))
        values = settings.temperature, settings.top_k, settings.top_p, settings.own["score_temperature"]
        return cls(jax.random.key_data(keys), *map(spread, values), spread(settings.stop_ids), suppress)

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> Scores:
        """Reduces logits [tokens, V]. The mask and begin ids are never drafted, but count in the probabilities, as in
        the authors' codes.

        Args:
          sampled: whether any token has a temperature.
        """
        ids = jnp.arange(model.vocab_size)
        if self.suppress in ("logits", "both"):
            logits = jnp.where(ids == self.end_ids[:, :1], -jnp.inf, logits)
        allowed = logits
        for never in (model.mask_token_id, model.begin_token_id):
            allowed = allowed if never is None else jnp.where(ids == never, -jnp.inf, allowed)
        draft = jnp.argmax(allowed, axis=-1)
        if sampled:
            draft = jnp.where(
                self.temperature > 0, jnp.argmax(with_noise(self.drawn(allowed), self.key), axis=-1), draft
            )
        own = (self.score_temperature == 0)[:, None]
        scored = jnp.where(own, self.drawn(logits), logits / jnp.where(own, 1.0, self.score_temperature[:, None]))
        total = jax.nn.logsumexp(scored, axis=-1)
        first = scored.max(axis=-1)
        second = jnp.where(ids == jnp.argmax(scored, axis=-1)[:, None], -jnp.inf, scored).max(axis=-1)
        margin = jnp.exp(first - total) - jnp.exp(second - total)
        surprise = total[:, None] - scored
        entropy = jnp.sum(jnp.where(scored > -jnp.inf, jnp.exp(-surprise) * surprise, 0.0), axis=-1)
        if self.suppress in ("confidence", "both"):
            ends = (ids == self.end_ids[..., None]).any(axis=-2)
            scored = jnp.where(ends, -jnp.inf, scored)
            total = jax.nn.logsumexp(scored, axis=-1)
        # A comparison and a maximum, not a gather: it stays a local reduction when the vocabulary is sharded.
        drafted = ids == draft[:, None]
        of_draft = jnp.where(drafted, scored, -jnp.inf).max(axis=-1)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).min)  # where end ids were all there was, nothing is sure
        doubt = jnp.sum(jnp.where(drafted, 0.0, jnp.exp(scored - total[:, None])), axis=-1)
        mass = jnp.exp(jax.nn.logsumexp(allowed, axis=-1)) / (model.logical_vocab_size - 1)
        return Scores(draft, jnp.exp(of_draft - total), margin, entropy, doubt, mass)

    def drawn(self, logits: jax.Array) -> jax.Array:
        """What drafts are drawn from. As in Dream: the fewest ids that reach top-p, then the k best of these."""
        warm = logits / jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]
        return at_most_k(at_most_p(warm, self.top_p), self.top_k)


def counts(schedule: str, tokens: int, steps: int, eps: float, lead: bool = False) -> np.ndarray:
    """[steps] int32: how many of a block's tokens each forward decides; with keep_floor, how many stay behind.

    In float64 on the host, so that the counts are the same wherever the decoding runs.

    Args:
      schedule: even (as equal as may be, the larger ones first), linear_t (Dream's: time falls from 1 to eps in equal
        steps, and so does the share that is open), keep_floor (DiffuLLaMA's).
      tokens: M.
      eps: of linear_t.
      lead: the first forward decides one token, and the schedule is that of the others (Fast-dLLM on Dream).
    """
    step = np.arange(steps)
    if schedule == EVEN:
        return (tokens // steps + (step < tokens % steps)).astype(np.int32)
    if schedule == KEEP_FLOOR:
        return (tokens * (steps - 1 - step) // steps).astype(np.int32)
    times, found, left = np.linspace(1, eps, steps + 1), [], tokens
    for i in range(steps):
        count = left if i == steps - 1 else int(left * (1 - times[i + 1] / times[i]))
        found.append(1 if lead and i == 0 else count)
        left -= found[-1]
    return np.array(found, np.int32)


def by_score(score: jax.Array, among: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positions [M] by falling score, each position's rank [M]); those not `among` come last, and of equals the left
    one first.
    """
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), stable=True)
    return order, jnp.argsort(order)


def surest(seen: Scores, among: jax.Array, rank: jax.Array, threshold: jax.Array) -> jax.Array:
    """[M] bool: those of a confidence of at least the threshold, and the first in rank."""
    return among & ((seen.confidence >= threshold) | (rank == 0))


def by_factor(seen: Scores, among: jax.Array, order: jax.Array, rank: jax.Array, factor: jax.Array) -> jax.Array:
    """[M] bool: the first in rank, then the nth while (n + 1) (1 - its confidence) is at most the factor."""
    n = jnp.arange(1, len(order) + 1)
    passes = (seen.confidence[order] >= 1 - factor / (n + 1)) | (n == 1)
    return among & (rank < jnp.cumprod(passes).sum())


def by_entropy(seen: Scores, among: jax.Array, order: jax.Array, rank: jax.Array, gamma: jax.Array) -> jax.Array:
    """[M] bool: the longest run in rank whose entropies, without the largest, sum to at most gamma nats."""
    entropy = seen.entropy[order]
    within = jnp.cumsum(entropy) - jax.lax.cummax(entropy) <= gamma
    return among & (rank < jnp.maximum(jnp.sum(within & among[order]), 1))


def by_agreement(seen: Scores, among: jax.Array) -> jax.Array:
    """[M] bool: from left to right, those that a causal pass agrees with up to the first that it does not; the first
    of all in any case.
    """
    return among & ((jnp.cumsum(among & ~seen.agreed) == 0) | (jnp.cumsum(among) == 1))


def times_of(key: jax.Array, steps: jax.Array, eps: jax.Array, tokens: int) -> jax.Array:
    """[M] int32: the step in which each token is decided when all are independent: while time falls from 1 to eps in
    equal steps, a token that is open at t is still so at s with probability s / t; the last step decides the rest.

    So each is decided when time falls below a number that is uniform in [0, 1).
    """
    u = jax.random.uniform(key, (tokens,))
    step = jnp.floor((1 - u) / (1 - eps) * steps).astype(jnp.int32)
    return jnp.clip(step, 0, steps - 1)


def by_mass(key: jax.Array, seen: Scores, step: jax.Array, steps: jax.Array, eps: jax.Array) -> jax.Array:
    """[M] bool: what SEDD's update from t to s unmasks while time falls from 1 to eps in equal steps, with probability
    (1 - s / t) * mass; behind the steps, all that is left.
    """
    share = (1 - eps) / steps / (1 - step * (1 - eps) / steps)
    return (jax.random.uniform(key, seen.mass.shape) < share * seen.mass) | (step >= steps)


def random_score(key: jax.Array, score: Any, temperature: jax.Array) -> jax.Array:
    """A score for drawing positions without replacement, from the softmax of score / temperature; 0: as it is."""
    noise = jax.random.gumbel(key, score.shape)
    return jnp.where(temperature > 0, score / jnp.where(temperature > 0, temperature, 1.0) + noise, score)
