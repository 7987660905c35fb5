"""Sources in files: JSON, JSON lines, plain text, Parquet and ArrayRecord."""

import contextlib
import functools
import glob
import hashlib
import io
import json
import os

from refusion_jax import storage
from refusion_jax.data import stamps
from refusion_jax.data.examples import Source, Unit, record_units, text_of
from refusion_jax.data.lines import compressed, lines_before, lines_of, mapped
from refusion_jax.errors import UserError

HASHED_WHOLE = 4 * 2**30  # bytes of a source up to which its content's hash is of every byte
UNREADABLE = (ValueError, RecursionError)  # as JSON: malformed, numbers of thousands of digits, or so many brackets
_SAMPLE = 1 << 16


class FileSource(Source):
    """A source in one or several files: a path, a glob, or a folder (all of its files with the kind's suffixes)."""

    suffixes: tuple[str, ...] = ()

    @functools.cached_property
    def paths(self) -> list[str]:
        path = os.path.expanduser(self.config.path)
        if not storage.is_local(path):
            found = storage.find(path, self.suffixes)
            expected = "there is nothing of that kind, or the environment's credentials may not read it"
        elif os.path.isdir(path):
            found = sorted(
                os.path.join(path, f) for f in os.listdir(path) if self.suffixes and f.endswith(self.suffixes)
            )
            expected = f"the folder holds no {' or '.join(self.suffixes)} file"
        else:
            found = (
                [path]
                if os.path.exists(path)
                else sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            )
            expected = "there is no such file"
        if not found:
            raise UserError(
                f"data source {self.name!r} is missing: {expected}. Give a file, a glob or a folder (relative to "
                f"{os.getcwd()!r}, or in a bucket)."
            )
        return found

    def _content_key(self, notes):
        if notes is None:
            return self._hash()
        places = "\n".join(str(storage.absolute(path)) for path in self.paths)
        note = notes / f"content-{hashlib.blake2b(places.encode(), digest_size=16).hexdigest()}.json"
        known = stamps.recall(note, self.paths)
        if known is None:
            with stamps.locked(note.with_suffix(".lock")):  # of processes that start together one reads the files
                known = stamps.recall(note, self.paths)
                if known is None:
                    taken = stamps.take(self.paths)
                    known = self._hash()
                    stamps.remember(note, taken, known)
        return known

    def units(self, size):
        return [Unit(file, 0, length, length) for file, length in enumerate(storage.sizes(self.paths))]

    def _hash(self) -> str:
        """Of all bytes; of terabytes, which are written once, of every file's size and 16 samples of it."""
        digest, sizes = hashlib.blake2b(digest_size=16), storage.sizes(self.paths)
        for path, size in zip(self.paths, sizes):
            digest.update(f"{size} ".encode())
            try:
                if sum(sizes) > HASHED_WHOLE:
                    starts = [max(size - _SAMPLE, 0) * sample // 15 for sample in range(16)]
                    for start in starts:
                        digest.update(storage.read(path, start, start + _SAMPLE))
                    continue
                with storage.open_binary(path) as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
            except OSError as error:
                raise UserError(
                    f"the data file {path!r} cannot be read: {error}. Change its permissions or give another file."
                ) from error
        return digest.hexdigest()


def _text_in(path: str, encoding: str = "utf-8") -> str:
    try:
        with io.TextIOWrapper(storage.open_binary(path), encoding) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Convert it to UTF-8.") from error


class JsonSource(FileSource):
    """Files that each hold one JSON list of objects."""

    suffixes = (".json",)

    @functools.cached_property
    def _records(self):
        records = []
        self._starts = []  # of each file, to name the place of a record
        for file in range(len(self.paths)):
            self._starts.append(len(records))
            records.extend(self._load(file))
        return records

    def _load(self, file: int) -> list:
        path = self.paths[file]
        text = _text_in(path, "utf-8-sig")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}). The file must be "
                "one list of objects; for one object per line use the kind 'jsonl'."
            ) from error
        except UNREADABLE as error:
            raise UserError(f"{path}: JSON that cannot be read ({error}). Remove or shorten that value.") from error
        if not isinstance(content, list):
            raise UserError(f"{path} holds a JSON {type(content).__name__}, not a list. Make it a list of objects.")
        return content

    def read(self, unit):
        for i, record in enumerate(self._load(unit.file)):
            yield self._from_fields(record, self._record_place(unit.file, i))

    def _place(self, i):
        file = max(n for n, start in enumerate(self._starts) if start <= i)
        return self._record_place(file, i - self._starts[file])

    def _record_place(self, file: int, i: int) -> str:
        return f"{self.paths[file]}, record {i} (counted from 0)"


