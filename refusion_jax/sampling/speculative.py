"""Left-to-right decoding with several tokens per forward, and the answer of one token per forward.

A forward takes the last token and the draft behind it, and at each of them draws the next token as autoregressive
decoding would: with the same key, of the row and the token's place. As long as the draft is what was drawn, the next
draw is right too; the first one that differs is the answer's token, and what was behind it is dropped. So every token
is the one that autoregressive decoding gives, at any temperature, whatever the draft was. (For drafts that do not
depend on the key this is speculative sampling, arXiv 2211.17192: a draft is accepted with its probability, else the
token comes from the rest.)

Drafts are made in two ways:

    model    the same forward has runs of masks behind the places where the draft may end (`cuts`), each seeing the
             tokens up to there: a model that was trained to plan says what comes next. Masks draw with the keys of the
             tokens that they stand for, so that a draft with a temperature is often what is drawn afterwards.
    look-up  what followed, earlier in prompt or answer, the last tokens; for models that know no masks too

Letters: d = draft_length, c = cuts, W = 1 + d + c * (d + 1) tokens of a window. All functions are of one row.
"""

import dataclasses
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import SamplerConfig, setting
from refusion_jax.sampling.plan_and_infill import FREE_TOKENS
from refusion_jax.sampling.reduction import Query, Seen
from refusion_jax.sampling.state import BaseRow, Canvas, Request, first, select

