"""Decoding in a terminal: answers coloured by round, answers that fill in while they are decoded, rates."""

import itertools
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.sampling import Generation

OPEN = "·"  # a token that is not committed yet
# Backgrounds (of the 256 colours) from the first round to the last; black on them is readable in any terminal's theme.
RAMP = (39, 45, 51, 50, 49, 48, 47, 46, 82, 118, 154, 190, 226, 220, 214, 208, 209, 210, 211, 212, 213)

Span = tuple[str, int | None]  # text and its round, None where nothing is committed yet


def by_position(answer: Generation, eos_id: int) -> list[tuple[int, int] | None]:
    """(id, round) of every position up to the last committed one or the first EOS; None where nothing is committed."""
    found = dict(zip(answer.order, zip(answer.committed, answer.rounds)))
    ends = [position for position, (token, _) in found.items() if token == eos_id]
    return [found.get(position) for position in range(min(ends, default=max(found, default=-1)) + 1)]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, all of it together; a character of several tokens comes with the last one."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # perhaps the beginning of a character
        pieces.append(text[len(shown) :])
        shown = text if len(text) > len(shown) else shown
    return pieces


def spans(tokenizer: Tokenizer, answer: Generation, eos_id: int) -> list[Span]:
    """The text of an answer, finished or not, token by token."""
    found, run = [], []

    def flush():
        texts = pieces(tokenizer, [token for token, _ in run])
        found.extend((text, round_) for text, (_, round_) in zip(texts, run))
        run.clear()

    for item in by_position(answer, eos_id):
        if item is not None:
            run.append(item)
            continue
        flush()
        found.append((OPEN, None))
    flush()
    return found


def use_color(choice: str, stream: TextIO) -> bool:
    """Whether to write colours: what was asked for, or with "auto" only to a terminal and not when NO_COLOR is set."""
    if choice == "auto":
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


def paint(found: Sequence[Span], rounds: int, color: bool) -> str:
    """The text with every run of tokens marked by its round: by colour, or else by a number before it."""
    marked = []
    for round_, group in itertools.groupby((span for span in found if span[0]), key=lambda span: span[1]):
        text = "".join(text for text, _ in group)
        if round_ is None:
            marked.append(text)
        elif color:  # a line end inside a background would colour the rest of the line
            marked.append("\n".join(_on(line, round_, rounds) for line in text.split("\n")))
        else:
            marked.append(f"[{round_ + 1}]{text}")
    return "".join(marked)


def _on(text: str, round_: int, rounds: int) -> str:
    shade = RAMP[round(round_ / max(1, rounds - 1) * (len(RAMP) - 1))]
    return f"\033[30;48;5;{shade}m{text}\033[0m" if text else ""


def legend(rounds: int, color: bool) -> str:
    """One line that says which mark is which round."""
    if not color:
        return f"[n]: committed in round n of {rounds}"
    step = -(-rounds // 20)
    return "committed in round " + "".join(_on(f" {r + 1} ", r, rounds) for r in range(0, rounds, step))


class Live:
    """Text at the end of a terminal's output that is replaced as it changes."""

    def __init__(self, stream: TextIO = sys.stdout):
        self._stream, self._rows = stream, 0

    def show(self, found: Sequence[Span], rounds: int, color: bool) -> None:
        """Replaces the text; of one higher than the terminal the end is shown."""
        columns, lines = shutil.get_terminal_size()
        found = list(found)
        while len(found) > 1 and self._height(found, columns) > lines - 1:
            del found[0]
        self.clear()
        self._stream.write(paint(found, rounds, True) if color else "".join(text for text, _ in found))
        self._stream.flush()
        self._rows = self._height(found, columns)

    def clear(self) -> None:
        """Takes the text away."""
        if self._rows:
            self._stream.write(("\r" if self._rows == 1 else f"\033[{self._rows - 1}A\r") + "\033[J")
            self._rows = 0

    @staticmethod
    def _height(found: Sequence[Span], columns: int) -> int:
        lines = "".join(text for text, _ in found).split("\n")
        widths = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in lines]
        return sum(max(1, -(-width // columns)) for width in widths)


class Tally:
    """What has been decoded of many prompts so far."""

    def __init__(self):
        self.done = 0  # answers
        self._tokens: dict[int, int] = {}  # of every prompt seen so far
        self._finished_tokens = self._forwards = 0
        self._start = time.monotonic()
        self._warm: tuple[float, int] | None = None  # when the first tokens were there, after compilation; how many

    def add(self, generation: Generation) -> dict[str, float]:
        """Takes an answer, finished or not; returns the rates so far, compilation left out."""
        now = time.monotonic()
        self._tokens[generation.index] = len(generation.order)
        if generation.finished:
            self.done += 1
            self._finished_tokens += len(generation.tokens)
            self._forwards += generation.forwards
        self._warm = self._warm or (now, sum(self._tokens.values()))
        since, before = self._warm
        rate = (sum(self._tokens.values()) - before) / max(now - since, 1e-9)
        return {"tokens/s": rate, "tokens/forward": self._finished_tokens / max(1, self._forwards)}

    def __str__(self):
        text = f"{self.done} answers in {time.monotonic() - self._start:.1f} s, compilation included"
        if self.done:
            text += f"; {self._finished_tokens} tokens, {self._finished_tokens / self._forwards:.2f} tokens per forward"
        return text
