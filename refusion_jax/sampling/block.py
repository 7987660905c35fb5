"""Block diffusion decoding (BD3-LM, SDAR, JetEngine, dllm): blocks are written from left to right, and inside the block
that is being written masks are decided in any order.

A forward takes one block behind a cache of finished ones, seen from inside it in both directions. A finished block is
forwarded once more, and what that leaves in the cache is final: no later block is seen by an earlier one, so the cache
is exact. The methods differ in which masks a forward decides (`reveal`); README.md has a table of them.

Letters: M tokens of a block, P of the prompt. All functions are of one row.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import masked_select
from refusion_jax.sampling.config import SamplerConfig, setting
from refusion_jax.sampling.masked_select import Question, Scores
from refusion_jax.sampling.reduction import at_most_p
from refusion_jax.sampling.state import BaseRow, Canvas, Request, first, select

MAX_BLOCK = 256  # a prompt is forwarded in chunks of at most so many tokens, which have to be whole blocks
COUNTED = ("sequential", "static", "dynamic")  # where a schedule says how many tokens a forward decides


@dataclasses.dataclass(frozen=True)
class BlockConfig(SamplerConfig):
    """Decoding of block diffusion models; an answer ends with a block, so it may be longer than gen_length."""

    method: ClassVar[str] = "block"

    block_size: int = setting(4, "tokens of a block; as trained")
    blocks_from: str = setting(
        "text",
        "where blocks are counted from; answer: the prompt's end, and the last block may be shorter",
        choices=("text", "answer"),
    )
    reveal: str = setting(
        "dynamic",
        "what a forward decides: the next masks, the surest ones, all sure ones, as many as entropy allows, a random "
        "one (first_hitting), or each mask at a random one of the steps (ddpm)",
        choices=(*COUNTED, "entropy", "first_hitting", "ddpm"),
    )
    fallback: str = setting(
        "top",
        "of dynamic: what is decided where too few are sure: the surest, or the next",
        choices=("top", "leftmost"),
    )
    steps: int = setting(
        0, "forwards of a block, at most; of ddpm the number of times, which may be more; 0: block_size", traced=True
    )
    schedule: str = setting(
        "even",
        "how many each of the steps decides: as equal as may be, or linear_t, as dllm rounds what falls due",
        choices=("even", "linear_t"),
    )
    threshold: float = setting(0.9, "of dynamic: confidence above which a token is decided", traced=True)
    gamma: float = setting(0.35, "of entropy: nats that the tokens decided together may have", traced=True)
    stop: str = setting(
        "answer", "a row is done behind the block with its end id, or behind gen_length", choices=("answer", "length")
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.block_size <= MAX_BLOCK:
            raise UserError(f"block_size is {self.block_size}; choose from 1 to {MAX_BLOCK}.")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it is compared with a probability and must lie in [0, 1].")
        if not 0 <= self.gamma <= math.inf:
            raise UserError(f"gamma is {self.gamma}; it is a number of nats, at least 0.")
        if self.steps < 0:
            raise UserError(f"steps is {self.steps}; it must be at least 1, or 0 for block_size.")
        for wrong, message in self._impossible():
            if wrong:
                raise UserError(message)

    def _impossible(self) -> list[tuple[bool, str]]:
        steps, reveal = f"steps is {self.steps}", f"reveal = {self.reveal!r}"
        return [
            (
                self.reveal in COUNTED and self.schedule == "even" and self.steps > self.block_size,
                f"{steps} for blocks of {self.block_size} tokens, so that some forwards would decide nothing; choose "
                f"at most {self.block_size}.",
            ),
            (
                self.reveal in ("entropy", "first_hitting") and self.steps > 0,
                f"{steps}, but with {reveal} a block takes as many forwards as it happens to; leave steps at 0.",
            ),
            (
                self.fallback != "top" and self.reveal != "dynamic",
                f"fallback = {self.fallback!r} is about too few sure tokens, which {reveal} does not know; use reveal "
                "= 'dynamic', or leave fallback at 'top'.",
            ),
            (
                self.schedule != "even" and self.reveal != "static",
                f"schedule = {self.schedule!r} goes with reveal = 'static' only, not {self.reveal!r}; leave it at "
                "'even'.",
            ),
        ]

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The objective's block size."""
        given = super().suited(model, objective, given)
        given.setdefault("block_size", min(getattr(objective, "block_size", cls.block_size), MAX_BLOCK))
        return given

    @property
    def length(self) -> int:
        return self.gen_length + (self.block_size - 1 if self.blocks_from == "text" else 0)

    def up_to(self, limit: int) -> int:
        return min(limit or self.gen_length, self.gen_length) + self.length - self.gen_length

    @property
    def groups(self) -> tuple[int, int]:
        return 0, self.block_size

    def prompt_block(self, prompt_length: int) -> tuple[int, int]:
        if self.blocks_from == "answer":
            return self.block_size, -prompt_length % self.block_size
        return self.block_size, 0

    def traced(self, limit: int) -> dict[str, np.ndarray]:
        """Besides `steps` the counts [2, M] that follow from them: what each forward of a block decides, and of a last
        block that is shorter.
        """
        steps, counts = self.steps or self.block_size, np.zeros((2, self.block_size), np.int32)
        if self.reveal in COUNTED:
            last = min(limit, self.gen_length) % self.block_size or self.block_size
            for row, size in zip(counts, (self.block_size, last), strict=True):
                linear = self.schedule == "linear_t"
                of_block = linear_t(size, steps) if linear else masked_select.counts("even", self.block_size, steps, 0)
                row[: len(of_block)] = of_block
        return super().traced(limit) | {"steps": np.int32(steps), "counts": counts}

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """`tail` [M]: the prompt's tokens in the first block that is decoded."""
        tail = np.zeros(self.block_size, np.int32)
        size, cut = self.prompt_block(len(prompt.tokens))
        count = (len(prompt.tokens) + cut) % size
        tail[:count] = prompt.tokens[len(prompt.tokens) - count :]
        return {"tail": tail}

    def check(self, model: ModelConfig) -> None:
        if model.mask_token_id is None:
            raise UserError(
                "The model has no mask token (mask_token_id is not set), so it cannot fill masks. Use a checkpoint "
                "trained with the objective 'block', or the method autoregressive."
            )

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Block":
        return Block(
            model,
            length=self.length,
            gen_length=self.gen_length,
            window=self.block_size,
            from_answer=self.blocks_from == "answer",
            reveal=self.reveal,
            fallback=self.fallback,
            stop=self.stop,
        )


