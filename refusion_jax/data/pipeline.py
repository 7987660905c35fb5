"""Packed rows by number, and batches of them.

Row number i means the same tokens in every process, whatever the number of processes, devices or microbatches: the
whole state of the data is the number of the next row.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from refusion_jax.config import SourceConfig
from refusion_jax.data import packing
from refusion_jax.data.cache import cached_tokens
from refusion_jax.data.examples import in_part
from refusion_jax.data.pieces import Pieces, cut
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in the data; all counts are of one epoch.

    Attributes:
      examples: examples in the epoch; pieces of long documents count as examples.
      dropped: examples longer than max_length.
      tokens: of the examples, prompts included.
      rows: packed rows.
      max_length, max_examples_per_row: of a row.
      padding_share: share of the rows' positions that hold no token.
      sources: (name, examples kept, pieces of long documents among them, examples dropped) of each source's part,
        whatever its weight.
    """

    examples: int
    dropped: int
    tokens: int
    rows: int
    max_length: int
    max_examples_per_row: int
    padding_share: float
    sources: tuple[tuple[str, int, int, int], ...]

    @property
    def mean_length(self) -> float:
        return self.tokens / self.examples

    def __str__(self):
        lines = [
            f"{name}: {kept:,} examples"
            + (f", {pieces:,} of them pieces of documents longer than {self.max_length}" if pieces else "")
            + (f", {dropped:,} dropped (longer than {self.max_length})" if dropped else "")
            for name, kept, pieces, dropped in self.sources
        ]
        lines.append(
            f"one epoch: {self.examples:,} examples of {self.mean_length:.1f} tokens on average in {self.rows:,} rows "
            f"of {self.max_length} (at most {self.max_examples_per_row} examples each), {self.padding_share:.2%} "
            "padding"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a source that is used: `kept` are the indices of its examples, or pieces, that fit in a row."""

    name: str
    pieces: Pieces
    kept: np.ndarray
    dropped: int
    weight: float


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """An epoch's rows as lists of examples: `plan` over the epoch's examples; of each its number and its pass."""

    plan: packing.Plan
    numbers: np.ndarray  # int64 [examples]
    passes: np.ndarray  # int64 [examples]


class Rows:
    """Packed rows of all sources: `rows[i]` for any i >= 0, epoch after epoch. Made by `load_rows`.

    A row is a dict: tokens int32 [length], examples end to end from index 0, then padding; prompt_lengths and lengths
    int32 [examples] (0: no example); example_ids uint32 [examples], the number of this pass over this example, which
    does not depend on where it is packed.

    In an epoch every kept example of a source with weight 1 comes once. Weight w means w passes per epoch: with 0.5 the
    epochs take halves of one random order in turn, with 2 every example comes twice.

    Threads may read at once. An epoch is planned in the background from the middle of the one before on, so that nobody
    waits for it who does not need it yet.

    Attributes:
      fingerprint: all that decides which tokens row i holds, by name; equal fingerprints, equal rows.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        max_length: int,
        max_examples_per_row: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        content: dict[str, str | float] | None = None,
    ):
        """
        Args:
          content: what `parts` are made from, for the fingerprint.
        """
        self._parts, self._seed, self._shuffle, self._pad_id = parts, seed, shuffle, pad_id
        # Of each source in the numbering of all examples.
        self._base = np.cumsum([0, *(len(part.pieces) for part in parts)])
        self._lengths = np.concatenate([part.pieces.lengths for part in parts])
        self._prompt_lengths = np.concatenate([part.pieces.prompt_lengths for part in parts])
        self.max_length = max_length
        kept = np.concatenate([part.pieces.lengths[part.kept] for part in parts])
        self.max_examples_per_row = max_examples_per_row or packing.examples_per_row(kept, max_length)
        self.fingerprint = {
            "packing": packing.FORMAT,
            "seed": seed,
            "shuffle": shuffle,
            "data.max_length": max_length,
            "data.max_examples_per_row": self.max_examples_per_row,
            **(content or {}),
        }
        self._lock = threading.Lock()
        self._plans: dict[int, concurrent.futures.Future[EpochPlan]] = {}
        self._ends: list[int] = []  # row number after each epoch planned so far
        self.locate(0)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; other epochs differ by a few, as they pack differently."""
        return self._ends[0]

    def locate(self, i: int) -> tuple[int, int]:
        """(epoch, row within the epoch) of row number i."""
        while not self._ends or i >= self._ends[-1]:
            epoch = len(self._ends)
            rows = len(self._plan(epoch).plan)
            with self._lock:
                if len(self._ends) == epoch:  # no other thread was faster
                    self._ends.append((self._ends[-1] if self._ends else 0) + rows)
        epoch = bisect.bisect_right(self._ends, i)
        return epoch, i - (self._ends[epoch - 1] if epoch else 0)

    def __getitem__(self, i: int) -> Batch:
        epoch, row = self.locate(int(i))
        planned = self._plan(epoch)
        if self._shuffle and row >= len(planned.plan) // 2:  # evaluation stays in the first epoch
            self._start_plan(epoch + 1)
        at = planned.plan[row]
        numbers, count = planned.numbers[at], len(at)
        result = self.empty_row()
        result["lengths"][:count] = self._lengths[numbers]
        result["prompt_lengths"][:count] = self._prompt_lengths[numbers]
        result["example_ids"][:count] = (planned.passes[at] * self._base[-1] + numbers) % 2**32
        end = 0
        for number, source in zip(numbers, np.searchsorted(self._base, numbers, side="right") - 1):
            ids = self._parts[source].pieces[number - self._base[source]]
            result["tokens"][end : end + len(ids)] = ids
            end += len(ids)
        return result

    def empty_row(self) -> Batch:
        """A row without examples."""
        examples = self.max_examples_per_row
        return {
            "tokens": np.full(self.max_length, self._pad_id, np.int32),
            "prompt_lengths": np.zeros(examples, np.int32),
            "lengths": np.zeros(examples, np.int32),
            "example_ids": np.zeros(examples, np.uint32),
        }

    def _plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, made now if nobody has begun to; only who needs this epoch waits for it."""
        future = self._start_plan(epoch)
        with self._lock:
            # Other threads may still want rows of the epoch before, or have begun with the next.
            self._plans = {e: plan for e, plan in self._plans.items() if abs(e - epoch) <= 1}
        return future.result()

    def _start_plan(self, epoch: int) -> concurrent.futures.Future[EpochPlan]:
        """Begins to plan an epoch in the background, unless that was done."""
        with self._lock:
            if epoch in self._plans:
                return self._plans[epoch]
            future = self._plans[epoch] = concurrent.futures.Future()

        def make() -> None:
            try:
                future.set_result(self._make_plan(epoch))
            except BaseException as error:  # for the thread that needs the plan
                future.set_exception(error)

        threading.Thread(target=make, name=f"plan of epoch {epoch}", daemon=True).start()
        return future

    def _make_plan(self, epoch: int) -> EpochPlan:
        numbers, passes = self._epoch_examples(epoch)
        rng = np.random.default_rng((self._seed, epoch)) if self._shuffle else None
        plan = packing.pack(self._lengths[numbers], self.max_length, self.max_examples_per_row, rng)
        return EpochPlan(plan, numbers, passes)

    def _epoch_examples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, passes = [], []
        for source, part in enumerate(self._parts):
            # The source is an endless stream of passes; an epoch is a stretch of it.
            size = len(part.kept)
            first, last = (int(e * part.weight * size) for e in (epoch, epoch + 1))
            for n in range(first // size, -(-last // size)):
                order = part.kept
                if self._shuffle and part.weight != 1:
                    order = np.random.default_rng((self._seed, source, n)).permutation(order)
                stretch = order[max(first - n * size, 0) : last - n * size]
                numbers.append(self._base[source] + stretch)
                passes.append(np.full(len(stretch), n))
        return np.concatenate(numbers), np.concatenate(passes)

    @functools.cached_property
    def report(self) -> Report:
        """Counts of the first epoch."""
        first = self._plan(0)
        tokens, rows = int(self._lengths[first.numbers].sum()), len(first.plan)
        return Report(
            examples=len(first.numbers),
            dropped=sum(part.dropped for part in self._parts),
            tokens=tokens,
            rows=rows,
            max_length=self.max_length,
            max_examples_per_row=self.max_examples_per_row,
            padding_share=1 - tokens / (rows * self.max_length),
            sources=tuple(
                (part.name, len(part.kept), int(part.pieces.long[part.kept].sum()), part.dropped)
                for part in self._parts
            ),
        )


def load_rows(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_examples_per_row: int = 0,
    response_multiple: int = 1,
    seed: int = 0,
    cache_dir: str | os.PathLike,
    shuffle: bool = True,
) -> Rows:
    """Tokenises sources, or finds them in the cache, and plans their rows.

    Args:
      sources: what to mix.
      tokenizer: makes the training sequences.
      max_length: tokens per row; longer documents are cut into pieces (`pieces.py`), longer examples with a prompt are
        dropped and counted in the report.
      max_examples_per_row: static maximum of examples in a row; 0: chosen from the data; 1: no packing.
      response_multiple: responses are filled with end ids to a multiple of so many tokens; documents are not.
      seed: of the order of examples and rows; each epoch has its own.
      cache_dir: folder of the caches of tokenised sources.
      shuffle: False: one fixed order, for evaluation.

    Raises:
      UserError: no sources, bad records, a part without examples, or `max_length` shorter than every example of a
        source.
    """
    if not sources:
        raise UserError("there is no data source: the list is empty. Put at least one source into it.")
    parts, content = [], {"data.tokenizer": tokenizer.fingerprint}
    if response_multiple > 1:
        content["data.response_multiple"] = response_multiple
    for i, config in enumerate(sources):
        source = open_source(config)
        pieces = cut(
            cached_tokens(source, tokenizer, cache_dir),
            max_length,
            tokenizer.begin_id,
            end_id=tokenizer.eos_id,
            response_multiple=response_multiple,
        )
        parts.append(_part(source.name, config, pieces, max_length))
        content[f"data.train.{i}.content"] = source.key()
        content |= {f"data.train.{i}.{name}": getattr(config, name) for name in ("start", "stop", "weight")}
    return Rows(
        parts,
        max_length=max_length,
        max_examples_per_row=max_examples_per_row,
        seed=seed,
        shuffle=shuffle,
        pad_id=tokenizer.pad_id,
        content=content,
    )


def _part(name: str, config: SourceConfig, pieces: Pieces, max_length: int) -> Part:
    part = np.flatnonzero(in_part(pieces.hashes, config.start, config.stop))
    kept = part[pieces.lengths[part] <= max_length]
    if not len(part):
        raise UserError(
            f"data source {name!r}: none of its {len(pieces):,} examples falls in the part from start = "
            f"{config.start} to stop = {config.stop}. Widen the part, or give a larger source."
        )
    if not len(kept):
        raise UserError(
            f"data source {name!r}: max_length is {max_length}, but its shortest example has "
            f"{pieces.lengths[part].min()} tokens, so every example would be dropped. Set data.max_length to at "
            "least that, better far more."
        )
    if len(kept) * config.weight < 1:
        raise UserError(
            f"data source {name!r}: weight = {config.weight} of {len(kept)} examples is less than one "
            "example per epoch. Raise the weight."
        )
    return Part(name, pieces, kept, len(part) - len(kept), config.weight)


def batches(
    rows: Rows, *, batch_size: int, local_rows: Sequence[int] | np.ndarray, start_row: int = 0
) -> Iterator[Batch]:
    """An endless Grain iterator over batches, read ahead by threads.

    Args:
      rows: from `load_rows`.
      batch_size: rows of a batch over all processes.
      local_rows: which of them, 0..batch_size-1, this process supplies; only these are read.
      start_row: number of the first batch's first row; after n batches the next row, all there is to save, is
        start_row + n * batch_size.

    Yields:
      tokens int32 [local_rows, length], prompt_lengths and lengths int32 [local_rows, examples], example_ids uint32
      [local_rows, examples]; batch n holds the rows start_row + n * batch_size + local_rows.
    """
    local_rows = [int(i) for i in local_rows]

    def batch(n: int) -> Batch:
        return _stack([rows[start_row + n * batch_size + i] for i in local_rows])

    dataset = grain.MapDataset.range(2**48 // batch_size).map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def epoch_batches(rows: Rows, *, batch_size: int, local_rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
    """Batches of the first epoch's rows, once, in order; the last one is filled up with empty rows.

    Otherwise as `batches`.
    """
    for first in range(0, rows.rows_per_epoch, batch_size):
        numbers = [first + int(i) for i in local_rows]
        yield _stack([rows[n] if n < rows.rows_per_epoch else rows.empty_row() for n in numbers])


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
