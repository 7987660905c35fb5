"""The line that says how far a job is: of training, tokenising and decoding alike."""

import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Progress:
    """One line: rewritten in place on a terminal, a line now and then in a log."""

    def __init__(
        self,
        what: str,
        total: int,
        *,
        begun: int = 0,
        stream: TextIO | None = None,
        every: float = 10.0,
        enabled: bool = True,
    ):
        """
        Args:
          what: is counted, such as "step".
          total: how many there will be.
          begun: how many are done already, and say nothing of the time that others take; may grow as they are found.
          stream: where to write; None: stderr.
          every: least seconds between two lines of a log; a terminal's line changes ten times a second at most. 0: all.
          enabled: False writes nothing, for all processes but the first.
        """
        self._what, self._total, self.begun, self._enabled = what, total, begun, enabled
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every = min(every, 0.1) if self._live else every
        self._start = self._shown = time.monotonic()

    def show(self, done: int, values: Mapping[str, float | str] | None = None, eta: float | None = None) -> None:
        """Shows the count with named values, unless it is too soon.

        Args:
          values: numbers, or texts as they are to be shown.
          eta: seconds left; None: as if the rest went like what is done.
        """
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        if eta is None:
            own = done - self.begun
            eta = (now - self._start) / own * (self._total - done) if own else math.inf
        words = [
            f"{name} {value if isinstance(value, str) else short(value)}" for name, value in (values or {}).items()
        ]
        self._write("  ".join([f"{self._what} {done}/{self._total}", *words, f"eta {clock(eta)}"]), stay=self._live)

    def say(self, text: str) -> None:
        """A line of its own, in place of what a terminal shows now."""
        self._write(text, stay=False)

    def _write(self, text: str, stay: bool) -> None:
        if self._enabled:
            text = f"\r{text}\033[K" if self._live else text
            print(text, end="" if stay else "\n", file=self._stream, flush=True)


def short(value: float) -> str:
    """A number in a few characters: 12,346, 123, 1.2346, 0.00015."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; "?" where nobody knows."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
