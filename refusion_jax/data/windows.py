"""The rows of one source, pass after pass, planned a window at a time.

A window is `WINDOW_BLOCKS` blocks of the store, drawn once for all from all over it: about 33 million tokens. Its
examples are packed into rows among themselves; which of them share a row, and the order of rows and windows, is another
in every pass. How many rows a window gives is known beforehand and is the same in every pass, so the window and row of
any number are found from a table of one integer per window, whatever the number of examples. A store of one window has
all examples in it in their own order.
"""

import functools
import hashlib
import io
from collections.abc import Callable

import numpy as np

from refusion_jax import storage
from refusion_jax.data import packing
from refusion_jax.data.examples import in_part
from refusion_jax.data.pieces import Pieces, cut
from refusion_jax.data.store import Store

WINDOW_BLOCKS = 128
ORDER = 2**32 - 1  # stands for the order of windows where else the number of a window is, in seeds
SURVEY = np.dtype(
    [
        ("pieces", "<i8"),  # examples, long documents as their pieces
        ("part", "<i8"),  # of them those between `start` and `stop`
        ("kept", "<i8"),  # of these the ones that fit in a row
        ("long", "<i8"),  # of these the pieces of long documents
        ("tokens", "<i8"),  # of the kept ones
        ("shortest", "<i8"),  # of the part: tokens of its shortest
        ("farthest", "<i8"),  # of the kept ones: the last position in a document, and 1
    ]
)


class Windows:
    """A store's windows for rows of one length.

    Attributes:
      survey: counts, `SURVEY` [windows].
    """

    def __init__(
        self,
        store: Store,
        *,
        max_length: int,
        response_multiple: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        mapped: Callable = map,
    ):
        """
        Args:
          start, stop: the part of the source to use (`examples.in_part`).
          mapped: `map`, or one that does it in several processes.
        """
        self.store, self.max_length, self._mapped = store, max_length, mapped
        self._response_multiple, self._start, self._stop = response_multiple, start, stop
        blocks = store.num_blocks
        self._cuts = np.linspace(0, blocks, -(-blocks // WINDOW_BLOCKS) + 1).astype(np.int64)
        self._order = np.random.default_rng(0).permutation(blocks)
        settings = (store.cut, packing.FORMAT, WINDOW_BLOCKS, max_length, response_multiple, start, stop)
        self._settings = repr(settings)
        self.survey = self._remembered("survey", SURVEY, self._look)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def total(self, field: str) -> int:
        return int(self.survey[field].sum())

    def blocks(self, window: int) -> np.ndarray:
        """The blocks of a window, ascending."""
        return np.sort(self._order[self._cuts[window] : self._cuts[window + 1]])

    def read(self, window: int) -> "Window":
        """What is in a window: reads the examples' records, not their tokens."""
        blocks = self.blocks(window)
        records = [self.store.examples(block) for block in blocks]
        examples = np.concatenate(records)
        pieces = cut(examples, self.max_length, self._response_multiple)
        part = np.flatnonzero(in_part(examples["hash"], self._start, self._stop)[pieces.examples])
        kept = part[pieces.lengths[part] <= self.max_length]
        return Window(blocks, list(map(len, records)), examples["length"], pieces, part, kept)

    def rows(self, max_examples: int, shuffle: bool) -> np.ndarray:
        """Rows that each window gives, int64 [windows]."""
        needed = functools.partial(self._needed, max_examples, shuffle)
        return self._remembered(f"rows {max_examples} {shuffle}", np.dtype("<i8"), needed)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": map}  # in another process

    def _needed(self, max_examples: int, shuffle: bool, window: int) -> int:
        found = self.read(window)
        return packing.rows_needed(found.pieces.lengths[found.kept], self.max_length, max_examples, shuffle)

    def _look(self, window: int) -> tuple:
        found = self.read(window)
        lengths = found.pieces.lengths
        kept, shortest = found.kept, lengths[found.part].min(initial=2**62)
        farthest = (found.pieces.first_positions + lengths)[kept].max(initial=0)
        long = found.pieces.long[kept].sum()
        return len(lengths), len(found.part), len(kept), long, lengths[kept].sum(), shortest, farthest

    def _remembered(self, what: str, dtype: np.dtype, of_window: Callable[[int], tuple | int]) -> np.ndarray:
        """`of_window` of each window, from beside the store if it was found before, else written there if that is
        possible."""
        name = hashlib.blake2b(f"{what} {self._settings}".encode(), digest_size=8).hexdigest()
        path = self.store.folder / f"rows-{name}.npy"
        try:
            found = np.load(io.BytesIO(storage.read(path)))
            if found.dtype == dtype and found.shape == (len(self),):
                return found
        except (OSError, ValueError, EOFError):
            pass  # none, or a damaged one
        found = np.array(list(self._mapped(of_window, range(len(self)))), dtype)
        content = io.BytesIO()
        np.save(content, found)
        try:
            storage.write(path, content.getvalue())
        except (OSError, ValueError):
            pass  # somebody else's store, that can only be read
        return found


class Window:
    """The examples of a window. `part` and `kept` are indices of its pieces: see `SURVEY`."""

    def __init__(
        self,
        blocks: np.ndarray,
        sizes: list[int],
        lengths: np.ndarray,
        pieces: Pieces,
        part: np.ndarray,
        kept: np.ndarray,
    ):
        """
        Args:
          blocks: numbers of the blocks; sizes: their examples; lengths: tokens of the examples.
        """
        self.blocks, self.pieces, self.part, self.kept = blocks, pieces, part, kept
        self._first_examples = np.concatenate([[0], np.cumsum(sizes)])
        self._first_tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def ids(self, piece: int, store: Store, begin_id: int, end_id: int) -> np.ndarray:
        """Token ids of a piece."""
        example = self.pieces.examples[piece]
        nth = int(np.searchsorted(self._first_examples, example, side="right")) - 1
        first = self._first_tokens[example] - self._first_tokens[self._first_examples[nth]]
        tokens = store.tokens(int(self.blocks[nth]))[first:]
        return self.pieces.ids(piece, tokens, begin_id, end_id)
