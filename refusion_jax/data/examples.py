"""What a source is: examples, (query, response) pairs, by number or a unit after another.

A source is opened cheaply: its records are not read before the first `len`, `[i]` or `read`, which a run whose data are
tokenised already never asks for.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refusion_jax.config import SourceConfig
from refusion_jax.data import tasks
from refusion_jax.errors import UserError


def prompt_hash(query: str | None, response: str) -> int:
    """64-bit hash of an example's prompt; of the document for plain text."""
    return int.from_bytes(
        hashlib.blake2b((response if query is None else query).encode(), digest_size=8).digest(), "little"
    )


def in_part(hashes: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Which examples belong to the part of a source from `start` to `stop`.

    An example belongs where its prompt's hash falls, as a fraction of all hashes. So two examples with the same prompt
    never stand on two sides of a cut, and a held-out part holds no prompt that was trained on.

    Args:
      hashes: `prompt_hash` of each example, uint64 of any shape.

    Returns:
      bool of the same shape.
    """
    fraction = hashes / 2.0**64
    return (fraction >= start) & ((fraction < stop) | (stop >= 1))


RECORD_BYTES = 1024  # what a record is taken to have where nobody has counted


@dataclasses.dataclass(frozen=True)
class Unit:
    """A stretch of a source that is read at once: bytes, row groups or records `start` to `stop`.

    Attributes:
      file: index of its file; 0 where there are none.
      size: bytes of text in it, about.
    """

    file: int
    start: int
    stop: int
    size: int


class Source:
    """Examples of one source.

    `source[i]` is (query, response); the query is None for plain text, where the whole document is the response.

    Attributes:
      name: for messages.
      options: those that a config may have; None: whatever the library that makes the examples takes.

    Raises:
      UserError: another option, or one that is given twice.
    """

    options: tuple[str, ...] | None = ()

    def __init__(self, config: SourceConfig):
        self.config = config
        self.name = f"{config.kind}:{config.path}"
        self._key = ""
        given = [name for name, _ in config.options]
        for name in given:
            if self.options is not None and name not in self.options:
                raise UserError(
                    f"data source {self.name!r} has the option {name!r}; sources of kind {config.kind!r} know "
                    f"{' and '.join(map(repr, self.options)) or 'none'}. Correct its name, or remove it."
                )
            if given.count(name) > 1:
                raise UserError(f"data source {self.name!r} has the option {name!r} more than once. Keep one of them.")

    def key(self, notes: pathlib.Path | None = None) -> str:
        """Changes when the content or the way it is read does; found once.

        Args:
          notes: folder where hashes of files are remembered, so that a start need not read all data; None: all is read.
        """
        if not self._key:
            fields = (self.config.query_field, self.config.response_field)
            content = repr((self.config.kind, self._content_key(notes), fields))
            self._key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return self._key

    def _content_key(self, notes: pathlib.Path | None) -> Any:
        raise NotImplementedError

    @functools.cached_property
    def _records(self) -> Sequence[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> tuple[str | None, str]:
        return self._from_fields(self._records[i], self._place(i))

    def units(self, size: int) -> list[Unit]:
        """Units that together hold every example once, in order, of `size` bytes each where they can be cut so.

        Found from names, sizes and counts: no record is read.
        """
        return record_units(0, len(self), size)

    def read(self, unit: Unit) -> Iterator[tuple[str | None, str]]:
        """The examples of a unit, in order; reads no others, so that many processes can share a source."""
        return (self[i] for i in range(unit.start, unit.stop))

    def part(self) -> Iterator[int]:
        """Indices of the examples between the config's `start` and `stop`, ascending (see `in_part`)."""
        return (
            i
            for i in range(len(self))
            if in_part(np.uint64(prompt_hash(*self[i])), self.config.start, self.config.stop)
        )

    def _place(self, i: int) -> str:
        return f"{self.name}, record {i} (counted from 0)"

    def score(self, i: int, generated: str) -> float:
        """1.0 if a generated response to example i has the reference's final answer (exact match), else less."""
        return float(tasks.final_answer(generated) == tasks.final_answer(self[i][1]))

    def _from_fields(self, record: Any, place: str) -> tuple[str | None, str]:
        config = self.config
        if not isinstance(record, Mapping):
            raise UserError(
                f"{place} is a {type(record).__name__}, not an object with the fields {config.query_field!r} and "
                f"{config.response_field!r}. Make every record an object."
            )
        query = text_of(record, config.query_field, "query_field", place) if config.query_field else None
        response = text_of(record, config.response_field, "response_field", place)
        if not response.strip():
            raise UserError(
                f"{place}: the response (field {config.response_field!r}) is empty. Remove the record or give it a "
                "response."
            )
        return query, response


def record_units(file: int, count: int, size: int) -> list[Unit]:
    """Units of so many records that are taken to have `RECORD_BYTES` each."""
    step = max(size // RECORD_BYTES, 1)
    cuts = [(first, min(first + step, count)) for first in range(0, count, step)]
    return [Unit(file, first, stop, (stop - first) * RECORD_BYTES) for first, stop in cuts]


def text_of(record: Mapping[str, Any], field: str, setting: str, place: str) -> str:
    """A field of a record as text; a UserError names the place, and the source's `setting`, where that cannot be."""
    if field not in record:
        raise UserError(
            f"{place} has no field {field!r}; its fields are {', '.join(map(repr, record)) or 'none'}. "
            f"Set the source's {setting} to one of them."
        )
    value = record[field]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: the field {field!r} is not UTF-8 text ({error}). Convert it to UTF-8."
            ) from error
    if not isinstance(value, str):
        raise UserError(
            f"{place}: the field {field!r} is {value!r:.60}, a {type(value).__name__}; it must be a string. "
            f"Convert it, or set the source's {setting} to another field."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise UserError(f"{place}: the field {field!r} is not valid text ({error}). Remove that character.") from error
    return value
