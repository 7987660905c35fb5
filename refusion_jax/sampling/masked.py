"""Masked diffusion decoding (LLaDA, Dream, DiffuLLaMA, MDLM, Fast-dLLM, EB-Sampler, dKV-Cache): an answer begins as
masks, every forward sees the whole text, and some of the masks are decided.

The methods are settings of one loop: which logits belong to a mask (`alignment`), in which order blocks and positions
are decided (`block_length`, `score`), how many by each forward (`select`, `schedule`), and what a forward computes
again (`cache`). README.md has a table of them.

Letters: G = `length` tokens of the answer, M of a block, S entries of the cache; entry = position. All functions are of
one row.
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
from refusion_jax.sampling import masked_caches, masked_select
from refusion_jax.sampling.config import SamplerConfig, Settings, setting
from refusion_jax.sampling.masked_select import KEEP_FLOOR, LINEAR_T, SCHEDULES, Question, Scores
from refusion_jax.sampling.state import Canvas, Request, first, select


@dataclasses.dataclass(frozen=True)
class MaskedConfig(SamplerConfig):
    """Decoding of masked diffusion models; top-p comes before top-k here, as in Dream's code."""

    method: ClassVar[str] = "masked"

    alignment: str = setting(
        "same", "which logits predict a token: those at its position, or the ones before", choices=("same", "shift")
    )
    block_length: int = setting(0, "tokens of a block, blocks being decoded from left to right; 0: one block")
    select: str = setting(
        "topk",
        "what a forward decides: as many as the schedule says, all that are sure enough, or each token by itself at a "
        "random time",
        choices=("topk", "threshold", "factor", "entropy_bound", "independent"),
    )
    schedule: str = setting("even", "of topk: how many each forward decides", choices=SCHEDULES)
    steps: int = setting(
        0,
        "forwards for the whole answer with topk and independent, 0: as many as tokens; with threshold no forward "
        "decides more than its share and what was refused before, 0: any number",
        traced=True,
    )
    eps: float = setting(1e-3, "time at the last step of linear_t and independent", traced=True)
    score: str = setting(
        "confidence",
        "which are decided first; given: as --order says",
        choices=("confidence", "margin", "entropy", "random", "given"),
    )
    order: tuple[int, ...] = setting((), "of score given: the positions of every block, as 2,0,1", traced=True)
    threshold: float = setting(0.9, "of threshold: least confidence", traced=True)
    factor: float = setting(
        1.0, "of factor: the nth best is decided while (n + 1)(1 - confidence) <= this", traced=True
    )
    gamma: float = setting(
        0.1, "of entropy_bound: nats that the decided tokens may have, the largest aside", traced=True
    )
    score_temperature: float = setting(
        1.0, "of the probabilities that scores are; 0: those that drafts are drawn from", traced=True
    )
    position_temperature: float = setting(0.0, "above 0, positions are drawn by softmax(score / this)", traced=True)
    cfg_scale: float = setting(0.0, "classifier-free guidance: twice the tokens in a forward; 0: none", traced=True)
    suppress: str = setting(
        "no",
        "end ids: never draft the EOS (logits), or decide end ids last (confidence)",
        choices=("no", "logits", "confidence", "both"),
    )
    cache: str = setting(
        "none", "positions that are not computed again in every forward; an approximation", choices=masked_caches.CACHES
    )
    cache_steps: int = setting(4, "of dkv caches: every so many forwards everything is computed again")
    cache_shift: str = setting(
        "un",
        "of dkv caches with shifted logits: a position is kept once the next one is decided (un), or both (un_right)",
        choices=("un", "un_right"),
    )
    cache_window: int = setting(4, "of dkv_greedy: open neighbours of each token decided next")
    stop: str = setting(
        "answer", "a row is done when its answer is, or with all gen_length tokens", choices=("answer", "length")
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it is compared with a probability and must lie in [0, 1].")
        if not 0 <= self.eps < 1:
            raise UserError(f"eps is {self.eps}; time falls from 1 to it, so it must lie in [0, 1).")
        for name in ("factor", "gamma", "score_temperature", "position_temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) <= math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name, least in dict(block_length=0, steps=0, cache_steps=1, cache_window=0).items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.block_length and self.gen_length % self.block_length:
            raise UserError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}; choose one that does, "
                "or another gen_length."
            )
        for wrong, message in self._impossible():
            if wrong:
                raise UserError(message)

    def _impossible(self) -> list[tuple[bool, str]]:
        steps, cached = f"steps is {self.steps}", f"cache = {self.cache!r}"
        scheduled = self.select in ("topk", "independent")
        in_blocks = self.cache in masked_caches.PREFIX_CACHES
        dkv = self.cache.startswith("dkv")
        return [
            (
                scheduled and self.steps % self.blocks > 0,
                f"{steps}, which {self.blocks} blocks cannot share equally; choose a multiple of {self.blocks}.",
            ),
            (
                self.select == "topk" and self.schedule == "even" and self.steps > self.gen_length,
                f"{steps} for {self.gen_length} tokens, so that some forwards would decide nothing; choose at most "
                f"{self.gen_length}.",
            ),
            (
                self.select == "threshold" and self.steps > 0 and (self.gen_length % self.steps > 0 or self.blocks > 1),
                f"{steps} with select = 'threshold', where it limits what a forward decides; it must divide gen_length "
                f"{self.gen_length} and there must be one block. Set it so, or to 0: no limit.",
            ),
            (
                self.select in ("factor", "entropy_bound") and self.steps > 0,
                f"{steps}, but with select = {self.select!r} the model decides how many forwards there are; leave it "
                "at 0.",
            ),
            (
                self.select != "topk" and self.schedule != "even",
                f"schedule = {self.schedule!r} says how many each forward decides, which select = {self.select!r} does "
                "in another way; use select = 'topk', or leave the schedule at 'even'.",
            ),
            (
                self.schedule == KEEP_FLOOR and (self.blocks > 1 or self.cache != "none"),
                "schedule = 'keep_floor' compares all positions of the answer in every forward: it needs one block and "
                "cache = 'none'.",
            ),
            (
                self.score in ("random", "given") and self.schedule == KEEP_FLOOR,
                f"schedule = 'keep_floor' keeps the least sure open, which score = {self.score!r} does not say; choose "
                "another score.",
            ),
            (
                (self.score == "given") != bool(self.order) or (self.score == "given" and not self._is_order()),
                "score = 'given' and order go together: the positions 0 to gen_length - 1 in the order in which they "
                "are decided, block after block.",
            ),
            (
                self.score == "given" and self.select != "topk",
                f"score = 'given' needs select = 'topk', not {self.select!r}: the order and the schedule say all.",
            ),
            (
                self.cfg_scale > 0 and self.cache != "none",
                f"cfg_scale is {self.cfg_scale} with {cached}: keys and values without the prompt would need a cache "
                "of their own. Use cache = 'none', or cfg_scale 0.",
            ),
            (
                self.select == "independent" and self.cache != "none",
                f"{cached} with select = 'independent' is not defined; use cache = 'none'.",
            ),
            (
                in_blocks
                and self.alignment == "shift"
                and (self.block < 2 or (self.select, self.schedule) not in (("topk", LINEAR_T), ("threshold", "even"))),
                f"{cached} with shifted logits decides the first token of a block by itself and the others by "
                "threshold or schedule = 'linear_t': use one of these, and blocks of at least 2.",
            ),
            (
                in_blocks and self.alignment == "shift" and self.select == "topk" and self.steps_of_block < 2,
                f"{cached} with shifted logits needs two steps for each block, the first of which decides one token; "
                f"{steps} for {self.blocks} blocks.",
            ),
            (
                self.cache in masked_caches.SHIFTED_CACHES and self.alignment == "same",
                f"{cached} is made for shifted logits, and alignment is 'same'; use 'dkv_decode'.",
            ),
            (
                dkv and self.alignment == "shift" and (self.blocks > 1 or self.cache == "dkv_greedy"),
                f"{cached} with shifted logits is not defined for blocks or a fixed order: use one block, and one of "
                "dkv_decode, dkv_prefill, dkv_pd.",
            ),
            (
                self.cache == "dkv_greedy"
                and (self.select != "topk" or self.schedule != "even" or self.score not in ("random", "given")),
                f"{cached} must know in advance what is decided when: it needs select = 'topk', schedule = 'even' and "
                "score = 'random' or 'given'.",
            ),
        ]

    def _is_order(self) -> bool:
        blocks = np.array(self.order).reshape(-1)
        if len(blocks) != self.gen_length:
            return False
        return (np.sort(blocks.reshape(self.blocks, -1), axis=1).reshape(-1) == np.arange(self.gen_length)).all()

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The objective's alignment; blocks of 32 for LLaDA's kind, Dream's own order for shifted logits."""
        given = super().suited(model, objective, given)
        given.setdefault("alignment", getattr(objective, "alignment", cls.alignment))
        if given["alignment"] == "same" and given["gen_length"] > 0:
            size = getattr(objective, "block_size", 0) or 32
            given.setdefault("block_length", math.gcd(given["gen_length"], size))
        if given["alignment"] == "shift" and given.get("select", cls.select) == "topk":
            given.setdefault("score_temperature", 0.0)
            for name, value in dict(schedule=LINEAR_T, score="entropy").items():
                given.setdefault(name, value)
        return given

    @property
    def block(self) -> int:
        """M, tokens of a block."""
        return self.block_length or self.gen_length

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block

    @property
    def steps_of_block(self) -> int:
        return (self.steps or self.gen_length) // self.blocks

    @property
    def groups(self) -> tuple[int, int]:
        return 0, self.block

    @property
    def static(self) -> dict[str, Any]:
        """Whether there is guidance, and for how many forwards of a block there is room, is compiled in too."""
        longest = 1 << (max(self.steps_of_block, self.block) - 1).bit_length()
        return super().static | {"guided": self.cfg_scale > 0, "longest": longest}

    def traced(self) -> dict[str, np.ndarray]:
        """Instead of `steps` the counts [longest] that follow from them: what each forward of a block decides."""
        found = super().traced()
        counts = np.zeros(self.static["longest"], np.int32)
        if self.select == "topk":
            of_block = masked_select.counts(self.schedule, self.block, self.steps_of_block, self.eps, self.leads)
            counts[: len(of_block)] = of_block
        elif self.select == "threshold":
            counts[: self.steps or None] = self.gen_length // self.steps if self.steps else self.block
        return found | {"steps": np.int32(self.steps_of_block), "counts": counts}

    @property
    def leads(self) -> bool:
        """Whether the first forward of a block decides its first token and no other: with shifted logits, that is the
        only forward that has those before the block.
        """
        return self.alignment == "shift" and self.cache in masked_caches.PREFIX_CACHES

    def check(self, model: ModelConfig) -> None:
        if model.mask_token_id is None:
            raise UserError(
                "The model has no mask token (mask_token_id is not set), so it cannot fill masks. Use a checkpoint "
                "trained with the objective 'masked', or the method autoregressive."
            )

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Masked":
        narrow = {"none": (), "prefix": (self.length,), "dual": (self.block,)}
        return Masked(
            model,
            length=self.length,
            block_length=self.block,
            alignment=self.alignment,
            selection=self.select,
            schedule=self.schedule,
            score=self.score,
            suppress=self.suppress,
            stop=self.stop,
            guided=self.cfg_scale > 0,
            leads=self.leads,
            cache=self.cache,
            cache_steps=self.cache_steps,
            cache_shift=self.cache_shift,
            cache_window=self.cache_window,
            widths=narrow.get(self.cache, (self.length + 1,)),
        )


