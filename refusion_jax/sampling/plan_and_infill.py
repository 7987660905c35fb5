"""Plan-and-infill decoding (method section 4): what a row forwards next, and what follows from it.

Letters: n slots of a block, k tokens of a slot, c chunks of a window, W = c * k tokens of a window.

A *chunk* is a slot with its first `cut` tokens known and masks behind them. Every phase forwards chunks on top of the
cache:

    plan       every remaining slot, cut 0; each chunk sees the chunks before it
    verify     every chosen slot's draft, cut k; each sees the chunks before it
    complete   every chosen slot, cut k (verify) or its accepted prefix (predict); each sees only itself

These are the *main* chunks, and what is committed is always a prefix of them. Behind them the window has room for
chunks that may be needed next: speculation.py, which changes nothing but the number of forwards.

An answer is the text behind its prompt, or what is missing of a text: holes of whole slots, before and behind which
everything is given and in the cache from the start. Its slots are numbered through all holes. A stop id ends its hole;
decoding ends with the last one.

All functions are of one row; the engine maps them over the batch, rows in different phases side by side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import speculation
from refusion_jax.sampling.config import SamplerConfig, Settings, setting
from refusion_jax.sampling.reduction import Query, Seen
from refusion_jax.sampling.slots import Outcome, Row, Window
from refusion_jax.sampling.state import Canvas, Request, first, select

PLAN, VERIFY, COMPLETE = range(3)

# Tokens a forward takes in about the time that reading the weights takes, on chips made for this.
FREE_TOKENS = 160
# On a CPU every token costs: 4, 8, 16 and 32 tokens take 1.1, 1.5, 2.7 and 4.6 times as long as one. So forwards are no
# wider than their rows need, in so many widths: a quarter, a half, .. of a window.
CPU_WIDTHS = 4


@dataclasses.dataclass(frozen=True)
class PlanAndInfillConfig(SamplerConfig):
    """ReFusion's decoding (method section 4). gen_length is rounded up to whole slots."""

    method: ClassVar[str] = "plan_and_infill"

    slot_size: int = setting(32, "k, tokens of a slot")
    blocks: int = setting(4, "parts decoded strictly left to right; the rounded gen_length / blocks is whole slots")
    slot_threshold: float = setting(
        0.9, "choose slots whose first token has a confidence above this, in [0, 1]", traced=True
    )
    token_threshold: float = setting(
        0.4, "accept drafts whose autoregressive probability is above this, in [0, 1]", traced=True
    )
    speculate: str = setting(
        "auto",
        "carry tokens that may be needed next in the same forward; auto: not on CPUs, elsewhere as many as batch and "
        "slots leave free. Changes the number of forwards, never a token",
        choices=("off", "on", "auto"),
    )
    window: int = setting(0, "most tokens of a row's window with speculation; 0: chosen")

    def __post_init__(self):
        super().__post_init__()
        for name in ("slot_size", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.slots % self.blocks:
            raise UserError(
                f"gen_length {self.length} (rounded up to whole slots) in {self.blocks} blocks leaves blocks that are "
                f"no multiple of slot_size {self.slot_size}; choose blocks that divide {self.slots} slots, or another "
                "gen_length."
            )
        for name in ("slot_threshold", "token_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it is compared with a probability and must lie in [0, 1]."
                )
        if self.window < 0:
            raise UserError(f"window is {self.window}; it must be 0 (chosen for you) or a number of tokens.")

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Its largest slot size, and blocks of about 4 slots."""
        given = super().suited(model, objective, given)
        k = given.setdefault("slot_size", max(getattr(objective, "slot_sizes", ()) or [cls.slot_size]))
        if k > 0 and given["gen_length"] > 0:  # else the config says what is wrong
            slots = -(-given["gen_length"] // k)
            given.setdefault("blocks", slots // next(n for n in range(min(4, slots), slots + 1) if slots % n == 0))
        return given

    @property
    def slots(self) -> int:
        """Slots of the whole answer."""
        return -(-self.gen_length // self.slot_size)

    @property
    def length(self) -> int:
        return self.slots * self.slot_size

    @property
    def groups(self) -> tuple[int, int]:
        return self.slot_size, self.length // self.blocks

    def up_to(self, limit: int) -> int:
        """Whole slots."""
        return min(-(-limit // self.slot_size) * self.slot_size, self.length) or self.length

    def check(self, model: ModelConfig) -> None:
        if model.mask_token_id is None:
            raise UserError(
                "The model has no mask token (mask_token_id is not set), so it cannot plan. Use a checkpoint trained "
                "with the ReFusion objective, or the method autoregressive."
            )

    def check_holes(self, sizes: Sequence[int]) -> None:
        for index, size in enumerate(sizes):
            if size % self.slot_size:
                raise UserError(
                    f"Hole {index} has {size} tokens, but holes are whole slots of slot_size {self.slot_size}: make it "
                    f"{-(-size // self.slot_size) * self.slot_size}, or choose another slot_size."
                )

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """Where the slots of the answer lie in the text, and in which of its holes."""
        positions, holes = prompt.places(self.length)
        return {"positions": positions, "holes": holes[:: self.slot_size]}

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "PlanAndInfill":
        n, k, cpu = self.slots // self.blocks, self.slot_size, platform == "cpu"
        tokens = {"off": 0, "auto": FREE_TOKENS // batch, "on": max(FREE_TOKENS, 2 * n * k)}[self.speculate]
        carry = self.speculate == "on" or (self.speculate == "auto" and (not cpu or self.window > 0))
        chunks = max(n, (self.window or tokens) // k) if carry else n
        parts = CPU_WIDTHS if cpu else 1
        return PlanAndInfill(
            model,
            slots=n,
            slot_size=k,
            blocks=self.blocks,
            widths=tuple(sorted({-(-chunks * part // parts) * k for part in range(1, parts + 1)})),
            carry=carry,
        )


@dataclasses.dataclass(frozen=True)
class PlanAndInfill:
    """The static part of a decoding; two equal ones share their compiled programs.

    Attributes:
      slots: n, slots of a block.
      widths: tokens that a forward may take, multiples of k; the last is W, at least n * k.
      carry: whether speculative chunks fill the window.
      held_back: tokens of the prompt that are left to the first window.
    """

    model: ModelConfig
    slots: int
    slot_size: int
    blocks: int
    widths: tuple[int, ...]
    carry: bool = False
    held_back: int = 0
    in_place: ClassVar[bool] = False

    @property
    def length(self) -> int:
        """Tokens of a whole response."""
        return self.slots * self.slot_size * self.blocks

    @property
    def window(self) -> int:
        return self.widths[-1]

    @property
    def chunks(self) -> int:
        """c, chunks of a window."""
        return self.window // self.slot_size

    def start(self, request: Request) -> Row:
        n, k = self.slots, self.slot_size
        closed = jnp.zeros(n * self.blocks, bool)
        return Row.begin(
            request,
            Canvas.empty(self.length, request.prompt_length),
            positions=request.own.get("positions", jnp.arange(self.length)),
            holes=request.own.get("holes", jnp.zeros(n * self.blocks, jnp.int32)),
            phase=jnp.int32(PLAN),
            block=jnp.int32(0),
            round=jnp.int32(0),
            closed=closed,
            remaining=self.open_slots(request.settings, closed)[0],
            chosen=jnp.zeros(n, bool),
            fill=jnp.zeros((n, k), jnp.int32),
            confidence=jnp.zeros((n, k)),
            prefix=jnp.zeros(n, jnp.int32),
            predicting=jnp.zeros(n, bool),
        )

    def open_slots(self, settings: Settings, closed: jax.Array) -> jax.Array:
        """[blocks, n] bool: slots that begin before the row's limit and whose hole has not ended before them."""
        begin = jnp.arange(len(closed)) * self.slot_size
        return ((begin < settings.limit) & ~closed).reshape(self.blocks, self.slots)

    def holes(self, row: Row) -> jax.Array:
        """[n] hole of each slot of the row's block."""
        return row.holes.reshape(self.blocks, self.slots)[row.block]

    # ------------------------------------------------------------------ what a row forwards

    def ask(self, row: Row) -> Window:
        """The window of a row in whatever phase it is."""
        n, k, c = self.slots, self.slot_size, self.chunks
        slot, column = jnp.arange(n), jnp.arange(k)
        planning = row.phase == PLAN
        main = jnp.where(planning, row.remaining, row.chosen)
        cut = jnp.where(planning, 0, jnp.where(row.predicting, row.prefix, k))
        stop_at = first(row.settings.stops(row.fill))
        stop_slot = first(main & (stop_at < k))
        end = jnp.sum(main & (slot < stop_slot)) * k + stop_at[stop_slot % n] + 1
        main_end = jnp.where(stop_slot < n, end, jnp.sum(main) * k)

        # Candidates in order of need: main, next plan, guesses cut by cut, likely ones first. As many as there is room
        # for.
        carried = speculation.carry(self, row, main, stop_at, stop_slot, ~planning & self.carry)
        by_cut = lambda flags: flags.T.reshape(-1)
        guesses = [by_cut(carried.guess & carried.likely), by_cut(carried.guess & ~carried.likely)]
        wanted = jnp.concatenate([main, carried.plan, *guesses])
        slots = jnp.concatenate([slot, slot, jnp.tile(slot, 2 * k)])
        cuts = jnp.concatenate([cut, jnp.zeros(n, jnp.int32), jnp.tile(jnp.repeat(column, n), 2)])
        rank = jnp.cumsum(wanted) - 1
        at = jnp.where(wanted & (rank < c), rank, c)
        candidate = jnp.full(c, 2 * n).at[at].set(jnp.arange(len(wanted)), mode="drop")
        chunk_slot, chunk_cut = slots[candidate], cuts[candidate]
        is_main, is_plan = candidate < n, (candidate >= n) & (candidate < 2 * n)
        chunk_block = row.block + (is_plan & carried.next_block)

        tokens = jnp.where(column < chunk_cut[:, None], row.fill[chunk_slot], self.model.mask_token_id)
        offsets = ((chunk_block * n + chunk_slot)[:, None] * k + column).reshape(-1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(row.key, row.round + 1), offsets)

        # Every chunk sees itself up to each token; main chunks see those before them unless they are being completed,
        # the next plan sees the main tokens up to the first stop id and itself.
        chunk = jnp.repeat(jnp.arange(c), k)
        token = jnp.arange(c * k)
        is_main, is_plan = jnp.repeat(is_main, k), jnp.repeat(is_plan, k)
        same, before = chunk[:, None] == chunk, chunk[:, None] > chunk
        together = is_main[:, None] & is_main & (row.phase != COMPLETE)
        planned = is_plan[:, None] & (is_plan | (token < main_end))
        return Window(
            tokens=tokens.reshape(-1),
            offsets=offsets,
            positions=row.positions[offsets],
            mask=(same & (token[:, None] >= token)) | (before & (together | planned)),
            used=jnp.minimum(wanted.sum(), c) * k,
            query=Query.of(jnp.roll(tokens, -1, axis=1).reshape(-1), keys, row.settings),
            main_at=at[:n],
            plan_at=at[n : 2 * n],
            guess_at=jnp.minimum(*at[2 * n :].reshape(2, k, n)).T,
            main_end=main_end,
        )

    # ------------------------------------------------------------------ what follows from it

    def advance(self, row: Row, window: Window, seen: Seen) -> tuple[Row, jax.Array]:
        """The row after the forward, and how many tokens of the window it committed."""
        by_chunk = jax.tree.map(lambda x: x.reshape(self.chunks, self.slot_size), seen)
        # Of chunks by number; those that are nowhere read another's and are never used.
        of = lambda at: jax.tree.map(lambda x: x.at[at].get(mode="clip"), by_chunk)
        main, guess = of(window.main_at), speculation.Guess(of(window.guess_at), window.guess_at < self.chunks)
        drafts, plan = of(window.main_at), of(window.plan_at)

        outcome = select(row.phase == VERIFY, self.verify(row, main, guess), self.complete(row, main, guess))
        outcome = select(row.phase == PLAN, self.unchanged(row), outcome)
        after, count = self.commit(row, window, outcome)
        # A plan has been made: by this forward's main chunks, or by those it carried if all that they saw is committed.
        carried = (count > 0) & (count == window.main_end) & (window.plan_at < self.chunks).any() & ~after.done
        planned = self.choose(after, select(carried, plan, drafts))
        return select((row.phase == PLAN) | carried, planned, after), count

    def unchanged(self, row: Row) -> Outcome:
        """A plan commits nothing."""
        none = jnp.zeros(self.slots, bool)
        return Outcome(none, jnp.int32(self.slots), row.chosen, row.fill, row.confidence, row.prefix, row.predicting)

    def rejected(self, row: Row, main: Seen) -> jax.Array:
        """[n, k]: tokens whose probability, given the one before, is too low; not the accepted ones and one more."""
        given = jnp.roll(main.next_prob, 1, axis=1)
        return (jnp.arange(self.slot_size) > row.prefix[:, None]) & (given <= row.settings.own["token_threshold"])

    def verify(self, row: Row, main: Seen, guess: speculation.Guess) -> Outcome:
        """Method section 4, step 2: the leading run of accepted tokens of all drafts together; without a whole
        slot, step 3.
        """
        n, k = self.slots, self.slot_size
        run = first(self.rejected(row, main))
        stop_at = first(row.settings.stops(row.fill))
        broken = row.chosen & (run < k)
        reached = row.chosen & (jnp.cumsum(broken) <= broken)  # every slot before it is accepted
        stop_slot = first(reached & (stop_at < run))
        taken = jnp.where(stop_slot < n, reached & (jnp.arange(n) <= stop_slot), reached & (run == k))
        verified = self.unchanged(row).replace(taken=taken, stop_slot=stop_slot)
        return select(taken.any(), verified, self.complete(row, main, guess))

    def complete(self, row: Row, main: Seen, guess: speculation.Guess) -> Outcome:
        """Method section 4, step 3: each chosen slot by itself predicts behind its prefix, or verifies what it
        predicted.
        """
        k, column = self.slot_size, jnp.arange(self.slot_size)
        # In a global verify, only the first chosen slot saw what it sees in a completion.
        alone = (row.phase == COMPLETE) | (jnp.arange(self.slots) == first(row.chosen))
        stop, guessed, next_top, next_prob = speculation.follow(row.fill, self.rejected(row, main), guess, alone)
        predict = row.predicting[:, None]
        prefix = jnp.where(row.predicting, row.prefix, stop)
        behind = column >= prefix[:, None]
        fill = jnp.where(behind, jnp.where(predict, main.top, next_top), row.fill)
        confidence = jnp.where(behind, jnp.where(predict, main.top_prob, next_prob), row.confidence)

        stopped = row.chosen & (first(row.settings.stops(fill)) < prefix)
        final = stopped | (prefix == k)
        last = first(stopped)
        alive = row.chosen & (jnp.arange(self.slots) <= last)  # what is behind a stop id is discarded
        whole = (row.phase == COMPLETE) | (alive.sum() == 1)
        return Outcome(
            taken=alive & whole & (final | ~alive).all(),
            stop_slot=last,
            chosen=alive,
            fill=fill,
            confidence=confidence,
            prefix=prefix,
            predicting=row.chosen & ~row.predicting & ~guessed & ~final,
        )

    def commit(self, row: Row, window: Window, outcome: Outcome) -> tuple[Row, jax.Array]:
        """The row with the outcome's slots committed up to the first stop id, and how many tokens that were."""
        n, k = self.slots, self.slot_size
        committing = outcome.taken.any() & ~row.done
        ends = committing & (outcome.stop_slot < n)
        stop_at = first(row.settings.stops(row.fill))[outcome.stop_slot % n]
        count = jnp.where(committing, jnp.sum(outcome.taken) * k, 0) - jnp.where(ends, k - 1 - stop_at, 0)
        canvas = row.canvas.commit(window.offsets[: n * k], window.tokens[: n * k], count, row.round - 1)

        number, hole = jnp.arange(n * self.blocks), self.holes(row)[outcome.stop_slot % n]
        closed = row.closed | (ends & (row.holes == hole) & (number >= row.block * n + outcome.stop_slot))
        open_slots = self.open_slots(row.settings, closed)
        remaining = row.remaining & ~outcome.taken & open_slots[row.block]
        over = committing & ~remaining.any()
        later = open_slots.any(axis=1) & (jnp.arange(self.blocks) > row.block)
        done = row.done | (over & ~later.any())
        block = jnp.where(over & ~done, first(later), row.block)
        return row.replace(
            done=done,
            canvas=canvas,
            phase=jnp.where(committing, PLAN, COMPLETE).astype(jnp.int32),
            block=block,
            closed=closed,
            remaining=jnp.where(over & ~done, open_slots[block], remaining),
            chosen=outcome.chosen,
            fill=outcome.fill,
            confidence=outcome.confidence,
            prefix=outcome.prefix,
            predicting=outcome.predicting,
        ), count

    def choose(self, row: Row, draft: Seen) -> Row:
        """Method section 4, step 1: a round with the slots whose first token is sure enough, or the best one."""
        score = jnp.where(row.remaining, draft.draft_prob[:, 0], -1)
        chosen = score > row.settings.own["slot_threshold"]
        return row.replace(
            phase=jnp.int32(VERIFY),
            round=row.round + 1,
            chosen=jnp.where(chosen.any(), chosen, jnp.arange(self.slots) == jnp.argmax(score)),
            fill=draft.draft,
            confidence=draft.draft_prob,
            prefix=jnp.zeros_like(row.prefix),
            predicting=jnp.zeros_like(row.predicting),
        )