CPU_TOKENS = 32  # of a batch's windows on a CPU, where none are free
LOOKUP_TOKENS = 1024  # the end of a prompt that look-up knows
LOOKUP_SURE = 0.8  # what a token of look-up counts as when the likely ends of a draft are chosen


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig(SamplerConfig):
    """The tokens of autoregressive decoding in fewer forwards. No setting but the common ones changes a token."""

    method: ClassVar[str] = "speculative"

    draft: str = setting(
        "model",
        "who drafts: the model from masks, look-up in prompt and answer (for any model), or look-up where it finds "
        "something and else the model",
        choices=("model", "lookup", "lookup_first"),
    )
    draft_length: int = setting(7, "most tokens that are drafted ahead")
    cuts: int = setting(0, "ends of a draft behind which the model drafts in the same forward; 0: chosen")
    ngram: int = setting(2, "of look-up: last tokens that must have been there before")

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("draft_length", 1), ("cuts", 0), ("ngram", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.cuts > self.draft_length + 1:
            raise UserError(
                f"cuts is {self.cuts}; a draft of draft_length {self.draft_length} has {self.draft_length + 1} ends."
            )

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Drafts by the model where it was trained to plan, as long as its slots."""
        given = super().suited(model, objective, given)
        if not (getattr(objective, "causal_share", 0) or getattr(objective, "kind", "") == "autoregressive"):
            warnings.warn(
                "As far as is known this model was not trained to write from left to right (objective.causal_share): "
                "the method speculative gives exactly what the method autoregressive does, and both may be worse than "
                "the model's own.",
                stacklevel=2,
            )
        plans = model.mask_token_id is not None and (objective is None or objective.needs_mask_token)
        given.setdefault("draft", "model" if plans else "lookup")
        given.setdefault("draft_length", min(max(getattr(objective, "slot_sizes", ()) or [8]), 16) - 1 or 1)
        return given

    def check(self, model: ModelConfig) -> None:
        if self.draft != "lookup" and model.mask_token_id is None:
            raise UserError(
                "The model has no mask token (mask_token_id is not set), so it cannot draft. Set draft to lookup, "
                "which works with any model."
            )

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """The end of the prompt, -1 before its begin."""
        tail = np.full(self.tail, -1, np.int32)
        known = prompt.tokens[-self.tail :] if self.tail else ()
        tail[self.tail - len(known) :] = known
        return {"tail": tail}

    @property
    def tail(self) -> int:
        return 0 if self.draft == "model" else LOOKUP_TOKENS

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Speculative":
        d, cpu = self.draft_length, platform == "cpu"
        room = (CPU_TOKENS if cpu else FREE_TOKENS) // batch - 1 - d
        cuts = 0 if self.draft == "lookup" else self.cuts or min(max(room // (d + 1), 1), d + 1)
        window = 1 + d + cuts * (d + 1)
        without = 1 if self.draft == "lookup" else 2 + d  # tokens of a row that has no draft
        return Speculative(
            model,
            length=self.length,
            draft_length=d,
            cuts=cuts,
            ngram=self.ngram,
            tail=self.tail,
            widths=(without, window) if cpu else (window,),
        )


@struct.dataclass
class Row(BaseRow):
    """Where the decoding of a prompt stands."""

    prompt_length: jax.Array
    tail: jax.Array  # [tail] end of the prompt, -1 before its begin
    last: jax.Array  # the token before the open position, which is not in the cache yet
    draft: jax.Array  # [d] ids behind it
    sure: jax.Array  # [d] what the draft is expected to be worth: probabilities
    drafted: jax.Array  # tokens of the draft


@struct.dataclass
class Window:
    """What a row forwards next."""

    tokens: jax.Array  # [W]
    positions: jax.Array  # [W]
    mask: jax.Array  # [W, W] bool (query, key)
    used: jax.Array  # tokens that are not padding
    query: Query
    cuts: jax.Array  # [c] tokens of the draft that each run of masks sees; -1: no run


@dataclasses.dataclass(frozen=True)
class Speculative:
    """The static part of a decoding; the same members as `PlanAndInfill`."""

    model: ModelConfig
    length: int
    draft_length: int
    cuts: int
    ngram: int
    tail: int
    widths: tuple[int, ...]
    held_back: int = 1  # the prompt's last token is the first window's
    in_place: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return self.widths[-1]

    def start(self, request: Request) -> Row:
        d = self.draft_length
        row = Row.begin(
            request,
            Canvas.empty(self.length, request.prompt_length - 1),
            prompt_length=request.prompt_length,
            tail=request.own.get("tail", jnp.full(self.tail, -1)),
            last=request.last_token,
            draft=jnp.zeros(d, jnp.int32),
            sure=jnp.zeros(d),
            drafted=jnp.int32(0),
        )
        return self.look_up(row) if self.tail else row

    def ask(self, row: Row) -> Window:
        """The last token, the draft, and runs of masks behind the ends that it is likely to have."""
        run = self.draft_length + 1
        cuts = self.likely_ends(row)
        index, known = jnp.arange(self.window), 1 + row.drafted
        # Of each token: whether it is known; else its run, its place there, and the known tokens that it sees.
        is_known, place = index < known, (index - known) % run
        of_run = jnp.where(is_known, -1, (index - known) // run)
        behind = jnp.append(cuts, -1)[jnp.clip(of_run, 0, self.cuts)]
        step = jnp.where(is_known, index, behind + 1 + place)  # tokens behind `last`

        tokens = jnp.append(row.last, row.draft)[jnp.minimum(index, self.draft_length)]
        masks = tokens if self.model.mask_token_id is None else self.model.mask_token_id
        sees_known = is_known & (index <= jnp.where(is_known, index, behind)[:, None])
        same_run = ~is_known & (of_run == of_run[:, None]) & (index <= index[:, None])
        # Known tokens draw the token behind them, masks the one that they stand for.
        drawn = row.canvas.count + step - ~is_known
        keys = jax.vmap(jax.random.fold_in, (None, 0))(row.key, drawn)
        tokens = jnp.where(is_known, tokens, masks)
        return Window(
            tokens=tokens,
            positions=row.prompt_length + row.canvas.count - 1 + step,
            mask=sees_known | same_run,
            used=known + jnp.sum(cuts >= 0) * run,
            query=Query.of(jnp.zeros_like(tokens), keys, row.settings),
            cuts=cuts,
        )

    def likely_ends(self, row: Row) -> jax.Array:
        """[c] tokens of the draft that may be accepted, the likeliest numbers first; -1: there are not so many."""
        ends = jnp.arange(self.draft_length + 1)
        sure = jnp.append(jnp.where(ends[:-1] < row.drafted, row.sure, 0.0), 0.0)
        reached = jnp.cumprod(jnp.append(1.0, sure[:-1]))
        chance = jnp.where(ends <= row.drafted, reached * (1 - sure), -1.0)
        chance, cuts = jax.lax.top_k(chance, self.cuts)
        return jnp.where(chance >= 0, cuts, -1)

    def advance(self, row: Row, window: Window, seen: Seen) -> tuple[Row, jax.Array]:
        """The row with the tokens that are right, and how many of the window go into the cache: as many."""
        places, count = jnp.arange(self.draft_length + 1), row.canvas.count
        tokens = seen.draft[: self.draft_length + 1]
        accepted = first((tokens[:-1] != row.draft) | (places[:-1] >= row.drafted))
        stop = first(row.settings.stops(tokens))
        new = jnp.minimum(jnp.minimum(accepted, stop) + 1, row.settings.limit - count)
        new = jnp.where(row.done, 0, new)
        canvas = row.canvas.commit(count + places, tokens, new, row.canvas.forwards - 1)
        done = row.done | (stop <= accepted) | (canvas.count == row.settings.limit)
        after = row.replace(done=done, canvas=canvas, last=tokens[accepted], drafted=jnp.int32(0))
        if self.cuts:
            after = self.foresee(after, window, seen, accepted, known=1 + row.drafted)
        if self.tail:
            after = self.look_up(after)
        return after.replace(drafted=jnp.minimum(after.drafted, row.settings.limit - canvas.count - 1)), new

    def foresee(self, row: Row, window: Window, seen: Seen, accepted: jax.Array, known: jax.Array) -> Row:
        """With the draft of the run of masks behind the accepted tokens, if there is one. Its first mask stood for the
        token that a known one drew.
        """
        d = self.draft_length
        run = first(window.cuts == accepted)
        at = known + run * (d + 1) + 1 + jnp.arange(d)
        draft, sure = (x.at[at].get(mode="clip") for x in (seen.draft, seen.draft_prob))
        return row.replace(draft=draft, sure=sure, drafted=jnp.where(run < self.cuts, d, 0))

    def look_up(self, row: Row) -> Row:
        """With what followed the last `ngram` tokens when they were there before, latest of all, if they were."""
        written = jnp.where(jnp.arange(self.length) < row.canvas.count, row.canvas.tokens, -1)
        text, end = jnp.concatenate([row.tail, written]), self.tail + row.canvas.count
        index, equal = jnp.arange(len(text)), jnp.bool_(True)
        for j in range(self.ngram):
            token = text[end - 1 - j]
            equal &= (jnp.roll(text, j) == token) & (token >= 0) & (index >= j)
        at = jnp.max(jnp.where(equal & (index < end - 1), index, -1))  # where they ended
        period = jnp.maximum(end - 1 - at, 1)  # a draft that comes to the end goes on as it began
        draft = text[at + 1 + jnp.arange(self.draft_length) % period]
        found = row.replace(
            draft=draft, sure=jnp.full(self.draft_length, LOOKUP_SURE), drafted=jnp.int32(self.draft_length)
        )
        return select(at >= 0, found, row)