@struct.dataclass
class Row:
    """Where the decoding of a prompt stands."""

    done: jax.Array
    prompt: jax.Array  # [S] ids by position
    prompt_length: jax.Array
    key: jax.Array
    settings: Settings
    canvas: Canvas
    block: jax.Array
    step: jax.Array  # forwards of this block so far
    refused: jax.Array  # tokens that forwards were allowed to decide and did not
    before: jax.Array  # [G] bool: open when the last forward began
    near: jax.Array  # [G] bool: of dkv_greedy, what the next forward computes again
    plan: jax.Array | None  # [G]: the step (independent) or rank within its block (given, dkv_greedy) of each token


@struct.dataclass
class Text:
    """The tokens that a row forwards next, those of F, and behind them padding; leaves are [S].

    Attributes:
      positions: of padding: S.
      unprompted: the same tokens with masks for the prompt, for guidance; without it None.
    """

    tokens: jax.Array
    positions: jax.Array
    unprompted: jax.Array | None


@struct.dataclass
class Window:
    """What a row forwards next, and what is asked of the logits of its block."""

    text: Text
    used: jax.Array  # tokens that are not padding
    at: jax.Array  # [M] where in the text the logits of each position are
    query: Question  # [M]
    scale: jax.Array  # of guidance


@dataclasses.dataclass(frozen=True)
class Masked:
    """The static part of a decoding; attributes as in `MaskedConfig`, `select` being `selection`.

    Attributes:
      in_place: entry = position in the cache; prompts are not forwarded by themselves.
      widths: tokens that a forward may take besides the whole cache.
    """

    model: ModelConfig
    length: int
    block_length: int
    alignment: str
    selection: str
    schedule: str
    score: str
    suppress: str
    stop: str
    guided: bool
    leads: bool
    cache: str
    cache_steps: int
    cache_shift: str
    cache_window: int
    widths: tuple[int, ...]
    in_place: ClassVar[bool] = True
    window: ClassVar[int] = 0  # entries behind the answer
    free: ClassVar[int] = 0
    held_back: ClassVar[int] = 0

    def start(self, request: Request) -> Row:
        zero = jnp.int32(0)
        return Row(
            done=jnp.bool_(False),
            prompt=request.prompt,
            prompt_length=request.prompt_length,
            key=request.key,
            settings=request.settings,
            canvas=Canvas.empty(self.length, zero),
            block=zero,
            step=zero,
            refused=zero,
            before=jnp.ones(self.length, bool),
            near=jnp.ones(self.length, bool),
            plan=self.plan(request),
        )

    def plan(self, request: Request) -> jax.Array | None:
        """[G] int32, see `Row`; None where the logits say what is decided when."""
        own, key = request.settings.own, jax.random.fold_in(request.key, 0)
        if self.selection == "independent":
            return masked_select.times_of(key, own["steps"], own["eps"], self.length)
        if self.score == "given":
            order = own["order"].reshape(-1, self.block_length) % self.block_length
            return jnp.argsort(order, axis=1).reshape(-1)
        if self.cache == "dkv_greedy":
            score = jax.random.uniform(key, (self.length // self.block_length, self.block_length))
            return jnp.argsort(jnp.argsort(score, axis=1), axis=1).reshape(-1)
        return None

    def needed(self, row: Row) -> jax.Array:
        return jnp.int32(0)

    def ask(self, row: Row, room: jax.Array) -> Window:
        size = len(row.prompt)
        position = jnp.arange(size)
        offset = position - row.prompt_length
        answer = jnp.where(row.canvas.when < 0, self.model.mask_token_id, row.canvas.tokens)
        text = jnp.where(offset < 0, row.prompt, answer[jnp.clip(offset, 0, self.length - 1)])
        flags = masked_caches.forwarded(self, row, offset)
        rank = jnp.cumsum(flags) - 1
        positions = jnp.full(size, size).at[jnp.where(flags, rank, size)].set(position, mode="drop")
        there = jnp.minimum(positions, size - 1)

        offsets = row.block * self.block_length + jnp.arange(self.block_length)
        at = rank[row.prompt_length + offsets - (self.alignment == "shift")]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key(row), offsets)
        unprompted = jnp.where(offset < 0, self.model.mask_token_id, text)[there] if self.guided else None
        return Window(
            text=Text(text[there], positions, unprompted),
            used=jnp.sum(flags),
            at=jnp.maximum(at, 0),  # what is not in the window is decided already
            query=Question.of(keys, row.settings, self.suppress),
            scale=row.settings.own["cfg_scale"],
        )

    def key(self, row: Row) -> jax.Array:
        """Of the row's next forward."""
        return jax.random.fold_in(row.key, row.canvas.forwards + 1)

    def advance(self, row: Row, window: Window, seen: Scores) -> tuple[Row, jax.Array]:
        """The row after the forward; nothing is appended to the cache."""
        m = self.block_length
        start = row.block * m
        of_block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, m)
        open = row.canvas.when < 0
        rank, chosen, allowed = self.choose(row, of_block(open), seen)
        order = jnp.argsort(jnp.where(chosen, rank, m))
        count = jnp.sum(chosen)
        canvas = row.canvas.commit(start + order, seen.draft[order], count, row.canvas.forwards - 1)
        if self.guided:
            canvas = canvas.replace(tokens_forwarded=canvas.tokens_forwarded + window.used * (window.scale > 0))
        over = ~of_block(canvas.when < 0).any()
        after = row.replace(
            done=self.finished(canvas, row.settings),
            canvas=canvas,
            block=row.block + over,
            step=jnp.where(over, 0, row.step + 1),
            refused=jnp.minimum(allowed - count, self.length),
            before=open,
            near=self.near(row, open),
        )
        return select(row.done, row, after), jnp.int32(0)

    def finished(self, canvas: Canvas, settings: Settings) -> jax.Array:
        """Whether all is decided, or all up to the first end id."""
        end = settings.limit
        if self.stop == "answer":
            end = jnp.minimum(end, first((canvas.when >= 0) & settings.stops(canvas.tokens)) + 1)
        return ((canvas.when >= 0) | (jnp.arange(self.length) >= end)).all()

    def choose(self, row: Row, among: jax.Array, seen: Scores) -> tuple[jax.Array, jax.Array, jax.Array]:
        """([M] rank of the block's positions, [M] bool: to be decided now, how many might have been).

        Args:
          among: [M] bool, open positions of the block.
        """
        own, place = row.settings.own, jnp.arange(self.block_length)
        order, rank = masked_select.by_score(self.scores(row, seen), among)
        quota = own["counts"].at[row.step].get(mode="fill", fill_value=0)
        if self.selection == "threshold":
            quota += row.refused
            chosen = masked_select.surest(seen, among, rank, own["threshold"]) & (rank < quota)
        elif self.selection == "factor":
            chosen = masked_select.by_factor(seen, among, order, rank, own["factor"])
        elif self.selection == "entropy_bound":
            chosen = masked_select.by_entropy(seen, among, order, rank, own["gamma"])
        elif self.selection == "independent":
            # Forwards that would decide nothing are left out: the next would see the same.
            plan = self.planned(row)
            chosen = among & (plan == jnp.where(among, plan, jnp.iinfo(jnp.int32).max).min())
        elif row.plan is not None:
            rank = self.planned(row)
            begin, end, _ = self.bounds(row)
            chosen = among & (rank >= begin) & (rank < end)
        elif self.schedule == KEEP_FLOOR:
            chosen = among & (masked_select.by_score(-self.scores(row, seen), place >= 0)[1] >= quota)
        else:
            chosen = among & (rank < quota)
        if self.leads:
            chosen = jnp.where(row.step == 0, place == 0, chosen)
        return rank, chosen, quota

    def scores(self, row: Row, seen: Scores) -> jax.Array:
        """[M] float32: positions with a high one are decided first."""
        if self.score in ("random", "given"):
            return jax.random.uniform(jax.random.fold_in(self.key(row), self.length), seen.entropy.shape)
        score = -seen.entropy if self.score == "entropy" else getattr(seen, self.score)
        key = jax.random.fold_in(self.key(row), self.length)
        return masked_select.random_score(key, score, row.settings.own["position_temperature"])

    def planned(self, row: Row) -> jax.Array:
        """[M] the plan of the row's block."""
        return jax.lax.dynamic_slice_in_dim(row.plan, row.block * self.block_length, self.block_length)

    def bounds(self, row: Row) -> jax.Array:
        """[3] int32: ranks of the plan from which this forward, the next and the one after it decide."""
        done = jnp.cumsum(row.settings.own["counts"])
        return jnp.where(row.step + jnp.arange(3) > 0, done[jnp.maximum(row.step + jnp.arange(3) - 1, 0)], 0)

    def near(self, row: Row, open: jax.Array) -> jax.Array:
        if self.cache != "dkv_greedy":
            return row.near
        in_block = jnp.arange(self.length) // self.block_length == row.block
        return masked_caches.near_next(self, row, open, jnp.where(in_block, row.plan, -1), self.bounds(row))
