"""MDLM's and SEDD's sampling with recorded draws: those of `numpy.random.RandomState(seed)`, of every step one number
for each token of the text and each id.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import MaskedConfig, masked
from refusion_jax.sampling.config import setting
from refusion_jax.sampling.masked import Masked
from refusion_jax.sampling.masked_select import Scores
from refusion_jax.sampling.state import Request, select

STEPS, ROOM = 64, 32  # of the longest case: steps, and tokens of the text


def settings(record: dict[str, Any], vocabulary: int) -> MaskedConfig:
    """Of a recorded line; its answer's length is a request's limit."""
    params = record["params"]
    names = {name: params[name] for name in ("seed", "eps")}
    config = RecordedConfig if params["sampler"] == "ddpm_cache" else RecordedScoresConfig
    return config(gen_length=ROOM, block_length=ROOM, steps=params["num_steps"], vocabulary=vocabulary, **names)


@dataclasses.dataclass(frozen=True)
class RecordedConfig(MaskedConfig):
    """MDLM's sampling with the draws of a seed."""

    method: ClassVar[str] = "masked with recorded draws"

    select: str = setting("independent", "")
    steps: int = setting(STEPS, "", traced=True)
    seed: int = setting(0, "of the draws", traced=True)
    vocabulary: int = setting(0, "ids that each draw is for")

    @property
    def static(self) -> dict[str, Any]:
        return super().static | {"longest": STEPS}

    def traced(self, limit: int) -> dict[str, np.ndarray]:
        return {name: value for name, value in super().traced(limit).items() if name != "seed"}

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """`noise` [STEPS, ROOM, vocabulary] of the answer's tokens."""
        length = len(prompt.tokens) + prompt.limit
        drawn = np.random.RandomState(prompt.config.seed).randint(
            0, 2**24, (prompt.config.steps, length, self.vocabulary)
        )
        noise = np.ones((STEPS, ROOM, self.vocabulary), np.float32)
        noise[: len(drawn), : prompt.limit] = drawn[:, len(prompt.tokens) :] / 2**24
        return {"noise": noise}

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Recorded":
        plain = super().sampler(model, batch, platform)
        kept = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return Recorded(**kept, vocabulary=self.vocabulary)


@struct.dataclass
class Row(masked.Row):
    """With the draws."""

    noise: jax.Array


@struct.dataclass
class Question:
    """What the draws of each step make of the logits; leaves are [M, ...].

    Attributes:
      noise: [M, STEPS, vocab].
      t, s: [M, STEPS], time before and after each step.
      last: [M] bool, all steps are over: the most probable ids are wanted.
    """

    noise: jax.Array
    t: jax.Array
    s: jax.Array
    last: jax.Array

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> Scores:
        """Drafts [tokens, STEPS], of which a mask is none."""
        is_mask = jnp.arange(logits.shape[-1]) == model.mask_token_id
        p = jax.nn.softmax(jnp.where(is_mask, -jnp.inf, logits), axis=-1)
        t, s = self.t[..., None], self.s[..., None]
        q = jnp.where(is_mask, s, p[:, None] * (t - s))
        drafts = jnp.argmax(q / (1e-10 - jnp.log(self.noise + 1e-10)), axis=-1)
        nothing = jnp.zeros(len(logits))
        drafts = jnp.where(self.last[:, None], jnp.argmax(p, axis=-1)[:, None], drafts)
        return Scores(drafts, *[nothing] * 5)


