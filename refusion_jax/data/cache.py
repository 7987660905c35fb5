"""A source's examples as token ids on disk: tokenised once, random access afterwards.

A cache is a folder of flat little-endian arrays, read through memory maps:

  tokens.bin          uint32, examples end to end; an example is prompt, response, end id (method section 2)
  offsets.bin         int64 [examples + 1], where each example starts
  prompt_lengths.bin  int32 [examples]
  hashes.bin          uint64 [examples], `sources.prompt_hash`
  meta.json           sizes and checksums of the above; written last

Flat arrays and not ArrayRecord, because fetching an example's ids takes about a fifteenth of the time.
"""

import contextlib
import dataclasses
import fcntl
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

from refusion_jax.data.sources import Source, prompt_hash
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

    The cache's name holds the content's and the tokenizer's fingerprints, so a stale one is never found; a damaged or
    unfinished one fails its checksums and is replaced. Processes that start together wait for the one that builds.

    Raises:
      UserError: bad records (see `sources`), no records, or a `cache_dir` that cannot be written.
    """
    if "://" in str(cache_dir):
        raise UserError(
            f"data.cache_dir is {str(cache_dir)!r}, but the cache of tokenised data is mapped into memory and must be "
            "in a local folder. Set data.cache_dir to one."
        )
    key = hashlib.blake2b(f"{FORMAT} {source.key} {tokenizer.fingerprint}".encode(), digest_size=16).hexdigest()
    folder = pathlib.Path(cache_dir).expanduser() / f"{source.config.kind}-{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")) as alone:
            cache = _read(folder)
            if cache is None:
                if folder.exists():
                    print(
                        f"The cache of tokenised data {str(folder)!r} is damaged; it is built again.", file=sys.stderr
                    )
                for left_over in folder.parent.glob(f"{folder.name}.unfinished-*") if alone else ():
                    shutil.rmtree(left_over, ignore_errors=True)
                _build(source, tokenizer, folder)
                cache = _read(folder)
    except OSError as error:
        raise UserError(
            f"the cache of tokenised data cannot be kept in {str(cache_dir)!r}: {error}. Set data.cache_dir to a "
            "folder that can be written and has room."
        ) from error
    if cache is None:
        raise UserError(
            f"the cache of tokenised data {str(folder)!r} is damaged again right after it was written: check the "
            "disk, or set data.cache_dir to another one."
        )
    return cache


def example_ids(tokenizer: Tokenizer, examples: list[tuple[str | None, str]]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids, prompt length) of each (query, response): the training sequence of method section 2."""
    begin = [tokenizer.begin_id]
    queries = [query for query, _ in examples if query is not None]
    prompts = iter(tokenizer.encode_prompts(queries) if queries else ())
    for (query, _), response in zip(examples, tokenizer.encode_batch([response for _, response in examples])):
        prompt = begin if query is None else next(prompts)
        yield np.concatenate([prompt, response, [tokenizer.eos_id]]).astype(np.uint32), len(prompt)


def _read(folder: pathlib.Path) -> TokenCache | None:
    """The cache in a folder, None if it is absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {}
        for name, dtype in _ARRAYS.items():
            path = folder / f"{name}.bin"
            if os.path.getsize(path) != meta[name]["bytes"] or _checksum(path) != meta[name]["crc32"]:
                raise ValueError(f"{path.name} is not what was written")
            arrays[name] = np.memmap(path, dtype, mode="r")
        return TokenCache(**arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _build(source: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes a cache beside its final place and moves it there in one step."""
    total = len(source)
    if not total:
        raise UserError(f"data source {source.name!r} is empty. Give one with at least one example.")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        lengths, prompt_lengths, hashes = [], [], []
        progress = Progress(f"tokenising {source.name}: example", total)
        with open(unfinished / "tokens.bin", "wb") as file:
            for first in range(0, total, _CHUNK):
                examples = [source[i] for i in range(first, min(first + _CHUNK, total))]
                for ids, prompt_length in example_ids(tokenizer, examples):
                    file.write(ids.astype("<u4").tobytes())
                    lengths.append(len(ids))
                    prompt_lengths.append(prompt_length)
                hashes.extend(prompt_hash(*example) for example in examples)
                progress.show(len(lengths))
        progress.say(f"tokenised {source.name}: {total:,} examples")
        np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(unfinished / "offsets.bin")
        np.asarray(prompt_lengths, "<i4").tofile(unfinished / "prompt_lengths.bin")
        np.asarray(hashes, "<u8").tofile(unfinished / "hashes.bin")
        files = {name: unfinished / f"{name}.bin" for name in _ARRAYS}
        meta = {name: {"bytes": os.path.getsize(path), "crc32": _checksum(path)} for name, path in files.items()}
        (unfinished / "meta.json").write_text(json.dumps({"source": source.name, "examples": total, **meta}, indent=1))
        for path in (*files.values(), unfinished / "meta.json"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # the move below must not reach the disk before the content
        if folder.exists() and _read(folder) is None:
            shutil.rmtree(folder)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if _read(folder) is None:  # not because another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[bool]:
    """Holds a lock file, which the system releases if the process dies; gives False on a file system without locks."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False  # several may build at once; the first one to finish wins
        yield locked