def linear_t(tokens: int, steps: int) -> np.ndarray:
    """[at most steps] int32: how many tokens of a block each forward decides in dllm's code: of what is left the share
    that falls due as time falls from 1 to 0, rounded to even; forwards without any are left out.

    The shares are of float32 and the products of float64, as there: exact ones would round otherwise.
    """
    found, left = [], tokens
    for step in range(steps):
        t, s = (np.float32(1) - (np.float32(1) - np.float32((steps - step - i) / steps)) for i in (0, 1))
        found.append(int(np.round(left * (1 - float(s / t)))))
        left -= found[-1]
    return np.array([count for count in found if count], np.int32)


@struct.dataclass
class Row(BaseRow):
    """Where the decoding of a prompt stands."""

    prompt_length: jax.Array
    start: jax.Array  # position of the block's first token
    tokens: jax.Array  # [M] of the block
    open: jax.Array  # [M] bool: still masks
    step: jax.Array  # forwards of this block so far
    denoised: jax.Array  # forwards of all blocks, without those that only fill the cache
    plan: jax.Array  # [M] of ddpm: the step in which each token is decided


@struct.dataclass
class Window:
    """The block; leaves are [M]."""

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array  # [M, M] bool
    used: jax.Array  # tokens that are not padding
    query: Question


@struct.dataclass
class Nucleus(Question):
    """With top-p as BD3-LM has it: the ids below it, without the one that reaches it; at least one."""

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> Scores:
        for id in (model.mask_token_id, model.begin_token_id):
            logits = logits if id is None else jnp.where(jnp.arange(model.vocab_size) == id, -jnp.inf, logits)
        logits = logits / jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]
        plain = self.replace(temperature=jnp.sign(self.temperature), top_p=jnp.ones_like(self.top_p))
        return Question.answer(plain, model, below_p(logits, self.top_p) if sampled else logits, sampled)