@dataclasses.dataclass(frozen=True)
class Recorded(Masked):
    """`Masked` with recorded draws; a row's `step` counts steps of time, of which those that change nothing take no
    forward.
    """

    vocabulary: int = 0

    def start(self, request: Request) -> Row:
        noise = request.own.get("noise", jnp.zeros((STEPS, ROOM, self.vocabulary)))
        return Row(**vars(super().start(request)), noise=noise)

    def ask(self, row: Row) -> masked.Window:
        own, step = row.settings.own, jnp.arange(STEPS)
        t = 1 - step * (1 - own["eps"]) / own["steps"]
        spread = lambda x: jnp.broadcast_to(x, (ROOM, *jnp.shape(x)))
        times = spread(t), spread(t - (1 - own["eps"]) / own["steps"])
        question = Question(jnp.swapaxes(row.noise, 0, 1), *times, spread(row.step == own["steps"]))
        return super().ask(row).replace(query=question)

    def advance(self, row: Row, window: masked.Window, seen: Scores) -> tuple[Row, jax.Array]:
        """Of the steps that are left the first that changes the text; behind them one forward more."""
        steps, step, place = row.settings.own["steps"], jnp.arange(STEPS), jnp.arange(ROOM)
        last = row.step == steps
        drafted = self.open(row.canvas, row.settings)[:, None] & (seen.draft != self.model.mask_token_id)
        drafted &= last | ((step >= row.step) & (step < steps))
        changes = drafted.any(axis=0)
        at = jnp.argmax(changes)
        order = jnp.argsort(~drafted[:, at], stable=True)
        canvas = row.canvas.commit(place[order], seen.draft[order, at], drafted[:, at].sum(), row.canvas.forwards - 1)
        after = row.replace(canvas=canvas, done=last, step=jnp.where(changes.any() & ~last, at + 1, steps))
        return select(row.done, row, after), jnp.int32(0)


@dataclasses.dataclass(frozen=True)
class RecordedScoresConfig(RecordedConfig):
    """SEDD's sampling: a forward for every step, and a last one, whose draws leave out the mask, the last id."""

    method: ClassVar[str] = "scores with recorded draws"

    select: str = setting("scores", "")

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """`noise` [STEPS + 1, ROOM, vocabulary] of the answer's tokens."""
        start, length = len(prompt.tokens), len(prompt.tokens) + prompt.limit
        random, steps = np.random.RandomState(prompt.config.seed), prompt.config.steps
        noise = np.ones((STEPS + 1, ROOM, self.vocabulary), np.float32)
        for step in range(steps + 1):
            ids = self.vocabulary - (step == steps)
            noise[step, : prompt.limit, :ids] = random.randint(0, 2**24, (length, ids))[start:] / 2**24
        return {"noise": noise}

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "RecordedScores":
        plain = super().sampler(model, batch, platform)
        return RecordedScores(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})


@struct.dataclass
class ScoresQuestion:
    """What the draws of a step make of the logits; leaves are [M, ...].

    Attributes:
      noise: [M, vocab].
      share: [M], 1 - s / t for the step from t to s.
      last: [M] bool, all steps are over: no mask is to be left.
    """

    noise: jax.Array
    share: jax.Array
    last: jax.Array

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> Scores:
        """Drafts [tokens], of which a mask is none."""
        is_mask = jnp.arange(logits.shape[-1]) == model.mask_token_id
        q = jnp.where(is_mask, 0.0, self.share[:, None] * jnp.exp(logits) / (model.logical_vocab_size - 1))
        stays = jnp.where(self.last, -1.0, 1 - q.sum(axis=-1))[:, None]
        drafts = jnp.argmax(jnp.where(is_mask, stays, q) / (1e-10 - jnp.log(self.noise + 1e-10)), axis=-1)
        return Scores(drafts, *[jnp.zeros(len(logits))] * 5)


@dataclasses.dataclass(frozen=True)
class RecordedScores(Recorded):
    """SEDD's update with recorded draws; every step takes a forward."""

    def start(self, request: Request) -> Row:
        noise = request.own.get("noise", jnp.zeros((STEPS + 1, ROOM, self.vocabulary)))
        return super().start(request).replace(noise=noise)

    def ask(self, row: Row) -> masked.Window:
        own = row.settings.own
        step = (1 - own["eps"]) / own["steps"]
        last = row.step == own["steps"]
        share = jnp.where(last, 1.0, step / (1 - row.step * step))
        spread = lambda x: jnp.broadcast_to(x, (ROOM,))
        question = ScoresQuestion(row.noise[row.step], spread(share), spread(last))
        return Masked.ask(self, row).replace(query=question)

    def advance(self, row: Row, window: masked.Window, seen: Scores) -> tuple[Row, jax.Array]:
        drafted = self.open(row.canvas, row.settings) & (seen.draft != self.model.mask_token_id)
        order = jnp.argsort(~drafted, stable=True)
        canvas = row.canvas.commit(order, seen.draft[order], drafted.sum(), row.canvas.forwards - 1)
        after = row.replace(canvas=canvas, done=row.step == row.settings.own["steps"], step=row.step + 1)
        return select(row.done, row, after), jnp.int32(0)