class JsonLinesSource(FileSource):
    """Files with one JSON object per line, plain or compressed (.gz, .zst); blank lines are skipped."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    @functools.cached_property
    def _records(self):
        lines = []  # (file, line number, start, stop) of every line that is not blank
        self._files = []
        for number, path in enumerate(self.paths):
            start = 0
            with lines_of(path) as file:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        lines.append((number, line, start, start + len(text)))
                    start += len(text)
            self._files.append(mapped(path) if start else b"")
        return lines

    def __getitem__(self, i):
        file, line, start, stop = self._records[i]
        return self._parse(self._files[file][start:stop], f"{self.paths[file]}, line {line}")

    def units(self, size):
        cut = []
        for unit in super().units(size):
            if compressed(self.paths[unit.file]):  # can only be read from its start; text shrinks to about a quarter
                cut.append(Unit(unit.file, 0, unit.stop, 4 * unit.size))
                continue
            for start in range(0, unit.stop, size):
                stop = min(start + size, unit.stop)
                cut.append(Unit(unit.file, start, stop, stop - start))
        return cut

    def read(self, unit):
        """Of a plain file the lines that begin in the unit's bytes."""
        path = self.paths[unit.file]
        with lines_of(path) as file:
            at = unit.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # the rest of a line that began before
            for number, text in enumerate(file, 1):
                if at >= unit.stop and not compressed(path):
                    break
                if text.strip():
                    yield self._parse(text, path, number, unit.start)
                at += len(text)

    def _parse(self, text: bytes, place: str, number: int = 0, start: int = 0) -> tuple[str | None, str]:
        """An example from a line.

        Args:
          place: of the line; with `number` of its file, where it is the nth line that begins behind byte `start`.
        """
        try:
            return self._from_fields(json.loads(text.decode("utf-8")), place)
        except UNREADABLE as error:
            if number:  # to count lines costs time, which good lines need not spend
                return self._parse(text, f"{place}, line {number + lines_before(place, start)}")
            if isinstance(error, json.JSONDecodeError):
                raise UserError(
                    f"{place}, column {error.colno}: malformed JSON ({error.msg}). Every line must be one JSON object."
                ) from error
            if isinstance(error, UnicodeDecodeError):
                raise UserError(f"{place} is not UTF-8 text ({error}). Convert the file to UTF-8.") from error
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place}: JSON that cannot be read ({error}). Remove or shorten that value.") from error


class TextSource(FileSource):
    """Plain text for pretraining: every file is a document, or several with the option `separator` between them."""

    suffixes = (".txt", ".md")
    options = ("separator",)

    def __init__(self, config):
        super().__init__(config)
        self._separator = dict(config.options).get("separator", "")
        if not isinstance(self._separator, str):
            raise UserError(
                f"data source {self.name!r} has the option separator = {self._separator!r}; it must be the text that "
                "stands between documents, such as '\\n\\n'."
            )

    def _content_key(self, notes):
        return super()._content_key(notes), self.config.options

    @functools.cached_property
    def _records(self):
        return [document for file in range(len(self.paths)) for document in self._load(file)]

    def _load(self, file: int) -> list[str]:
        text = _text_in(self.paths[file])
        pieces = [piece.strip() for piece in text.split(self._separator)] if self._separator else [text]
        return [piece for piece in pieces if piece.strip()]

    def __getitem__(self, i):
        return None, self._records[i]

    def read(self, unit):
        return ((None, document) for document in self._load(unit.file))


@contextlib.contextmanager
def _parquet(name: str):
    """Raises a UserError where what is called so is damaged, which may be seen only once a page is read."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read as Parquet: {error}. Write it again.") from error


class ParquetSource(FileSource):
    """Parquet files; only the two columns are read."""

    suffixes = (".parquet",)

    @property
    def _columns(self) -> list[str]:
        return [f for f in (self.config.query_field, self.config.response_field) if f]

    def _open(self, path: str):
        import pyarrow.parquet

        with _parquet(path):
            # A path, so that the file is mapped and closed with the last reference.
            place = path if storage.is_local(path) else storage.open_binary(path)
            file = pyarrow.parquet.ParquetFile(place, memory_map=True)
        present = dict.fromkeys(file.schema_arrow.names, "")
        text_of(present, self.config.response_field, "response_field", path)
        if self.config.query_field:
            text_of(present, self.config.query_field, "query_field", path)
        return file

    @functools.cached_property
    def _records(self):
        import pyarrow

        tables = []
        for path in self.paths:
            with _parquet(path):
                tables.append(self._open(path).read(columns=self._columns))
        with _parquet(self.name):
            table = pyarrow.concat_tables(tables)
        return [table.column(c).combine_chunks() if table.num_rows else [] for c in self._columns]

    def __len__(self):
        return len(self._records[0])

    def __getitem__(self, i):
        with _parquet(self._place(i)):
            record = {c: values[i].as_py() for c, values in zip(self._columns, self._records)}
        return self._from_fields(record, self._place(i))

    def units(self, size):
        """Row groups."""
        found = []
        for file, path in enumerate(self.paths):
            meta = self._open(path).metadata
            found += [Unit(file, g, g + 1, meta.row_group(g).total_byte_size) for g in range(meta.num_row_groups)]
        return found

    def read(self, unit):
        path = self.paths[unit.file]
        file = self._open(path)
        first = sum(file.metadata.row_group(g).num_rows for g in range(unit.start))
        with _parquet(path):
            for batch in file.iter_batches(1024, row_groups=[unit.start], columns=self._columns):
                for record in batch.to_pylist():
                    yield self._from_fields(record, f"{path}, record {first} (counted from 0)")
                    first += 1


class ArrayRecordSource(FileSource):
    """ArrayRecord files whose records are JSON objects."""

    suffixes = (".array_record", ".arrayrecord")

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if not all(map(storage.is_local, self.paths)):
            raise UserError(
                f"data source {self.name!r} is in a bucket, and ArrayRecord files are read from folders only. Copy "
                "them to one to prepare them, or give JSON lines or Parquet files."
            )
        try:
            return ArrayRecordDataSource(self.paths)
        except Exception as error:
            raise UserError(
                f"data source {self.name!r} cannot be read as ArrayRecord: {error}. Write the files again."
            ) from error

    def units(self, size):
        return record_units(0, len(self), size)

    def __getitem__(self, i):
        record = self._records[i]
        try:
            record = json.loads(record)
        except UNREADABLE as error:
            raise UserError(
                f"{self._place(i)}: malformed JSON ({error}). Every record must be one JSON object."
            ) from error
        return self._from_fields(record, self._place(i))
