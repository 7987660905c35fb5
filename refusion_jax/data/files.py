"""Sources in files: JSON, JSON lines, plain text, Parquet and ArrayRecord."""

import functools
import glob
import hashlib
import json
import mmap
import os

from refusion_jax.data import stamps
from refusion_jax.data.examples import Source, text_of
from refusion_jax.errors import UserError


class FileSource(Source):
    """A source in one or several files: a path, a glob, or a folder (all of its files with the kind's suffixes)."""

    suffixes: tuple[str, ...] = ()

    @functools.cached_property
    def paths(self) -> list[str]:
        path = os.path.expanduser(self.config.path)
        if os.path.isdir(path):
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
                f"{os.getcwd()!r})."
            )
        return found

    def _content_key(self, notes):
        if notes is None:
            return self._hash()
        name = hashlib.blake2b("\n".join(map(os.path.abspath, self.paths)).encode(), digest_size=16).hexdigest()
        note = notes / f"content-{name}.json"
        known = stamps.recall(note, self.paths)
        if known is None:
            with stamps.locked(note.with_suffix(".lock")):  # of processes that start together one reads the files
                known = stamps.recall(note, self.paths)
                if known is None:
                    taken = stamps.take(self.paths)
                    known = self._hash()
                    stamps.remember(note, taken, known)
        return known

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            try:
                digest.update(str(os.path.getsize(path)).encode() + b" ")
                with open(path, "rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
            except OSError as error:
                raise UserError(
                    f"the data file {path!r} cannot be read: {error}. Mend its permissions or give another file."
                ) from error
        return digest.hexdigest()


class JsonSource(FileSource):
    """Files that each hold one JSON list of objects."""

    suffixes = (".json",)

    @functools.cached_property
    def _records(self):
        records = []
        self._starts = []  # of each file, to name the place of a record
        for path in self.paths:
            try:
                with open(path, encoding="utf-8-sig") as file:
                    content = json.load(file)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}). The file must "
                    "be one list of objects; for one object per line use the kind 'jsonl'."
                ) from error
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error}). Convert it to UTF-8.") from error
            if not isinstance(content, list):
                raise UserError(f"{path} holds a JSON {type(content).__name__}, not a list. Make it a list of objects.")
            self._starts.append(len(records))
            records.extend(content)
        return records

    def _place(self, i):
        file = max(n for n, start in enumerate(self._starts) if start <= i)
        return f"{self.paths[file]}, record {i - self._starts[file]} (counted from 0)"


class JsonLinesSource(FileSource):
    """Files with one JSON object per line; blank lines are skipped."""

    suffixes = (".jsonl",)

    @functools.cached_property
    def _records(self):
        lines = []  # (file, line number, start, stop) of every line that is not blank
        self._files = []
        for number, path in enumerate(self.paths):
            start = 0
            with open(path, "rb") as file:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        lines.append((number, line, start, start + len(text)))
                    start += len(text)
                self._files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b"")
        return lines

    def __getitem__(self, i):
        file, _, start, stop = self._records[i]
        try:
            record = json.loads(self._files[file][start:stop].decode("utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self._place(i)}, column {error.colno}: malformed JSON ({error.msg}). Every line must "
                "be one JSON object."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self._place(i)} is not UTF-8 text ({error}). Convert the file to UTF-8.") from error
        return self._from_fields(record, self._place(i))

    def _place(self, i):
        return f"{self.paths[self._records[i][0]]}, line {self._records[i][1]}"


class TextSource(FileSource):
    """Plain text for pretraining: every file is a document, or several with the option `separator` between them."""

    suffixes = (".txt", ".md")

    def _content_key(self, notes):
        return super()._content_key(notes), self.config.options

    @functools.cached_property
    def _records(self):
        separator = dict(self.config.options).get("separator")
        documents = []
        for path in self.paths:
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error}). Convert it to UTF-8.") from error
            pieces = [piece.strip() for piece in text.split(separator)] if separator else [text]
            documents.extend(piece for piece in pieces if piece.strip())
        return documents

    def __getitem__(self, i):
        return None, self._records[i]


class ParquetSource(FileSource):
    """Parquet files; only the two columns are read."""

    suffixes = (".parquet",)

    @functools.cached_property
    def _records(self):
        import pyarrow
        import pyarrow.parquet

        columns = [f for f in (self.config.query_field, self.config.response_field) if f]
        tables = []
        for path in self.paths:
            try:
                present = pyarrow.parquet.read_schema(path).names
                text_of(dict.fromkeys(present, ""), self.config.response_field, "response_field", path)
                if self.config.query_field:
                    text_of(dict.fromkeys(present, ""), self.config.query_field, "query_field", path)
                tables.append(pyarrow.parquet.read_table(path, columns=columns, memory_map=True))
            except pyarrow.ArrowException as error:
                raise UserError(f"{path} cannot be read as a Parquet file: {error}. Write it again.") from error
        table = pyarrow.concat_tables(tables)
        return [table.column(c).combine_chunks() if table.num_rows else [] for c in columns]

    def __len__(self):
        return len(self._records[0])

    def __getitem__(self, i):
        columns = [f for f in (self.config.query_field, self.config.response_field) if f]
        return self._from_fields({c: values[i].as_py() for c, values in zip(columns, self._records)}, self._place(i))


class ArrayRecordSource(FileSource):
    """ArrayRecord files whose records are JSON objects."""

    suffixes = (".array_record", ".arrayrecord")

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            return ArrayRecordDataSource(self.paths)
        except Exception as error:
            raise UserError(
                f"data source {self.name!r} cannot be read as ArrayRecord: {error}. Write the files again."
            ) from error

    def __getitem__(self, i):
        try:
            record = json.loads(self._records[i])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self._place(i)}: malformed JSON ({error}). Every record must be one JSON object."
            ) from error
        return self._from_fields(record, self._place(i))
