"""Which source a row is of: sources take turns as evenly as their shares allow. A pure function of the row's number.

Of N rows in a pattern, source s gives n_s. With a step that is coprime to N, near N / golden ratio, number * step mod N
visits every one of 0..N-1 once, and any few that follow each other are spread evenly; the first n_0 of them are source
0's, the next n_1 source 1's, and so on. How many rows of a source come before another row is a sum of floors, found
without counting, however far the row is.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

SHARES = 2**20  # rows of the pattern that shares are rounded to


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Turns of sources, repeated for ever; of every `sum(counts)` rows, counts[s] are source s's."""

    counts: tuple[int, ...]

    @functools.cached_property
    def _step(self) -> int:
        total = sum(self.counts)
        near = max(round(total * 0.6180339887498949), 1)
        return next(step for step in itertools.count(near) if math.gcd(step, total) == 1)

    def source(self, row: int) -> int:
        """The source of a row."""
        ends = list(itertools.accumulate(self.counts))
        return bisect.bisect_right(ends, row * self._step % ends[-1])

    def before(self, row: int) -> tuple[int, ...]:
        """How many of the rows before this one are of each source."""
        if len(self.counts) == 1:
            return (row,)
        total = sum(self.counts)
        ends = [0, *itertools.accumulate(self.counts)]
        # x mod m < end exactly where floor((x + m) / m) - floor((x + m - end) / m) is 1.
        below = [
            floor_sum(row, total, self._step, total) - floor_sum(row, total, self._step, total - end) for end in ends
        ]
        return tuple(b - a for a, b in zip(below, below[1:]))


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a * i + b) / m) over i = 0..n-1, for m > 0, a >= 0, b >= 0; Euclid's algorithm on (a, m)."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


class Epochs:
    """Rows in epochs: weight w of a source with R rows means w * R of them per epoch, in turn where that is a fraction.

    `locate(row)` is (epoch, row within the epoch); `turn(row)` (source, which row of the source's own).
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float]):
        """
        Args:
          rows: of one pass over each source.
          weights: passes over each source per epoch.
        """
        self._rates = [Fraction(weight).limit_denominator(10**6) * count for count, weight in zip(rows, weights)]

    def start(self, epoch: int) -> int:
        """Number of an epoch's first row."""
        return sum(self._given(epoch))

    def locate(self, row: int) -> tuple[int, int]:
        epoch = int(row / sum(self._rates))
        while self.start(epoch) > row:
            epoch -= 1
        while self.start(epoch + 1) <= row:
            epoch += 1
        return epoch, row - self.start(epoch)

    def turn(self, row: int) -> tuple[int, int]:
        epoch, row = self.locate(row)
        before = self._given(epoch)
        pattern = self._pattern(epoch)
        source = pattern.source(row)
        return source, before[source] + pattern.before(row)[source]

    def before(self, row: int) -> tuple[int, ...]:
        """How many of the rows before this one are of each source."""
        epoch, row = self.locate(row)
        return tuple(a + b for a, b in zip(self._given(epoch), self._pattern(epoch).before(row)))

    def _given(self, epoch: int) -> list[int]:
        return [math.ceil(epoch * rate) for rate in self._rates]

    def _pattern(self, epoch: int) -> Pattern:
        return Pattern(tuple(b - a for a, b in zip(self._given(epoch), self._given(epoch + 1))))


class Schedule:
    """Shares of the sources that change at given rows. `turn` and `before` as in `Epochs`."""

    def __init__(self, shares: Sequence[tuple[int, Sequence[float]]]):
        """
        Args:
          shares: (first row, the sources' shares from it on), ascending from row 0 on.
        """
        self._starts = [row for row, _ in shares]
        self._patterns = [_pattern_of(of_sources) for _, of_sources in shares]
        self._given = [(0,) * len(shares[0][1])]  # of each source before each start
        for pattern, first, last in zip(self._patterns, self._starts, self._starts[1:]):
            self._given.append(tuple(a + b for a, b in zip(self._given[-1], pattern.before(last - first))))

    def turn(self, row: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._starts, row) - 1
        pattern, row = self._patterns[part], row - self._starts[part]
        source = pattern.source(row)
        return source, self._given[part][source] + pattern.before(row)[source]

    def before(self, row: int) -> tuple[int, ...]:
        part = bisect.bisect_right(self._starts, row) - 1
        found = self._patterns[part].before(row - self._starts[part])
        return tuple(a + b for a, b in zip(self._given[part], found))


def _pattern_of(shares: Sequence[float]) -> Pattern:
    total = sum(shares)
    ends = [round(SHARES * end / total) for end in itertools.accumulate(shares)]
    return Pattern(tuple(b - a for a, b in zip([0, *ends], ends)))
