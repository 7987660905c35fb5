"""Packing: which examples share a row. A pure function of the lengths and a seed.

Examples come in random order and go, one after another, to the fullest of a few dozen open rows that still has room
(best fit); when none has room the fullest row is closed and a new one opened. What the last open rows hold is packed
once more, longest first. So rows are nearly full, and apart from that which examples meet in a row is chance. About a
second per million examples.
"""

import bisect
import dataclasses

import numpy as np

FORMAT = 2  # another number wherever the same lengths and seed give other rows: a run cannot go on with those
_OPEN_ROWS = 48
_ATTEMPTS = 8  # of a packing to need no more rows than there are
_SAMPLES, _FEW = 8, 20000  # packings of fewer examples than that


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
    row = np.empty(len(lengths), np.int64)
    row[arrival], rows, unclosed = _best_fit(lengths[arrival], max_length, max_examples, _OPEN_ROWS)
    # Longest first leaves the least room; the noise lets small data sets meet differently in every epoch.
    last = arrival[np.isin(row[arrival], unclosed)]
    noise = 1.0 if rng is None else rng.uniform(0.8, 1.0, len(last))
    last = last[np.argsort(-lengths[last] * noise, kind="stable")]
    packed, _, _ = _best_fit(lengths[last], max_length, max_examples, len(last))
    row[last] = rows + packed
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


def _best_fit(
    lengths: np.ndarray, max_length: int, max_examples: int, open_rows: int
) -> tuple[np.ndarray, int, list[int]]:
    """Places examples in the order given. Returns the row of each, the number of rows, and the rows still open."""
    row_of = np.empty(len(lengths), np.int64)
    rows = 0
    counts: list[int] = []
    # Open rows as one sorted list of integers, room * unit + row: a lookup is one bisection.
    unit = len(lengths) + 1
    spaces: list[int] = []
    for i, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(spaces, length * unit)
        if at < len(spaces):
            room, row = divmod(spaces.pop(at), unit)
        else:
            if len(spaces) >= open_rows:
                spaces.pop(0)
            room, row = max_length, rows
            rows += 1
            counts.append(0)
        row_of[i] = row
        counts[row] += 1
        if room > length and counts[row] < max_examples:
            bisect.insort(spaces, (room - length) * unit + row)
    return row_of, rows, [space % unit for space in spaces]


def examples_per_row(examples: int, tokens: int, shortest: int, max_length: int) -> int:
    """A static maximum of examples per row that costs next to no padding: three times the average row's.

    Args:
      examples, tokens: how many there are; shortest: tokens of the shortest example.
    """
    return int(min(3 * np.ceil(max_length / (tokens / examples)), max_length // shortest))
