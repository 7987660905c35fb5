"""What stands in rows: the examples of a source, and in place of long documents (plain text) pieces of them.

A document of n text tokens whose sequence, with begin and end id, is longer than a row of L becomes ceil(n / (L - 1))
pieces in order. A piece is a sequence of its own: the begin id and the next L - 1 tokens, with positions from 0, or as
in the document, and no attention to the piece before. Only the document's end is followed by the end id, where it fits,
so that no piece in the middle teaches to stop. Where a document is cut depends on its own length and on L, nothing
else.

Responses to prompts may be filled with further end ids, which objectives take for a part of them.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces, or whole examples, in the order of the examples.

    Attributes:
      examples: int64 [pieces], which example each is of.
      starts: int64 [pieces], where each starts in the tokens of its example.
      lengths: int64 [pieces], tokens of each in a row: of the example, a begin id where `continued`, and `filled`.
      filled: int64 [pieces], end ids that follow.
      prompt_lengths: int32 [pieces].
      continued: bool [pieces], whether a document has pieces before this one.
      long: bool [pieces], whether it is a piece of a document longer than a row.
    """

    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    filled: np.ndarray
    prompt_lengths: np.ndarray
    continued: np.ndarray
    long: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def first_positions(self) -> np.ndarray:
        """int64 [pieces], where each begins in its document, the repeated begin id in place of the token before."""
        return self.starts - self.continued

    def ids(self, i: int, tokens: np.ndarray, begin_id: int, end_id: int) -> np.ndarray:
        """Token ids of a piece: [lengths[i]].

        Args:
          tokens: of its example and perhaps what follows it.
          begin_id: what `continued` pieces begin with.
          end_id: what pieces are filled with.
        """
        first, extra, filled = self.starts[i], int(self.continued[i]), self.filled[i]
        ids = tokens[first : first + self.lengths[i] - extra - filled]
        if not extra and not filled:
            return ids
        return np.concatenate([np.full(extra, begin_id), ids, np.full(filled, end_id)])


def cut(examples: np.ndarray, max_length: int, response_multiple: int = 1) -> Pieces:
    """Cuts documents longer than `max_length` tokens; examples with a prompt stay whole, however long.

    Responses to prompts are filled with end ids to a multiple of `response_multiple` tokens, before lengths count.

    Args:
      examples: their records, `shards.EXAMPLE` [examples].
    """
    lengths, room, document = examples["length"].astype(np.int64), max(max_length - 1, 1), examples["document"]
    long = document & (lengths > max_length)
    counts = np.where(long, -(-(lengths - 2) // room), 1)
    example = np.repeat(np.arange(len(examples)), counts)
    nth = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)  # piece of its example
    long, continued = long[example], nth > 0
    first = continued + nth * room
    stop = np.where(long, np.minimum(lengths[example], 1 + (nth + 1) * room), lengths[example])
    prompt_lengths = examples["prompt_length"].astype(np.int64)
    filled = np.where(document, 0, -(lengths - prompt_lengths) % response_multiple)[example]
    return Pieces(
        examples=example,
        starts=first,
        lengths=stop - first + continued + filled,
        filled=filled,
        prompt_lengths=prompt_lengths.astype(np.int32)[example],
        continued=continued,
        long=long,
    )
