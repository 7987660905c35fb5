"""Left-to-right decoding, one token per forward: the baseline, on the same cache and in the same loop."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import SamplerConfig
from refusion_jax.sampling.reduction import Query, Seen
from refusion_jax.sampling.state import BaseRow, Canvas, Request


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig(SamplerConfig):
    """One token per forward, from left to right."""

    method: ClassVar[str] = "autoregressive"

    def up_to(self, limit: int) -> int:
        return min(limit, self.length) or self.length

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "Autoregressive":
        return Autoregressive(model, self.length)


@struct.dataclass
class Row(BaseRow):
    """Where the decoding of a prompt stands."""

    prompt_length: jax.Array
    last: jax.Array  # the token before the open position, which is not in the cache yet


@struct.dataclass
class Window:
    """The one token that is forwarded; its leaves have an axis of 1."""

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    used: jax.Array
    query: Query


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """The static part of a decoding; the same members as `PlanAndInfill`."""

    model: ModelConfig
    length: int
    window: int = 1
    widths: tuple[int, ...] = (1,)
    in_place: ClassVar[bool] = False
    held_back: int = 1  # the prompt's last token is the first window

    def start(self, request: Request) -> Row:
        return Row.begin(
            request,
            Canvas.empty(self.length, request.prompt_length - 1),
            prompt_length=request.prompt_length,
            last=request.last_token,
        )

    def ask(self, row: Row) -> Window:
        count = row.canvas.count
        token = row.last[None]
        keys = jax.random.fold_in(row.key, count)[None]
        return Window(
            tokens=token,
            positions=(row.prompt_length + count - 1)[None],
            mask=jnp.ones((1, 1), bool),
            used=jnp.int32(1),
            query=Query.of(jnp.zeros_like(token), keys, row.settings),
        )

    def advance(self, row: Row, window: Window, seen: Seen) -> tuple[Row, jax.Array]:
        """The row with one more token, and how many tokens of the window go into the cache."""
        count, active = row.canvas.count, ~row.done
        canvas = row.canvas.commit(count[None], seen.draft, active.astype(jnp.int32), count)
        last = seen.draft[0]
        done = row.done | row.settings.stops(last) | (canvas.count == row.settings.limit)
        return row.replace(done=done, canvas=canvas, last=last), active.astype(jnp.int32)
