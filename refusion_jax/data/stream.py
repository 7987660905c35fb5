"""The rows of one source by number, pass after pass: `windows.py` says which examples, this in which order."""

import concurrent.futures
import dataclasses
import threading

import numpy as np

from refusion_jax import storage
from refusion_jax.data import packing
from refusion_jax.data.windows import ORDER, Window, Windows


@dataclasses.dataclass(frozen=True)
class Planned:
    """A window's rows in one pass: rows of `plan` are lists of indices into `window.kept`."""

    window: Window
    plan: packing.Plan


@dataclasses.dataclass(frozen=True)
class Row:
    """Examples of a row: `pieces` of a window.

    Attributes:
      numbers: int64 [examples], of each among all of the source, the same wherever it is packed.
      passes: which pass over the source.
    """

    window: Window
    pieces: np.ndarray
    numbers: np.ndarray
    passes: int


class Stream:
    """Endless rows of one source; threads may read at once.

    A window is planned in the background from the middle of the one before on, and its blocks read ahead where they are
    far, so that nobody waits for it who does not need it yet.

    Attributes:
      rows_per_pass: rows of one pass over the source, every one the same.
    """

    def __init__(self, windows: Windows, max_examples: int, seed: int, shuffle: bool, source: int, sources: int):
        """
        Args:
          seed, source, sources: sources have other orders, by their index among so many.
          shuffle: False: one fixed order.
        """
        self.windows, self._max_examples, self._seed, self._shuffle = windows, max_examples, seed, shuffle
        self._source, self._sources = source, sources
        self._rows = windows.rows(max_examples, shuffle)
        self.rows_per_pass = int(self._rows.sum())
        self._first_pieces = np.concatenate([[0], np.cumsum(windows.survey["pieces"])])
        self._lock = threading.Lock()
        self._plans: dict[int, concurrent.futures.Future[Planned]] = {}
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, row: int) -> Row:
        passes, row = divmod(row, self.rows_per_pass)
        order, ends = self._order(passes)
        place = int(np.searchsorted(ends, row, side="right"))
        row -= int(ends[place] - self._rows[order[place]])
        turn = passes * len(order) + place
        planned = self._plan(turn)
        if row >= self._rows[order[place]] // 2 and (self._shuffle or place + 1 < len(order)):
            self._start_plan(turn + 1)
        pieces = planned.window.kept[planned.plan[row]]
        return Row(planned.window, pieces, self._first_pieces[order[place]] + pieces, passes)

    def _order(self, passes: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows in the order of a pass, and the row after each."""
        found = self._orders.get(passes)
        if found is None:
            order = np.arange(len(self.windows))
            if self._shuffle:
                order = np.random.default_rng((self._seed, passes, ORDER, self._source)).permutation(order)
            found = order, np.cumsum(self._rows[order])
            self._orders = {**{p: o for p, o in self._orders.items() if abs(p - passes) <= 1}, passes: found}
        return found

    def _plan(self, turn: int) -> Planned:
        """The plan of a window, made now if nobody has begun to; only who needs this window waits for it."""
        future = self._start_plan(turn)
        with self._lock:
            # Other threads may still want rows of the window before, or have begun with the next.
            self._plans = {t: plan for t, plan in self._plans.items() if abs(t - turn) <= 1}
        return future.result()

    def _start_plan(self, turn: int) -> concurrent.futures.Future[Planned]:
        """Begins to plan a window in the background, unless that was done."""
        with self._lock:
            if turn in self._plans:
                return self._plans[turn]
            future = self._plans[turn] = concurrent.futures.Future()

        def make() -> None:
            try:
                future.set_result(self._make_plan(turn))
            except BaseException as error:  # for the thread that needs the plan; the next one tries again
                with self._lock:
                    self._plans.pop(turn, None)
                future.set_exception(error)

        threading.Thread(target=make, name=f"plan of window {turn}", daemon=True).start()
        return future

    def _make_plan(self, turn: int) -> Planned:
        passes, place = divmod(turn, len(self.windows))
        number = int(self._order(passes)[0][place])
        window = self.windows.read(number)
        # A seed's trailing zeros mean nothing, so the first window of the first source has the order of (seed, passes).
        seeds = (self._seed, passes, number * self._sources + self._source) if self._shuffle else None
        lengths = window.pieces.lengths[window.kept]
        plan = packing.pack_into(int(self._rows[number]), lengths, self.windows.max_length, self._max_examples, seeds)
        if not storage.is_local(self.windows.store.folder):
            for block in window.blocks:
                self.windows.store.read_ahead(int(block))
        return Planned(window, plan)