def below_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The largest logits [tokens, vocab] of every token whose probabilities sum to at most top_p; at least one."""

    def cut(logits):
        kept = at_most_p(logits, top_p)
        total = jnp.sum(jnp.where(kept > -jnp.inf, jax.nn.softmax(logits, axis=-1), 0.0), axis=-1)
        least = jnp.min(jnp.where(kept > -jnp.inf, kept, jnp.inf), axis=-1)
        without = jnp.where(kept > least[:, None], kept, -jnp.inf)
        smaller = (total > top_p) & (least < jnp.max(kept, axis=-1)) & (top_p < 1)
        return jnp.where(smaller[:, None], without, kept)

    return jax.lax.cond((top_p < 1).any(), cut, lambda x: x, logits)


@dataclasses.dataclass(frozen=True)
class Block:
    """The static part of a decoding; the same members as `PlanAndInfill`.

    Attributes:
      length: most tokens of an answer; gen_length: those that were asked for.
      window: M.
      from_answer, reveal, fallback, stop: as in `BlockConfig`.
    """

    model: ModelConfig
    length: int
    gen_length: int
    window: int
    from_answer: bool
    reveal: str
    fallback: str
    stop: str
    in_place: ClassVar[bool] = False
    held_back: ClassVar[int] = 0

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.window,)

    def start(self, request: Request) -> Row:
        known = jnp.int32(0) if self.from_answer else request.prompt_length % self.window
        start, zero = request.prompt_length - known, jnp.int32(0)
        row = Row.begin(
            request,
            Canvas.empty(self.length, start),
            prompt_length=request.prompt_length,
            start=start,
            tokens=request.own.get("tail", jnp.zeros(self.window, jnp.int32)),
            open=jnp.arange(self.window) >= known,
            step=zero,
            denoised=zero,
            plan=jnp.zeros(self.window, jnp.int32),
        )
        return row.replace(open=row.open & self.inside(row), plan=self.plan(row))

    def inside(self, row: Row) -> jax.Array:
        """[M] bool: positions of the block that are not past the end of the answer."""
        if not self.from_answer:
            return jnp.ones(self.window, bool)
        return row.start + jnp.arange(self.window) < row.prompt_length + self.limit(row)

    def limit(self, row: Row) -> jax.Array:
        """Tokens that the row's blocks are to hold."""
        return jnp.minimum(row.settings.limit, self.gen_length)

    def plan(self, row: Row) -> jax.Array:
        """[M] int32, see `Row`: a mask that is independent of the others is decided in each step as likely."""
        key = jax.random.fold_in(jax.random.fold_in(row.key, row.start), self.window)
        return jax.random.randint(key, (self.window,), 0, row.settings.own["steps"])

    def ask(self, row: Row) -> Window:
        inside, place = self.inside(row), jnp.arange(self.window)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key(row), place)
        return Window(
            tokens=jnp.where(row.open, self.model.mask_token_id, row.tokens),
            positions=row.start + place,
            mask=jnp.broadcast_to(inside, (self.window, self.window)),
            used=jnp.sum(inside),
            query=self.question(row, keys),
        )

    def key(self, row: Row) -> jax.Array:
        """Of the row's next forward."""
        return jax.random.fold_in(row.key, row.canvas.forwards)

    def question(self, row: Row, keys: jax.Array) -> Question:
        """Of the positions with keys [M]; confidence is that of a token under the temperature it is drawn with."""
        settings = row.settings
        spread = lambda x: jnp.broadcast_to(x, (self.window, *jnp.shape(x)))
        warm = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
        values = settings.temperature, settings.top_k, settings.top_p, warm, settings.stop_ids
        kind = Nucleus if self.reveal in ("first_hitting", "ddpm") else Question
        return kind(jax.random.key_data(keys), *map(spread, values))

    def advance(self, row: Row, window: Window, seen: Scores) -> tuple[Row, jax.Array]:
        """The row with more of the block decided; or, if nothing was open, behind the block, whose tokens go into the
        cache.
        """
        full = ~row.open.any()
        chosen = self.choose(row, seen) & row.open
        order = jnp.argsort(~chosen, stable=True)
        offsets = row.start + order - row.prompt_length
        canvas = row.canvas.commit(offsets, seen.draft[order], jnp.sum(chosen), row.denoised)
        decided = row.replace(
            canvas=canvas,
            tokens=jnp.where(chosen, seen.draft, row.tokens),
            open=row.open & ~chosen,
            step=row.step + 1,
            denoised=row.denoised + 1,
        )
        moved = row.replace(start=row.start + self.window, step=jnp.int32(0))
        behind = moved.replace(done=self.finished(moved), open=self.inside(moved), plan=self.plan(moved))
        after = select(row.done, row, select(full, behind, decided))
        return after, jnp.where(full & ~row.done, window.used, 0)

    def finished(self, row: Row) -> jax.Array:
        """Whether the blocks before the row's are all."""
        limit = self.limit(row)
        if self.stop == "answer":
            ends = (row.canvas.when >= 0) & row.settings.stops(row.canvas.tokens)
            limit = jnp.minimum(limit, first(ends) + 1)
        return row.start >= row.prompt_length + limit

    def choose(self, row: Row, seen: Scores) -> jax.Array:
        """[M] bool: masks to be decided now, and possibly positions that are none."""
        own, place = row.settings.own, jnp.arange(self.window)
        short = ~self.inside(row).all()
        quota = own["counts"][short.astype(jnp.int32)].at[row.step].get(mode="fill", fill_value=self.window)
        next_ones = place < first(row.open) + quota
        _, rank = masked_select.by_score(-seen.doubt, row.open)  # many confidences are 1 in float32
        if self.reveal == "sequential":
            return next_ones
        if self.reveal == "static":
            return rank < quota
        if self.reveal == "dynamic":
            sure = row.open & (seen.confidence > own["threshold"])
            return jnp.where(jnp.sum(sure) >= quota, sure, rank < quota if self.fallback == "top" else next_ones)
        if self.reveal == "entropy":
            order, rank = masked_select.by_score(-seen.entropy, row.open)
            within = jnp.cumsum(seen.entropy[order]) < own["gamma"]
            return rank < jnp.maximum(jnp.sum(within & row.open[order]), 1)
        if self.reveal == "first_hitting":
            return jnp.cumsum(row.open) == 1 + jnp.floor(self.number(row) * jnp.sum(row.open)).astype(jnp.int32)
        # Steps that would decide nothing are left out: the next would see the same.
        return row.plan == jnp.where(row.open, row.plan, jnp.iinfo(jnp.int32).max).min()

    def number(self, row: Row) -> jax.Array:
        """Of first_hitting, a number in [0, 1) that says which of the masks is decided."""
        return jax.random.uniform(jax.random.fold_in(self.key(row), self.window))
