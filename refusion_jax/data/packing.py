"""Packing: which examples share a row. A pure function of the lengths and a seed.

Examples come in random order and go, one after another, to the fullest of a few dozen open rows that still has room
(best fit); when none has room the fullest row is closed and a new one opened. What the last open rows hold is packed
once more, longest first. So rows are nearly full, and apart from that which examples meet in a row is chance. About a
second per million examples.
"""

import bisect
import dataclasses

import numpy as np

FORMAT = 1  # another number wherever the same lengths and seed give other rows: a run cannot go on with those
_OPEN_ROWS = 48


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


def examples_per_row(lengths: np.ndarray, max_length: int) -> int:
    """A static maximum of examples per row that costs next to no padding: three times the average row's."""
    return int(min(3 * np.ceil(max_length / lengths.mean()), max_length // lengths.min()))
