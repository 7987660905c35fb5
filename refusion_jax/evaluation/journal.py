"""What has been answered: kept from the first answer on, so that an evaluation that was killed loses none."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from refusion_jax import storage
from refusion_jax.errors import UserError
from refusion_jax.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Record:
    """An answer to a prompt, or how probable a given one is.

    Attributes:
      key: of the prompt (`model.key_of`) and which of its answers this is.
      text: cut before the first stop string.
      tokens: of the text, with the EOS if it ended so; what comes behind is not counted.
      forwards: passes that wrote it, the prompt's own too.
      seconds: since the answer before, compilation left out; of one process they sum to its time.
      process: that decoded it.
      failure: why there is no answer; empty: there is one.
      likelihood: log probability of a given answer; greedy: whether it is what greedy decoding would say.
    """

    key: str
    text: str = ""
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    process: int = 0
    failure: str = ""
    likelihood: float = 0.0
    greedy: bool = False


class Journal:
    """Records by key, of this process and, after `agree`, of all.

    Every process writes a file of its own, a line for each answer as soon as it is there.
    """

    def __init__(self, folder: pathlib.Path | None = None, name: str = "answers"):
        """
        Args:
          folder: where the files are, or will be; None: nothing is written.
          name: how they are called.

        Raises:
          UserError: a line in the middle of a file cannot be read, or nothing can be written.
        """
        self._records: dict[str, Record] = {}
        self._new: list[Record] = []  # not told to the other processes yet
        self._file = None
        if folder is None:
            return
        own = folder / f"{name}.{jax.process_index()}.jsonl"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"{name}.*.jsonl")):
                self._new += read(path)
            self._file = own.open("a", encoding="utf-8")
        self._records = {record.key: record for record in self._new}

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, record: Record) -> None:
        """Keeps an answer of this process."""
        record = dataclasses.replace(record, process=jax.process_index())
        self._records[record.key] = record
        self._new.append(record)
        if self._file:
            with writing(pathlib.Path(self._file.name)):
                self._file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
                self._file.flush()

    def agree(self) -> None:
        """Makes the records of all processes known to all; all of them call it together."""
        for record in all_of(self._new):
            self._records.setdefault(record.key, record)
        self._new = []

    def rates(self) -> dict[str, float]:
        """What is known so far, for a progress line; nothing where nothing was written."""
        tokens, forwards, seconds = totals(self)
        if not forwards:
            return {}
        return {"tokens/s": tokens / max(seconds, 1e-9), "tokens/forward": tokens / forwards}

    def close(self) -> None:
        if self._file:
            self._file.close()


def check_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes sure that answers are continued with the settings that they were begun with; a new file holds these.

    Raises:
      UserError: names the first setting that differs.
    """
    with writing(path):
        if not path.exists():
            if jax.process_index() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.write(path, json.dumps(settings, indent=1).encode() + b"\n")
            return
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}). Choose another --out, or remove that folder.") from None
    for name in sorted(begun | settings):
        if begun.get(name) != settings.get(name):
            raise UserError(
                f"The answers beside {path} were begun with {name} = {begun.get(name)!r}, not {settings.get(name)!r}. "
                "Choose another --out, or go on with the same."
            )


def totals(records: Iterable[Record]) -> tuple[int, int, float]:
    """(tokens, forwards, seconds) of records; processes work at the same time, so the slowest one's seconds count."""
    records = list(records)
    seconds: dict[int, float] = {}
    for record in records:
        seconds[record.process] = seconds.get(record.process, 0.0) + record.seconds
    tokens, forwards = (sum(getattr(record, name) for record in records) for name in ("tokens", "forwards"))
    return tokens, forwards, max(seconds.values(), default=0.0)


def all_of(records: list[Record]) -> list[Record]:
    """The records of all processes, in their order."""
    if jax.process_count() == 1:
        return records
    told = distributed.of_all([dataclasses.asdict(record) for record in records])
    return [Record(**fields) for of_process in told for fields in of_process]


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file; a last line that was cut off is removed."""
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    records = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is no answer ({error}). Remove the line, or the file to decode all again."
            ) from None
    if rest:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(rest))
    return records


@contextlib.contextmanager
def writing(place: pathlib.Path) -> Iterator[None]:
    """Turns what the system says of a place that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {place}: {error.strerror or error}. Make room or choose another --out; what was answered "
            "before is kept."
        ) from None
