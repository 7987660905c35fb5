"""Packed rows by number, and batches of them.

Row number i means the same tokens in every process, whatever the number of processes, devices or microbatches: the
whole state of the data is the number of the next row.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from refusion_jax.config import SourceConfig
from refusion_jax.data import packing
from refusion_jax.data.mixture import Epochs, Schedule
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.store import Store, find
from refusion_jax.data.stream import Stream
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.data.windows import Windows
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


class Rows:
    """Packed rows of all sources: `rows[i]` for any i >= 0, epoch after epoch. Made by `load_rows`.

    A row is a dict: tokens int32 [length], examples end to end from index 0, then padding; prompt_lengths and lengths
    int32 [examples] (0: no example); example_ids uint32 [examples], the number of this pass over this example, which
    does not depend on where it is packed; with `continued` also first_positions int32 [examples]. All its examples are
    of one source; sources take turns (`mixture.py`).

    In an epoch every kept example of a source with weight 1 comes once. Weight w means w passes per epoch: with 0.5 the
    epochs take halves of one order in turn, with 2 every example comes twice. With a mixture the sources have shares of
    the rows instead, and there are no epochs.

    Threads may read at once.

    Attributes:
      fingerprint: all that decides which tokens row i holds, by name; equal fingerprints, equal rows.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        weights: Sequence[float],
        *,
        max_length: int,
        max_examples_per_row: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        begin_id: int = -1,
        end_id: int = -1,
        mixture: Sequence[tuple[int, Sequence[float]]] = (),
        continued: bool = False,
        content: dict[str, str | float] | None = None,
    ):
        """
        Args:
          weights: passes over each source per epoch.
          mixture: (first row, shares of the sources from it on), instead of weights.
          continued: pieces of documents have their positions there, not positions from 0 on.
          content: what `sources` are made from, for the fingerprint.
        """
        self._sources, self._weights, self._pad_id = sources, weights, pad_id
        self._ids, self._continued = (begin_id, end_id), continued
        # Of each source in the numbering of all examples.
        self._base = np.cumsum([0, *(windows.total("pieces") for windows in sources)])
        self.max_length = max_length
        kept, tokens = (sum(windows.total(field) for windows in sources) for field in ("kept", "tokens"))
        shortest = min(int(windows.survey["shortest"].min()) for windows in sources)
        self.max_examples_per_row = max_examples_per_row or packing.examples_per_row(kept, tokens, shortest, max_length)
        self._streams = [
            Stream(windows, self.max_examples_per_row, seed, shuffle, i, len(sources))
            for i, windows in enumerate(sources)
        ]
        self._turns = Schedule(mixture) if mixture else Epochs([s.rows_per_pass for s in self._streams], weights)
        self.fingerprint = {
            "packing": packing.FORMAT,
            "seed": seed,
            "shuffle": shuffle,
            "data.max_length": max_length,
            "data.max_examples_per_row": self.max_examples_per_row,
            **(content or {}),
        }
        if mixture:
            self.fingerprint["data.mixture"] = repr(mixture)
        if continued:
            self.fingerprint["data.piece_positions"] = "continue"

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; others have more or less by one per source with a weight that is no whole number.

        Raises:
          UserError: there are no epochs.
        """
        if isinstance(self._turns, Schedule):
            raise UserError("config.data.mixture knows no epochs. Set config.steps to say how long to train.")
        return self._turns.start(1)

    def locate(self, i: int) -> tuple[int, int]:
        """(epoch, row within the epoch) of row number i."""
        return self._turns.locate(i)

    def __getitem__(self, i: int) -> Batch:
        source, number = self._turns.turn(int(i))
        row = self._streams[source][number]
        window, at, count = row.window, row.pieces, len(row.pieces)
        result = self.empty_row()
        result["lengths"][:count] = window.pieces.lengths[at]
        result["prompt_lengths"][:count] = window.pieces.prompt_lengths[at]
        result["example_ids"][:count] = (row.passes * self._base[-1] + self._base[source] + row.numbers) % 2**32
        if self._continued:
            result["first_positions"][:count] = window.pieces.first_positions[at]
        end = 0
        for piece in at:
            ids = window.ids(piece, self._sources[source].store, *self._ids)
            result["tokens"][end : end + len(ids)] = ids
            end += len(ids)
        return result

    def empty_row(self) -> Batch:
        """A row without examples."""
        examples = self.max_examples_per_row
        row = {
            "tokens": np.full(self.max_length, self._pad_id, np.int32),
            "prompt_lengths": np.zeros(examples, np.int32),
            "lengths": np.zeros(examples, np.int32),
            "example_ids": np.zeros(examples, np.uint32),
        }
        return row | ({"first_positions": np.zeros(examples, np.int32)} if self._continued else {})

    @property
    def positions(self) -> int:
        """Positions that a model must have for these rows."""
        return max(int(s.survey["farthest"].max()) for s in self._sources) if self._continued else self.max_length

    @functools.cached_property
    def report(self) -> Report:
        """Counts of the first epoch; where weights are no whole numbers, of the average one. Of one pass over each
        source where there are no epochs."""
        weights = [1.0] * len(self._sources) if isinstance(self._turns, Schedule) else self._weights
        of_epoch = lambda field: sum(round(w * s.total(field)) for w, s in zip(weights, self._sources))
        rows = sum(round(w * s.rows_per_pass) for w, s in zip(weights, self._streams))
        return Report(
            examples=of_epoch("kept"),
            dropped=sum(s.total("part") - s.total("kept") for s in self._sources),
            tokens=of_epoch("tokens"),
            rows=rows,
            max_length=self.max_length,
            max_examples_per_row=self.max_examples_per_row,
            padding_share=1 - of_epoch("tokens") / (rows * self.max_length),
            sources=tuple(
                (s.store.name, s.total("kept"), s.total("long"), s.total("part") - s.total("kept"))
                for s in self._sources
            ),
        )

    def seen(self, rows: int) -> list[tuple[str, int, float]]:
        """(name, tokens, passes) of each source in the first so many rows; tokens as of the source's average row."""
        return [
            (windows.store.name, round(windows.total("tokens") * passes), passes)
            for windows, stream, count in zip(self._sources, self._streams, self._turns.before(rows))
            for passes in [count / stream.rows_per_pass]
        ]


