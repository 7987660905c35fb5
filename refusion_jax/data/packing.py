"""Packing: which examples share a row. A pure function of the lengths and a seed.

Rows are filled one after another with examples in random order, until the next one would leave room that hardly any
example fills; then those of the next thousand are taken that fill the row exactly. The last thousand are packed longest
first. So rows are nearly full, and apart from that which examples meet in a row is chance. A few seconds per million
examples.
"""

import bisect
import dataclasses

import numpy as np

FORMAT = 2  # another number wherever the same lengths and seed give other rows: a run cannot go on with those
_AHEAD = 1024  # examples among which one is looked for that fills a row
_ATTEMPTS = 8  # of a packing to need no more rows than there are
_FEW = 20000  # examples
_SAMPLES = 8  # packings of few examples


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows as lists of examples: row r holds `order[starts[r]:starts[r + 1]]`."""

    order: np.ndarray  # int64 [examples]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: np.ndarray, max_length: int, max_examples: int, rng: np.random.Generator | None) -> Plan:
    """Plans rows that hold every example exactly once.

    Args:
      lengths: tokens of each example, int [examples], each in 1..max_length.
      max_length: tokens a row can hold.
      max_examples: examples a row can hold.
      rng: chance for the order of examples and rows; None: examples in their own order, the same plan every time.
    """
    arrival = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    row = np.full(len(lengths), -1)
    row[arrival], rows = _fill(lengths[arrival], max_length, max_examples)
    # Longest first leaves the least room; the noise lets small data sets meet differently in every epoch.
    last = arrival[row[arrival] < 0]
    noise = 1.0 if rng is None else rng.uniform(0.8, 1.0, len(last))
    last = last[np.argsort(-lengths[last] * noise, kind="stable")]
    row[last] = rows + _best_fit(lengths[last], max_length, max_examples)
    _, row = np.unique(row, return_inverse=True)  # the emptied rows' numbers go
    rows = row.max(initial=-1) + 1
    if rng is not None:
        row = rng.permutation(rows)[row]
    order = np.argsort(row, kind="stable")
    return Plan(order, np.searchsorted(row[order], np.arange(rows + 1)))


def rows_needed(lengths: np.ndarray, max_length: int, max_examples: int, shuffle: bool) -> int:
    """Rows in which `pack_into` packs these examples in every pass.

    With `shuffle` so many that nearly every other packing needs no more: 0.2 % more than one, or as many as the worst
    of a few where those are few rows.
    """
    if not shuffle:
        return len(pack(lengths, max_length, max_examples, None))
    seeds = range(_SAMPLES if len(lengths) < _FEW else 1)
    rows = max(len(pack(lengths, max_length, max_examples, np.random.default_rng(seed))) for seed in seeds)
    return min(rows + rows // 500, len(lengths))


def pack_into(
    rows: int, lengths: np.ndarray, max_length: int, max_examples: int, seeds: tuple[int, ...] | None
) -> Plan:
    """Plans exactly `rows` rows, from `rows_needed`, that hold every example exactly once, otherwise as `pack`.

    Args:
      seeds: of the chance for the order of examples and rows; None: the same plan every time.
    """
    attempts = () if seeds is None else (np.random.default_rng((*seeds, attempt)) for attempt in range(_ATTEMPTS))
    plans = (pack(lengths, max_length, max_examples, rng) for rng in attempts)
    plan = next((plan for plan in plans if len(plan) <= rows), None)
    if plan is None:  # one of those that `rows_needed` made
        plan = pack(lengths, max_length, max_examples, None if seeds is None else np.random.default_rng(0))
    starts = plan.starts
    while len(starts) <= rows:  # a row more out of the one with the most examples
        sizes = np.diff(starts)
        fullest = int(np.argmax(sizes))
        starts = np.insert(starts, fullest + 1, starts[fullest] + sizes[fullest] // 2)
    return Plan(plan.order, starts)


def _fill(lengths: np.ndarray, max_length: int, max_examples: int) -> tuple[np.ndarray, int]:
    """Fills rows one after another, with examples in the order given if they leave room that others fill.

    Returns the row of each example, -1 for about the last `_AHEAD`, and the number of rows.
    """
    row_of, rows, head = np.full(len(lengths), -1), 0, 0
    if len(lengths) <= _AHEAD:
        return row_of, rows
    short = int(np.partition(lengths, len(lengths) // 5)[len(lengths) // 5])  # so much room is filled with ease
    # The examples to choose from as one sorted list of integers, length * unit + index.
    unit, size, taken = len(lengths), lengths.tolist(), [False] * len(lengths)
    ahead, end = sorted(size[i] * unit + i for i in range(_AHEAD)), _AHEAD
    while end < unit:
        room, count = max_length, 0
        while count < max_examples and ahead and ahead[0] // unit <= room:
            while taken[head]:
                head += 1
            left = room - size[head]
            if left == 0 or left >= short:
                at = bisect.bisect_left(ahead, size[head] * unit + head)
            else:
                at = bisect.bisect_left(ahead, (room + 1) * unit) - 1  # the longest that fits
                rest = room - ahead[at] // unit
                if 0 < rest < short and ahead[0] // unit <= room - short:
                    at = bisect.bisect_left(ahead, (room - short + 1) * unit) - 1  # that leaves room to be filled
            length, i = divmod(ahead.pop(at), unit)
            row_of[i], taken[i], room, count = rows, True, room - length, count + 1
            if end < unit:
                bisect.insort(ahead, size[end] * unit + end)
                end += 1
        rows += 1
    return row_of, rows


def _best_fit(lengths: np.ndarray, max_length: int, max_examples: int) -> np.ndarray:
    """The row of each example, placed in the order given, each in the fullest row that has room for it."""
    row_of = np.empty(len(lengths), np.int64)
    counts: list[int] = []
    # Rows with room as one sorted list of integers, room * unit + row: a lookup is one bisection.
    unit, spaces = len(lengths) + 1, []
    for i, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(spaces, length * unit)
        if at < len(spaces):
            room, row = divmod(spaces.pop(at), unit)
        else:
            room, row = max_length, len(counts)
            counts.append(0)
        row_of[i] = row
        counts[row] += 1
        if room > length and counts[row] < max_examples:
            bisect.insort(spaces, (room - length) * unit + row)
    return row_of


def examples_per_row(examples: int, tokens: int, shortest: int, max_length: int) -> int:
    """A static maximum of examples per row that costs next to no padding: three times the average row's.

    Args:
      examples, tokens: how many there are; shortest: tokens of the shortest example.
    """
    return int(min(3 * np.ceil(max_length / (tokens / examples)), max_length // shortest))
