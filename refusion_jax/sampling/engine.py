"""A batch of rows being decoded: requests join and leave, and one place forwards, reduces, commits and prefills.

    engine = Engine(params, model, config, batch=8, max_prompt_length=512)
    row = engine.add(Prompt(ids, config))         # None: no row is free
    for answer in engine.step(forwards=16): ...   # what has been finished
    engine.cancel(row)

What it runs is compiled in programs.py.
"""

import dataclasses
from collections.abc import Collection, Sequence

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import (
    MAX_STOP_IDS,
    Generation,
    SamplerConfig,
    Settings,
    check_batch,
    check_prompt,
    check_prompts,
)
from refusion_jax.sampling.prefixes import BLOCK, Prefixes
from refusion_jax.sampling.programs import Chunk, cache_bucket, decode_params, make_sampler, programs
from refusion_jax.sampling.state import Request

# A prefill forwards at most so many tokens of prompts per shard of the batch: one row's, or of several rows that need
# less.
PREFILL_TOKENS = 256
PREFILL_WIDTHS = (16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request: what to answer, and how.

    Attributes:
      tokens: ids of the prompt.
      config: its traced part (thresholds, temperature, top-k, top-p) is this request's own; its `static` part must be
        the engine's.
      index: returned with the answer; with `seed` it chooses the random stream.
      limit: tokens the answer may have; 0: as many as the engine's config says.
      stop_ids: ids that end the answer besides the model's EOS.
      stream: chooses the random stream in place of the index, where that only tells requests apart.
      positions: of the tokens in the text, ascending; empty: 0, 1, 2, ...
      holes: (position, tokens) of each hole of the text that is to be filled, `limit` in all; empty: the answer stands
        behind the prompt.
    """

    tokens: Sequence[int]
    config: SamplerConfig
    index: int = 0
    seed: int = 0
    limit: int = 0
    stop_ids: tuple[int, ...] = ()
    stream: int | None = None
    positions: Sequence[int] = ()
    holes: tuple[tuple[int, int], ...] = ()

    def places(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """([length] int32 position in the text of each of so many places of the answer, [length] int32 number of the
        hole that it lies in); what is no hole's lies behind the text.
        """
        inside = [position + i for position, size in self.holes for i in range(size)]
        hole = [number for number, (_, size) in enumerate(self.holes) for _ in range(size)]
        behind = len(self.tokens) + np.arange(len(inside), length)
        return np.int32([*inside, *behind]), np.int32(hole + [len(self.holes)] * len(behind))


class Engine:
    """Rows of a batch, and the requests that they serve. Nothing is held open between calls."""

    def __init__(
        self,
        params: dict,
        model: ModelConfig,
        config: SamplerConfig,
        batch: int,
        *,
        max_prompt_length: int = 0,
        prefix_blocks: int = 0,
        mesh: Mesh | None = None,
    ):
        """Makes an empty batch.

        Args:
          params: of a checkpoint, or as `decode_params` gives them.
          config: its static part holds for all requests.
          batch: rows; rounded up to a multiple of the mesh's data x fsdp.
          max_prompt_length: makes room for prompts of this length at once; the cache grows when a longer one comes.
          prefix_blocks: blocks of the beginnings of prompts whose keys and values are kept (see prefixes.py).
          mesh: devices to decode on (rows over data x fsdp, weights over tensor).

        Raises:
          UserError: settings and model do not fit together, or a batch without rows.
        """
        check_batch(batch)
        check_prompts([], model, config)
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
        self.batch = -(-batch // self._shards) * self._shards
        self.model, self.config = model, config
        self.sampler = make_sampler(model, config, self.batch, mesh)
        self._programs = programs(self.sampler, mesh)
        self._params = decode_params(params, mesh)
        self.cache_length = self._needed(max_prompt_length)
        settings = Settings.of(config, model.eos_token_id)
        self._state = self._programs.empty(settings, self.batch, self.cache_length)
        self._owner: list[Prompt | None] = [None] * self.batch
        self._left: dict[int, int] = {}  # of rows that do not decode yet: prompt tokens in the cache
        # Where a token sees those behind it too, what it leaves in the cache depends on them.
        causal = not self.sampler.in_place and config.prompt_block(1)[0] == 1
        self.prefixes = Prefixes(prefix_blocks if causal else 0)
        self._decoding: list[int] = []  # rows of the passes that were launched last
        self.committed = np.zeros(self.batch, np.int32)  # tokens of every row's answer, after the last `step`
        self.steps = 0  # passes of the whole batch
        self.prefills = 0  # passes over prompts

    def add(self, prompt: Prompt) -> int | None:
        """The row that will answer a prompt; None when all are taken.

        Raises:
          UserError: the prompt and the model do not fit together, or its settings need another engine.
        """
        check_prompt(prompt.tokens, self.model, prompt.config, prompt.limit, f"Prompt {prompt.index}")
        self._check_request(prompt)
        row = next((row for row, owner in enumerate(self._owner) if owner is None), None)
        if row is None:
            return None
        needed = self._needed(len(prompt.tokens), prompt.limit)
        if needed > self.cache_length:
            self.cache_length = needed
            self._state = self._programs.grow(self._state, needed)
        self._owner[row], self._left[row] = prompt, self._reuse(row, prompt)
        return row

    def prefill(self, passes: int) -> None:
        """At most so many passes over waiting prompts; `step` begins with it."""
        for _ in range(passes):
            if not self._left:
                break
            waiting, chunk = list(self._left), self._next_chunk()
            self._state = self._programs.prefill(self._params, self._state, chunk)
            self.prefills += 1
            for row in waiting:
                if row not in self._left:
                    self._remember(row)

    def step(self, forwards: int = 1, unfinished: Collection[int] = ()) -> list[Generation]:
        """`launch`, then `collect`."""
        self.launch(forwards)
        return self.collect(unfinished)

    def launch(self, forwards: int = 1) -> None:
        """Begins at most so many passes over waiting prompts, then over all rows, these until a row is done. Nothing is
        waited for: before `collect` the host may do other work.
        """
        self.prefill(forwards)
        self._decoding = [row for row, owner in enumerate(self._owner) if owner is not None and row not in self._left]
        if self._decoding:
            self._state, self._passes = self._programs.run(
                self._params, self._state, np.int32(forwards), np.int32(len(self._decoding))
            )

    def collect(self, unfinished: Collection[int] = ()) -> list[Generation]:
        """Waits for what was launched.

        Args:
          unfinished: rows whose answers are also returned, as far as they are written, when they are not finished.

        Returns:
          The finished answers, whose rows are free again.
        """
        decoding = self._decoding
        self.committed[:] = 0
        if not decoding:
            return []
        rows = self._state.rows
        steps, done, canvas = jax.device_get((self._passes, rows.done, vars(rows.canvas)))
        self.steps += int(steps)
        self.committed[decoding] = canvas["count"][decoding]
        answers = []
        for row in decoding:
            if not (done[row] or row in unfinished):
                continue
            prompt = self._owner[row]
            of_row = {name: values[row] for name, values in canvas.items()}
            stops = (self.model.eos_token_id, *prompt.stop_ids)
            sizes = [size for _, size in prompt.holes] or [prompt.limit or self.sampler.length]
            answers.append(Generation.of(prompt.index, of_row, stops, sizes, bool(done[row])))
            if done[row]:
                self._owner[row] = None
        return answers

    def cancel(self, row: int) -> None:
        """Frees a row; its answer is never returned."""
        self._owner[row] = None
        self._left.pop(row, None)
        self._decoding = [other for other in self._decoding if other != row]
        self._state = self._programs.stop(self._state, np.int32(row))

    def forward(self, steps: int) -> None:
        """So many passes over all rows, whether they are done or not, to be timed."""
        self._state, _ = self._programs.run(self._params, self._state, np.int32(steps), np.int32(0))
        jax.block_until_ready(self._state)

    def compiled(self) -> jax.stages.Compiled:
        """The loop, compiled by itself, to be looked at."""
        return self._programs.run.lower(self._params, self._state, np.int32(0), np.int32(0)).compile()

    @property
    def busy(self) -> int:
        """Rows with a request."""
        return sum(owner is not None for owner in self._owner)

    def _needed(self, prompt_length: int, limit: int = 0) -> int:
        return cache_bucket(prompt_length + self.config.up_to(limit) + self.sampler.window)

    def _check_request(self, prompt: Prompt) -> None:
        if prompt.config.static != self.config.static:
            raise UserError(
                f"Request {prompt.index} wants {prompt.config.static}, but this engine was made for "
                f"{self.config.static}. Use another engine; for a shorter answer set `limit`."
            )
        if not 0 <= prompt.limit <= self.sampler.length:
            raise UserError(f"Request {prompt.index} has limit {prompt.limit}; choose from 1 to {self.sampler.length}.")
        if prompt.holes:
            prompt.config.check_holes([size for _, size in prompt.holes])
        if len(prompt.stop_ids) >= MAX_STOP_IDS:
            raise UserError(
                f"Request {prompt.index} has {len(prompt.stop_ids)} stop_ids; at most {MAX_STOP_IDS - 1} are possible."
            )

    def _reuse(self, row: int, prompt: Prompt) -> int:
        """Puts kept beginnings of a prompt into its row; how many tokens they are. One token at least is left to be
        forwarded: with it the row starts.
        """
        blocks = [] if prompt.positions else self.prefixes.find(prompt.tokens[: max(0, self._alone(prompt) - 1)])
        for index, block in enumerate(blocks):
            self._state = self._programs.put(self._state, np.int32(row), np.int32(index * BLOCK), block)
        return len(blocks) * BLOCK

    def _remember(self, row: int) -> None:
        """Keeps the beginnings of a prompt that has just come into the cache."""
        prompt = self._owner[row]
        if prompt.positions:
            return
        for key, offset in self.prefixes.lacking(prompt.tokens[: self._alone(prompt)]):
            self.prefixes.keep(key, self._programs.take(self._state, np.int32(row), np.int32(offset)))

    def _next_chunk(self) -> Chunk:
        """The next tokens of waiting prompts, on the host: the first in line decides the width, others that need no
        more join.
        """
        own = self.batch // self._shards
        left = {row: self._alone(self._owner[row]) - at for row, at in self._left.items()}
        if self.sampler.in_place:  # whole prompts, which are only noted down
            width, slots = self.cache_length, own
        else:
            longest = next(iter(left.values()))
            width = next((width for width in PREFILL_WIDTHS if width >= longest), PREFILL_WIDTHS[-1])
            slots = min(PREFILL_TOKENS // width, own)
        chosen: list[list[int]] = [[] for _ in range(self._shards)]
        for row, count in left.items():
            if len(chosen[row // own]) < slots and (count <= width or row == next(iter(left))):
                chosen[row // own].append(row)
        parts = [[self._part(row, width) for row in rows] for rows in chosen]
        nothing = jax.tree.map(np.zeros_like, next(part for rows in parts for part in rows)).replace(row=np.int32(own))
        stack = lambda *leaves: np.stack(leaves)
        rows = [jax.tree.map(stack, *part, *[nothing] * (slots - len(part))) for part in parts]
        chunk = jax.tree.map(stack, *rows)
        chex.assert_shape(chunk.tokens, (self._shards, slots, width))
        return chunk

    def _alone(self, prompt: Prompt) -> int:
        """Tokens of a prompt that are forwarded by themselves, before its first window."""
        size, lacking = prompt.config.prompt_block(len(prompt.tokens))
        count = len(prompt.tokens) - self.sampler.held_back
        return count - (count + lacking) % size

    def _part(self, row: int, width: int) -> Chunk:
        """The next at most `width` prompt tokens of a row; they count as prefilled."""
        prompt, at = self._owner[row], self._left[row]
        total, (size, lacking) = self._alone(prompt), prompt.config.prompt_block(len(prompt.tokens))
        count = min(width, total - at)
        if at + count < total:  # no block is cut
            count -= (at + count + lacking) % size
        tokens, positions = np.zeros((2, width), np.int32)
        tokens[:count] = prompt.tokens[at : at + count]
        positions[:count] = (prompt.positions or range(total))[at : at + count]
        self._left[row] += count
        if at + count == total:
            del self._left[row]
        settings = Settings.of(
            prompt.config, self.model.eos_token_id, limit=prompt.limit or self.sampler.length, stop_ids=prompt.stop_ids
        )
        return Chunk(
            row=np.int32(row % (self.batch // self._shards)),
            tokens=tokens,
            positions=positions,
            blocks=((at + lacking + np.arange(width)) // size).astype(np.int32),
            offset=np.int32(at),
            count=np.int32(count),
            last=np.bool_(at + count == total),
            seed=np.uint32(prompt.seed),
            index=np.uint32(prompt.index if prompt.stream is None else prompt.stream),
            request=Request(
                prompt_length=np.int32(len(prompt.tokens)),
                last_token=np.int32(prompt.tokens[-1]),
                key=None,
                settings=settings,
                own=prompt.config.own(prompt),
            ),
        )