def load_rows(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_examples_per_row: int = 0,
    response_multiple: int = 1,
    seed: int = 0,
    cache_dir: str | os.PathLike,
    store: str | os.PathLike = "",
    mixture: Sequence[tuple[int, Sequence[float]]] = (),
    piece_positions: str = "restart",
    shuffle: bool = True,
    mapped: Callable = map,
) -> Rows:
    """Finds sources in a store, or else in the cache, or tokenises them, and says what their rows are.

    Args:
      sources: what to mix.
      tokenizer: makes the training sequences.
      max_length: tokens per row; longer documents are cut into pieces (`pieces.py`), longer examples with a prompt are
        dropped and counted in the report.
      max_examples_per_row: static maximum of examples in a row; 0: chosen from the data; 1: no packing.
      response_multiple: responses are filled with end ids to a multiple of so many tokens; documents are not.
      seed: of the order of examples and rows; each epoch has its own.
      cache_dir: folder where sources are tokenised into stores, without `store`.
      store: folder, or address of one, where `refusion_jax.prepare` has put them.
      mixture: (first row, the sources' shares of the rows from it on), instead of the sources' weights.
      piece_positions: "restart" or "continue", see `DataConfig`.
      shuffle: False: one fixed order, for evaluation.
      mapped: `map`, or one that looks at windows in several processes.

    Raises:
      UserError: no sources, bad records, a part without examples, or `max_length` shorter than every example of a
        source.
    """
    if not sources:
        raise UserError("there is no data source: the list is empty. Put at least one source into it.")
    if mixture:
        check_mixture(mixture, len(sources))
    found, content = [], {"data.tokenizer": tokenizer.fingerprint}
    if response_multiple > 1:
        content["data.response_multiple"] = response_multiple
    for i, config in enumerate(sources):
        kept = find(config, tokenizer, store) if store else prepared(open_source(config), tokenizer, cache_dir)
        windows = open_windows(kept, config, max_length, response_multiple, mapped)
        found.append(windows)
        content[f"data.train.{i}.content"] = kept.content if len(windows) == 1 else f"{kept.content} {kept.cut}"
        content |= {f"data.train.{i}.{name}": getattr(config, name) for name in ("start", "stop", "weight")}
    return Rows(
        found,
        [config.weight for config in sources],
        max_length=max_length,
        max_examples_per_row=max_examples_per_row,
        seed=seed,
        shuffle=shuffle,
        pad_id=tokenizer.pad_id,
        begin_id=tokenizer.begin_id,
        end_id=tokenizer.eos_id,
        mixture=mixture,
        continued=piece_positions == "continue",
        content=content,
    )


def open_windows(
    store: Store, config: SourceConfig, max_length: int, response_multiple: int, mapped: Callable = map
) -> Windows:
    """The windows of a source's store.

    Raises:
      UserError: no example is in the config's part or fits in a row.
    """
    windows = Windows(
        store,
        max_length=max_length,
        response_multiple=response_multiple,
        start=config.start,
        stop=config.stop,
        mapped=mapped,
    )
    kept = windows.total("kept")
    if not windows.total("part"):
        raise UserError(
            f"data source {store.name!r}: none of its {windows.total('pieces'):,} examples falls in the part from "
            f"start = {config.start} to stop = {config.stop}. Widen the part, or give a larger source."
        )
    if not kept:
        raise UserError(
            f"data source {store.name!r}: max_length is {max_length}, but its shortest example has "
            f"{windows.survey['shortest'].min()} tokens, so every example would be dropped. Set data.max_length to at "
            "least that, better far more."
        )
    if kept * config.weight < 1:
        raise UserError(
            f"data source {store.name!r}: weight = {config.weight} of {kept} examples is less than one example per "
            "epoch. Raise the weight."
        )
    return windows


def check_mixture(mixture: Sequence[tuple[int, Sequence[float]]], sources: int) -> None:
    """Raises a UserError for shares that do not cover the run from its first row on."""
    starts = [row for row, _ in mixture]
    if starts[0] != 0 or sorted(set(starts)) != starts:
        raise UserError(
            "config.data.mixture does not cover the run: its steps must begin with 0 and ascend. Give (step, shares) "
            "for step 0 and for each step at which the shares change."
        )
    for _, shares in mixture:
        if len(shares) != sources:
            raise UserError(
                f"config.data.mixture has the shares {shares} for {sources} sources. Give as many shares as "
                "config.data.train has sources."
            )


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
