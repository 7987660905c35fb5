"""What stands in rows: the examples of a source, and in place of long documents (plain text) pieces of them.

A document of n text tokens whose sequence, with begin and end id, is longer than a row of L becomes ceil(n / (L - 1))
pieces in order. A piece is a sequence of its own: the begin id and the next L - 1 tokens, with positions from 0 and no
attention to the piece before. Only the document's end is followed by the end id, where it fits, so that no piece in the
middle teaches to stop. Where a document is cut depends on its own length and on L, nothing else.

Responses to prompts may be filled with further end ids, which objectives take for a part of them.
"""

import dataclasses

import numpy as np

from refusion_jax.data.cache import TokenCache


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces, or whole examples, in the order of the cache.

    Attributes:
      tokens: of the cache.
      starts: int64 [pieces], where each starts in `tokens`.
      lengths: int64 [pieces], tokens of each in a row: those in `tokens`, a begin id where `continued`, and `filled`.
      filled: int64 [pieces], end ids that follow.
      prompt_lengths: int32 [pieces].
      hashes: uint64 [pieces], of the whole example: its pieces are in the same part of a source.
      continued: bool [pieces], whether a document has pieces before this one.
      long: bool [pieces], whether it is a piece of a document longer than a row.
      begin_id: what `continued` pieces begin with; end_id: what pieces are filled with.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    filled: np.ndarray
    prompt_lengths: np.ndarray
    hashes: np.ndarray
    continued: np.ndarray
    long: np.ndarray
    begin_id: int
    end_id: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of a piece: [lengths[i]]."""
        first, extra, filled = self.starts[i], int(self.continued[i]), self.filled[i]
        ids = self.tokens[first : first + self.lengths[i] - extra - filled]
        if not extra and not filled:
            return ids
        return np.concatenate([np.full(extra, self.begin_id), ids, np.full(filled, self.end_id)])


def cut(cache: TokenCache, max_length: int, begin_id: int, *, end_id: int = -1, response_multiple: int = 1) -> Pieces:
    """Cuts documents longer than `max_length` tokens; examples with a prompt stay whole, however long.

    Responses to prompts are filled with `end_id` to a multiple of `response_multiple` tokens, before lengths count.
    """
    lengths, starts, room = cache.lengths, cache.offsets[:-1], max(max_length - 1, 1)
    long = lengths > max_length
    candidates = np.flatnonzero(long)
    long[candidates] = (cache.prompt_lengths[candidates] == 1) & (cache.tokens[starts[candidates]] == begin_id)
    counts = np.where(long, -(-(lengths - 2) // room), 1)
    example = np.repeat(np.arange(len(cache)), counts)
    nth = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)  # piece of its example
    long, continued = long[example], nth > 0
    first, stop = starts[example] + continued + nth * room, cache.offsets[1:][example]
    stop = np.where(long, np.minimum(stop, starts[example] + 1 + (nth + 1) * room), stop)
    filled = np.zeros(len(example), np.int64)
    if response_multiple > 1:
        document = (cache.prompt_lengths == 1) & (cache.tokens[starts] == begin_id)
        filled = np.where(document, 0, -(lengths - cache.prompt_lengths) % response_multiple)[example]
    return Pieces(
        tokens=cache.tokens,
        starts=first,
        lengths=stop - first + continued + filled,
        filled=filled,
        prompt_lengths=cache.prompt_lengths[example],
        hashes=cache.hashes[example],
        continued=continued,
        long=long,
        begin_id=begin_id,
        end_id=end_id,
    )
