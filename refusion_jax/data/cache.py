"""A source's examples as token ids on disk: tokenised once, random access afterwards.

A cache is a folder of flat little-endian arrays, read through memory maps:

  tokens.bin          uint32, examples end to end; an example is prompt, response, end id (method section 2)
  offsets.bin         int64 [examples + 1], where each example starts
  prompt_lengths.bin  int32 [examples]
  hashes.bin          uint64 [examples], `examples.prompt_hash`
  meta.json           sizes and checksums of the above; written last
  checked.json        sizes and times of these files when their checksums were last compared

Flat arrays and not ArrayRecord, because fetching an example's ids takes about a fifteenth of the time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator

import numpy as np

from refusion_jax.data import stamps
from refusion_jax.data.examples import Source, prompt_hash
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.errors import UserError
from refusion_jax.progress import Progress

FORMAT = 1
_ARRAYS = {"tokens": "<u4", "offsets": "<i8", "prompt_lengths": "<i4", "hashes": "<u8"}
_CHUNK = 2048  # examples tokenised at a time


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenised examples of a source. Arrays as in the module's docstring, mapped from disk."""

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, prompt, response and end id: int64 [examples]."""
        return np.diff(self.offsets)


def cached_tokens(source: Source, tokenizer: Tokenizer, cache_dir: str | os.PathLike) -> TokenCache:
    """Returns a source's tokenised examples, from `cache_dir` where a sound cache of them is, else made there first.

    The cache's name holds the content's and the tokenizer's fingerprints, so a stale one is never found. Its checksums
    are compared once, by one process, and again when a file's size or time of change is another; a damaged or
    unfinished cache is replaced. Processes that start together wait for the one that builds or compares; later ones
    wait for none.

    Raises:
      UserError: bad records (see `sources`), no records, or a `cache_dir` that cannot be written.
    """
    folder = _local_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = f"{FORMAT} {source.key(folder)} {tokenizer.fingerprint}"
        folder /= f"{source.config.kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
        cache = _checked_before(folder)
        if cache is None:
            with stamps.locked(folder.with_suffix(".lock")) as alone:
                cache = _checked_before(folder) or _check(folder) or _make(source, tokenizer, folder, alone)
    except OSError as error:
        raise UserError(
            f"the cache of tokenised data cannot be kept in {str(cache_dir)!r}: {error}. Set data.cache_dir to a "
            "folder that can be written and has room."
        ) from error
    return cache


def _local_folder(cache_dir: str | os.PathLike) -> pathlib.Path:
    """`cache_dir` as a folder of this machine.

    Raises:
      UserError: it is the address of something else.
    """
    if "://" in str(cache_dir):
        raise UserError(
            f"data.cache_dir is {str(cache_dir)!r}, but the cache of tokenised data is mapped into memory and must be "
            "in a local folder. Set data.cache_dir to one."
        )
    return pathlib.Path(cache_dir).expanduser()


def example_ids(tokenizer: Tokenizer, examples: list[tuple[str | None, str]]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids, prompt length) of each (query, response): the training sequence of method section 2."""
    begin = [tokenizer.begin_id]
    queries = [query for query, _ in examples if query is not None]
    prompts = iter(tokenizer.encode_prompts(queries) if queries else ())
    for (query, _), response in zip(examples, tokenizer.encode_batch([response for _, response in examples])):
        prompt = begin if query is None else next(prompts)
        yield np.concatenate([prompt, response, [tokenizer.eos_id]]).astype(np.uint32), len(prompt)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [*(folder / f"{name}.bin" for name in _ARRAYS), folder / "meta.json"]


def _map(folder: pathlib.Path) -> TokenCache:
    return TokenCache(**{name: np.memmap(folder / f"{name}.bin", dtype, mode="r") for name, dtype in _ARRAYS.items()})


def _checked_before(folder: pathlib.Path) -> TokenCache | None:
    """The cache in a folder if its checksums were right once and no file has changed since; no array is read."""
    return _map(folder) if stamps.recall(folder / "checked.json", _files(folder)) else None


def _check(folder: pathlib.Path) -> TokenCache | None:
    """The cache in a folder if its checksums are right, which is then remembered; None if it is absent or damaged."""
    try:
        taken = stamps.take(_files(folder))
        meta = json.loads((folder / "meta.json").read_text())
        for name in _ARRAYS:
            path = folder / f"{name}.bin"
            if os.path.getsize(path) != meta[name]["bytes"] or _checksum(path) != meta[name]["crc32"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stamps.remember(folder / "checked.json", taken, True)
    return _map(folder)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _make(source: Source, tokenizer: Tokenizer, folder: pathlib.Path, alone: bool) -> TokenCache:
    """Builds the cache in a folder, in the place of a damaged one.

    Args:
      alone: no other process builds it now; else several may, and the first one to finish wins.
    """
    if folder.exists():
        print(f"The cache of tokenised data {str(folder)!r} is damaged; it is built again.", file=sys.stderr)
    for left_over in folder.parent.glob(f"{folder.name}.unfinished-*") if alone else ():
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        _write(source, tokenizer, unfinished)
        if folder.exists() and _check(folder) is None:
            shutil.rmtree(folder)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if _check(folder) is None:  # not because another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    cache = _check(folder)
    if cache is None:
        raise UserError(
            f"the cache of tokenised data {str(folder)!r} is damaged again right after it was written: check the "
            "disk, or set data.cache_dir to another one."
        )
    return cache


def _write(source: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the files of a cache; the checksums are of what was to be written, not of what can be read afterwards."""
    total = len(source)
    if not total:
        raise UserError(f"data source {source.name!r} is empty. Give one with at least one example.")
    lengths, prompt_lengths, hashes, checksum = [], [], [], 0
    progress = Progress(f"tokenising {source.name}: example", total)
    with open(folder / "tokens.bin", "wb") as file:
        for first in range(0, total, _CHUNK):
            examples = [source[i] for i in range(first, min(first + _CHUNK, total))]
            for ids, prompt_length in example_ids(tokenizer, examples):
                data = ids.astype("<u4").tobytes()
                checksum = zlib.crc32(data, checksum)
                file.write(data)
                lengths.append(len(ids))
                prompt_lengths.append(prompt_length)
            hashes.extend(prompt_hash(*example) for example in examples)
            progress.show(len(lengths))
    progress.say(f"tokenised {source.name}: {total:,} examples")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    meta = {"source": source.name, "examples": total, "tokens": {"bytes": 4 * int(offsets[-1]), "crc32": checksum}}
    for name, values in (("offsets", offsets), ("prompt_lengths", prompt_lengths), ("hashes", hashes)):
        array = np.asarray(values, _ARRAYS[name])
        array.tofile(folder / f"{name}.bin")
        meta[name] = {"bytes": array.nbytes, "crc32": zlib.crc32(array)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # the move to its place must not reach the disk before the content
