"""Where examples come from: random access to (query, response) pairs in files, TFDS data sets and procedural tasks.

A source is opened cheaply: its records are not read before the first `len` or `[i]`, which a run with a filled cache of tokenised data
never asks for.
"""

import functools
import glob
import hashlib
import importlib.metadata
import json
import mmap
import os
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

    An example belongs where its prompt's hash falls, as a fraction of all hashes. So two examples with the same prompt never stand on two
    sides of a cut, and a held-out part holds no prompt that was trained on.

    Args:
      hashes: `prompt_hash` of each example, uint64 of any shape.

    Returns:
      bool of the same shape.
    """
    fraction = hashes / 2.0**64
    return (fraction >= start) & ((fraction < stop) | (stop >= 1))


class Source:
    """Examples of one source.

    `source[i]` is (query, response); the query is None for plain text, where the whole document is the response.

    Attributes:
      name: for messages.
      key: changes when the content or the way it is read does.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.name = f"{config.kind}:{config.path}"

    @property
    def key(self) -> str:
        fields = (self.config.query_field, self.config.response_field)
        return hashlib.blake2b(
            repr((self.config.kind, self._content_key(), fields)).encode(), digest_size=16
        ).hexdigest()

    def _content_key(self) -> Any:
        raise NotImplementedError

    @functools.cached_property
    def _records(self) -> Sequence[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> tuple[str | None, str]:
        return self._from_fields(self._records[i], self._place(i))

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
        query = _text(record, config.query_field, "query_field", place) if config.query_field else None
        response = _text(record, config.response_field, "response_field", place)
        if not response.strip():
            raise UserError(
                f"{place}: the response (field {config.response_field!r}) is empty. Remove the record or give it a "
                "response."
            )
        return query, response


def _text(record: Mapping[str, Any], field: str, setting: str, place: str) -> str:
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

    def _content_key(self):
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

    def _content_key(self):
        return super()._content_key(), self.config.options

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
                _text(dict.fromkeys(present, ""), self.config.response_field, "response_field", path)
                if self.config.query_field:
                    _text(dict.fromkeys(present, ""), self.config.query_field, "query_field", path)
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


class TfdsSource(Source):
    """A TFDS data set by name (prepared on first use) or by a prepared one's folder. The option `data_dir` says where sets are kept."""

    @functools.cached_property
    def _builder(self):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"data source {self.name!r} needs the tensorflow-datasets library ({error}). Install it: "
                "pip install tensorflow-datasets."
            ) from error
        path = os.path.expanduser(self.config.path)
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "dataset_info.json")):
                raise UserError(
                    f"the folder {self.config.path!r} is not a prepared TFDS data set (no dataset_info.json). Give "
                    "the folder of a version, such as 'DIR/my_dataset/1.0.0', or a data set's name with the option "
                    "data_dir."
                )
            return tfds.builder_from_directory(path)
        try:
            builder = tfds.builder(self.config.path, file_format="array_record", **dict(self.config.options))
            builder.download_and_prepare()
            return builder
        except Exception as error:  # an unknown name, no network, a missing optional package
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the TFDS data set {self.config.path!r} could not be found or prepared: {reason}. Give a known name "
                "with network access, or the folder of a prepared data set."
            ) from error

    def _content_key(self):
        info, split = self._builder.info, self._split()
        # Not the bytes: a prepared set can be terabytes, and is written once.
        files = [(os.path.basename(f), os.path.getsize(f), int(os.path.getmtime(f))) for f in split.filepaths]
        return info.full_name, self.config.split, split.num_examples, files

    def _split(self):
        splits = self._builder.info.splits
        if self.config.split not in splits:
            raise UserError(
                f"data source {self.name!r} has no split {self.config.split!r}; it has {', '.join(splits) or 'none'}. "
                "Set the source's split to one of them."
            )
        return splits[self.config.split]

    @functools.cached_property
    def _records(self):
        self._split()
        return self._builder.as_data_source(split=self.config.split)


class ProceduralSource(Source):
    """A reasoning-gym task (see `tasks.Task`)."""

    @functools.cached_property
    def _records(self):
        return tasks.Task(self.config.path, self.config.size, self.config.seed, dict(self.config.options))

    def _content_key(self):
        version = importlib.metadata.version("reasoning-gym") if self._records else ""
        return self.config.path, self.config.size, self.config.seed, sorted(self.config.options), version

    def __getitem__(self, i):
        return self._records[i]

    def score(self, i, generated):
        return self._records.score(i, generated)


_KINDS = {
    "json": JsonSource,
    "jsonl": JsonLinesSource,
    "text": TextSource,
    "parquet": ParquetSource,
    "array_record": ArrayRecordSource,
    "tfds": TfdsSource,
    "procedural": ProceduralSource,
}


def open_source(config: SourceConfig) -> Source:
    """Opens a source.

    Raises:
      UserError: here or on first use: missing files, malformed records (with file and line or record), missing fields, an empty response.
    """
    return _KINDS[config.kind](config)
