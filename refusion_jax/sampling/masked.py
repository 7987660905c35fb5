"""Masked diffusion decoding (LLaDA, Dream, MDLM, Fast-dLLM, EB-Sampler, dKV-Cache, FreeCache, ..): an answer begins as
masks, every forward sees the whole text, and some of the masks are decided. There are as many masks as the request's
limit says: behind the prompt, or in the holes of a text, whose given parts, wherever they stand, are its prompt. The
masks are numbered through all holes, and blocks are parts of all together. A stop id ends its hole.

The methods are settings of one loop: which logits belong to a mask (`alignment`), in which order blocks and positions
are decided (`block_length`, `score`), how many by each forward (`select`, `schedule`), and what a forward computes
again (`cache`). README.md has a table of them.

Letters: G = `length` tokens of the answer, M of a block, S entries of the cache; entry = position in the text. All
functions are of one row.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import agreement, masked_caches, masked_select
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.dllm_cache import Features, Refresh
from refusion_jax.sampling.masked_select import KEEP_FLOOR, LINEAR_T, Question, Scores
from refusion_jax.sampling.masked_settings import MaskedSettings
from refusion_jax.sampling.state import BaseRow, Canvas, Request, select


@dataclasses.dataclass(frozen=True)
class MaskedConfig(MaskedSettings):
    """Decoding of masked diffusion models; top-p comes before top-k here, as in Dream's code."""

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The objective's alignment; blocks of at most 32 for LLaDA's kind, Dream's own order for shifted logits,
        SEDD's update of all masks together where scores are what was learnt.
        """
        given = super().suited(model, objective, given)
        learnt = getattr(objective, "alignment", cls.alignment)
        if given.setdefault("alignment", learnt) != learnt and objective:
            raise UserError(
                f"alignment is {given['alignment']!r}, but the model was trained with {learnt!r}: its logits would be "
                "taken for those of other positions. Leave the alignment out."
            )
        if getattr(objective, "kind", None) == "sedd" and given.setdefault("select", "scores") == "scores":
            given = dict(block_length=0, eps=1e-5) | given
        if given["alignment"] == "same" and given["gen_length"] > 0:
            size = getattr(objective, "block_size", 0) or 32
            fitting = [n for n in range(1, size + 1) if given["gen_length"] % n == 0]
            given.setdefault("block_length", fitting[-1])
        if given["alignment"] == "shift" and given.get("select", cls.select) == "topk":
            given.setdefault("score_temperature", 0.0)
            for name, value in dict(schedule=LINEAR_T, score="entropy").items():
                given.setdefault(name, value)
        return given

    def check(self, model: ModelConfig) -> None:
        if model.mask_token_id is None:
            raise UserError(
                "The model has no mask token (mask_token_id is not set), so it cannot fill masks. Use a checkpoint "
                "trained with the objective 'masked', or the method autoregressive."
            )

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Masked":
        some = max(int(self.length * self.transfer_ratio), 1)
        narrow = {"none": (), "prefix": (self.length,), "dual": (self.block,), "dllm": (some, self.length)}
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
            cache_shift=self.cache_shift,
            widths=narrow.get(self.cache, (self.length + 1,)),
            transfer=self.transfer_ratio > 0,
        )


@struct.dataclass
class Row(BaseRow):
    """Where the decoding of a prompt stands."""

    prompt: jax.Array  # [S] ids of all that is given, without gaps
    prompt_length: jax.Array
    places: jax.Array  # [G] position in the text of each of the answer's tokens
    holes: jax.Array  # [G] number of the hole that it lies in; a plain answer is one
    block: jax.Array
    step: jax.Array  # forwards of this block so far
    refused: jax.Array  # tokens that forwards were allowed to decide and did not
    before: jax.Array  # [G] bool: open when the last forward began
    near: jax.Array  # [G] bool: of dkv_greedy, what the next forward computes again
    unprompted: jax.Array  # forwards without the prompt, with dLLM-Cache and guidance
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
    refresh: Refresh | None  # of dLLM-Cache
    refresh_unprompted: Refresh | None  # the same without the prompt; a limit of 0: not now
    block: agreement.Block | None  # what a causal pass is to agree with


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
    cache_shift: str
    widths: tuple[int, ...]
    transfer: bool
    in_place: ClassVar[bool] = True
    held_back: ClassVar[int] = 0

    @property
    def verified(self) -> bool:
        """Whether a causal pass follows every forward."""
        return self.selection == "agreement"

    @property
    def window(self) -> int:
        """Entries behind the answer."""
        return self.block_length if self.verified and self.alignment == "same" else 0

    def start(self, request: Request) -> Row:
        zero = jnp.int32(0)
        return Row.begin(
            request,
            Canvas.empty(self.length, request.prompt_length if self.verified else zero),
            prompt=request.prompt,
            prompt_length=request.prompt_length,
            places=request.own.get("places", request.prompt_length + jnp.arange(self.length)),
            holes=request.own.get("holes", jnp.zeros(self.length, jnp.int32)),
            block=zero,
            step=zero,
            refused=zero,
            before=jnp.ones(self.length, bool),
            near=jnp.ones(self.length, bool),
            unprompted=zero,
            plan=self.plan(request),
        )

    def plan(self, request: Request) -> jax.Array | None:
        """[G] int32, see `Row`; None where the logits say what is decided when."""
        own, key = request.settings.own, jax.random.fold_in(request.key, 0)
        if self.selection == "independent":
            return masked_select.times_of(key, own["steps"], own["eps"], self.length)
        if self.score == "given":
            first = jnp.argsort(own["order"].reshape(-1, self.block_length) % self.block_length, axis=1)
        elif self.cache == "dkv_greedy":
            first = jax.random.uniform(key, (self.length // self.block_length, self.block_length))
        else:
            return None
        behind = jnp.arange(self.length).reshape(first.shape) >= request.settings.limit
        return jnp.argsort(jnp.argsort(jnp.where(behind, jnp.inf, first), axis=1), axis=1).reshape(-1)

    def ask(self, row: Row) -> Window:
        size = len(row.prompt)
        position, offset = jnp.arange(size), self.offset(row)
        answer = jnp.where(row.canvas.when < 0, self.model.mask_token_id, row.canvas.tokens)
        given = row.prompt[jnp.cumsum(offset < 0) - 1]
        text = jnp.where(offset < 0, given, answer[jnp.clip(offset, 0, self.length - 1)])
        flags = masked_caches.forwarded(self, row, offset)
        rank = jnp.cumsum(flags) - 1
        positions = jnp.full(size, size).at[jnp.where(flags, rank, size)].set(position, mode="drop")
        there = jnp.minimum(positions, size - 1)

        offsets = row.block * self.block_length + jnp.arange(self.block_length)
        at = rank[jnp.maximum(row.places[offsets] - (self.alignment == "shift"), 0)]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key(row), offsets)
        unprompted = jnp.where(offset < 0, self.model.mask_token_id, text)[there] if self.guided else None
        refresh = unprompted_refresh = None
        used = jnp.sum(flags)
        if self.cache == "dllm":
            refresh = self.refresh(row, row.canvas.forwards - row.unprompted, jnp.bool_(True))
            used = jnp.maximum(refresh.tokens, 1)
            if self.guided:
                unprompted_refresh = self.refresh(row, row.unprompted, self.measures(row))
                used = jnp.maximum(used, unprompted_refresh.tokens)
        return Window(
            text=Text(text[there], positions, unprompted),
            used=used,
            at=jnp.maximum(at, 0),  # what is not in the window is decided already
            query=Question.of(keys, row.settings, self.suppress),
            scale=row.settings.own["cfg_scale"],
            refresh=refresh,
            refresh_unprompted=unprompted_refresh,
            block=self.block_of(row, text) if self.verified else None,
        )

    def block_of(self, row: Row, text: jax.Array) -> agreement.Block:
        """For the causal pass; `text` [S]."""
        start = row.block * self.block_length
        of_block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.block_length)
        return agreement.Block(
            before=text[row.prompt_length + start - 1],
            tokens=of_block(row.canvas.tokens),
            open=of_block(row.canvas.when) < 0,
            start=row.prompt_length + start,
            used=jnp.clip(row.settings.limit - start, 0, self.block_length),
            spare=row.prompt_length + row.settings.limit,
        )

    def offset(self, row: Row) -> jax.Array:
        """[S] int32: number of each position among the answer's tokens, below the limit where there is one. What is
        given before the first of them is counted back from it; what is given behind it has a very low number.
        """
        position = jnp.arange(len(row.prompt))
        end = row.prompt_length + row.settings.limit
        behind = jnp.where(position < end, -len(row.prompt), position - row.prompt_length)
        given = jnp.where(position < row.places[0], position - row.places[0], behind)
        return given.at[row.places].set(jnp.arange(self.length), mode="drop")

    def refresh(self, row: Row, forwards: jax.Array, now: jax.Array) -> Refresh:
        """What goes through all layers in a row's next forward, after so many; not now: nothing."""
        own = row.settings.own
        return Refresh(
            prompt_length=row.prompt_length,
            places=row.places,
            limit=jnp.where(now, row.settings.limit, 0),
            prompt=now & (forwards % own["prompt_interval"] == 0),
            answer=now & (forwards % own["gen_interval"] == 0),
            count=jnp.where(now, own["transfer"], 0),
        )

    def measures(self, row: Row) -> jax.Array:
        """Whether a row's next step forwards the text without its prompt too, with dLLM-Cache."""
        step = row.canvas.forwards - row.unprompted
        return (row.settings.own["cfg_scale"] > 0) & ((step < 5) | (step % row.settings.own["cfg_interval"] == 0))

    def features(self, batch: int, cache_length: int) -> Features | agreement.Kept | None:
        """What a cache keeps besides keys and values."""
        if self.verified:
            return agreement.Kept.empty(self.model, batch, cache_length)
        return Features.empty(self.model, batch, cache_length, self.guided) if self.cache == "dllm" else None

    def key(self, row: Row) -> jax.Array:
        """Of the row's next forward."""
        return jax.random.fold_in(row.key, row.canvas.forwards + 1)

    def advance(self, row: Row, window: Window, seen: Scores) -> tuple[Row, jax.Array]:
        """The row after the forward; nothing is appended to the cache."""
        m = self.block_length
        start = row.block * m
        of_block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, m)
        open = self.open(row.canvas, row.settings)
        rank, chosen, allowed = self.choose(row, of_block(open), seen)
        order = jnp.argsort(jnp.where(chosen, rank, m))
        count = jnp.sum(chosen)
        canvas = row.canvas.commit(start + order, seen.draft[order], count, row.canvas.forwards - row.unprompted - 1)
        unprompted = row.unprompted
        if self.verified:
            of_pass = window.block.used * (1 if self.alignment == "shift" else 2)
            canvas = canvas.replace(tokens_forwarded=canvas.tokens_forwarded + of_pass)
        if self.guided and window.refresh is None:
            canvas = canvas.replace(tokens_forwarded=canvas.tokens_forwarded + window.used * (window.scale > 0))
        if window.refresh is not None:  # through the first layer all go
            tokens = window.refresh.prompt_length + window.refresh.limit
            canvas = canvas.replace(tokens_forwarded=canvas.tokens_forwarded + tokens - window.used)
            if self.guided:
                measured = window.refresh_unprompted.limit > 0
                unprompted += measured
                canvas = canvas.forwarded(jnp.where(measured, tokens, 0))
        over = ~of_block(self.open(canvas, row.settings)).any()
        after = row.replace(
            done=self.finished(row, canvas),
            canvas=canvas,
            block=row.block + over,
            step=jnp.where(over, 0, row.step + 1),
            refused=jnp.minimum(allowed - count, self.length),
            before=open,
            near=self.near(row, open),
            unprompted=unprompted,
        )
        if self.schedule == KEEP_FLOOR and self.stop == "length":  # all steps, though decoding may run ahead of them
            after = after.replace(done=row.canvas.forwards == row.settings.own["steps"])
        return select(row.done, row, after), jnp.int32(0)

    def open(self, canvas: Canvas, settings: Settings) -> jax.Array:
        """[G] bool: positions of the answer that are not decided."""
        return (canvas.when < 0) & (jnp.arange(self.length) < settings.limit)

    def finished(self, row: Row, canvas: Canvas) -> jax.Array:
        """Whether all is decided, or all up to the first end id of each hole."""
        open = self.open(canvas, row.settings)
        if self.stop == "answer":
            ends = (canvas.when >= 0) & row.settings.stops(canvas.tokens)
            open &= jax.lax.cummax(jnp.where(ends, row.holes, -1)) < row.holes
        return ~open.any()

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
        elif self.selection == "agreement":
            rank, chosen = place, masked_select.by_agreement(seen, among)
        elif self.selection == "independent":
            # Forwards that would decide nothing are left out: the next would see the same.
            plan = self.planned(row)
            chosen = among & (plan == jnp.where(among, plan, jnp.iinfo(jnp.int32).max).min())
        elif self.selection == "scores":
            key = jax.random.fold_in(self.key(row), self.length)
            chosen = among & masked_select.by_mass(key, seen, row.step, own["steps"], own["eps"])
        elif row.plan is not None:
            rank = self.planned(row)
            begin, end, _ = self.bounds(row)
            chosen = among & (rank >= begin) & (rank < end)
        elif self.schedule == KEEP_FLOOR:
            answer = place < row.settings.limit
            chosen = among & (masked_select.by_score(-self.scores(row, seen), answer)[1] >= quota)
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
        return masked_caches.near_next(row, open, jnp.where(in_block, row.plan, -1), self.bounds(row))
