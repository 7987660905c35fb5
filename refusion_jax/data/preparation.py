"""From a source to its store: planned without reading, a shard at a time by any number of workers, then indexed.

What a shard holds follows from the plan alone, so who makes it, when and how often makes no difference. A run prepares
small data itself, in one process (`prepared`); `python -m refusion_jax.prepare` does it with many.
"""

import hashlib
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from etils import epath

from refusion_jax import storage
from refusion_jax.data import shards, stamps
from refusion_jax.data.examples import Source, Unit, prompt_hash
from refusion_jax.data.store import FORMAT, Store, describe, open_store, shard_path
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.errors import UserError
from refusion_jax.progress import Progress

SHARD_BYTES = 256 * 2**20  # of text; its tokens take about as many
_CHUNK = 512  # examples tokenised at a time


def plan(source: Source, tokenizer: Tokenizer, notes: pathlib.Path | None, shard_bytes: int = 0) -> dict:
    """What the store of a source will be made of; the same in every process.

    Args:
      notes: see `Source.key`.
      shard_bytes: of text in a shard, about; 0: `SHARD_BYTES`.
    """
    cut, size, shard_bytes = [[]], 0, shard_bytes or SHARD_BYTES
    for unit in source.units(shard_bytes):
        if cut[-1] and size + unit.size > shard_bytes:
            cut.append([])
            size = 0
        cut[-1].append([unit.file, unit.start, unit.stop, unit.size])
        size += unit.size
    return {
        "format": FORMAT,
        "source": source.name,
        "description": describe(source.config),
        "content": source.key(notes),
        "tokenizer": tokenizer.fingerprint,
        "shards": cut,
    }


def folder_of(source: Source, tokenizer: Tokenizer, root: epath.Path, notes: pathlib.Path | None) -> epath.Path:
    """Where in `root` the store of a source is: named after content and tokenizer, a stale one is never found."""
    key = f"{FORMAT} {source.key(notes)} {tokenizer.fingerprint}"
    return root / f"{source.config.kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"


def make_shard(source: Source, tokenizer: Tokenizer, units: list[list[int]], path: epath.Path) -> shards.Shard:
    """Tokenises a stretch of a source into the shard whose .bin file is `path`."""
    examples = itertools.chain.from_iterable(source.read(Unit(*unit)) for unit in units)
    with tempfile.TemporaryDirectory() as scratch:
        return shards.write(path, tokenised(tokenizer, examples), os.path.join(scratch, "shard"))


def tokenised(
    tokenizer: Tokenizer, examples: Iterator[tuple[str | None, str]]
) -> Iterator[tuple[np.ndarray, int, int, bool]]:
    """Yields (ids, prompt length, hash, whether a document) of each (query, response)."""
    while chunk := list(itertools.islice(examples, _CHUNK)):
        for example, (ids, prompt_length) in zip(chunk, example_ids(tokenizer, chunk)):
            yield ids, prompt_length, prompt_hash(*example), example[0] is None


def example_ids(tokenizer: Tokenizer, examples: list[tuple[str | None, str]]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids, prompt length) of each (query, response): the training sequence of method section 2."""
    begin = [tokenizer.begin_id]
    queries = [query for query, _ in examples if query is not None]
    prompts = iter(tokenizer.encode_prompts(queries) if queries else ())
    for (query, _), response in zip(examples, tokenizer.encode_batch([response for _, response in examples])):
        prompt = begin if query is None else next(prompts)
        yield np.concatenate([prompt, response, [tokenizer.eos_id]]).astype(np.uint32), len(prompt)


def remove_parts(folder: epath.Path, name: str = "*") -> None:
    """Removes what writers that were killed left half written in a local folder."""
    for part in folder.glob(f"{name}.part"):
        part.unlink(missing_ok=True)


def finished(folder: epath.Path, number: int) -> bool:
    """Whether a shard is there, whole and undamaged; reads it."""
    shard = shards.read(shard_path(folder, number))
    return shard is not None and shards.sound(shard)


def write_plan(folder: epath.Path, planned: dict) -> None:
    """Writes down what a store will be made of.

    Raises:
      UserError: another store was begun there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = shards.read_checked(folder / "plan.json")
    if found is None:
        shards.write_checked(folder / "plan.json", planned)
    elif found[0]["shards"] != planned["shards"]:
        raise UserError(
            f"the store {str(folder)!r} was begun with shards cut elsewhere ({len(found[0]['shards'])}, now "
            f"{len(planned['shards'])}). Use the same files and --shard-mib as then, or remove that folder."
        )


def write_index(folder: epath.Path, planned: dict) -> Store | None:
    """Finishes a store all of whose shards are there; None if some are not.

    Raises:
      UserError: the source has no example.
    """
    made = [shards.read(shard_path(folder, number)) for number in range(len(planned["shards"]))]
    if not all(made):
        return None
    if not sum(shard.examples for shard in made):
        raise UserError(f"data source {planned['source']!r} is empty. Give one with at least one example.")
    counts = [[shard.examples, shard.tokens, len(shard.blocks), shard.crc32] for shard in made]
    shards.write_checked(folder / "index.json", planned | {"shards": counts})
    return open_store(folder)


def prepared(source: Source, tokenizer: Tokenizer, cache_dir: str | os.PathLike) -> Store:
    """The store of a source, from `cache_dir` where a sound one is, else made there first, in this process.

    Its checksums are compared once, by one process, and again when a file's size or time of change is another; damaged
    or missing shards are made again. Processes that start together wait for the one that makes or compares; later ones
    wait for none.

    Raises:
      UserError: bad records (see `sources`), no records, or a `cache_dir` that cannot be written.
    """
    root = _local_folder(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = epath.Path(folder_of(source, tokenizer, root, root))
        if _checked_before(folder):
            return open_store(folder)
        with stamps.locked(root / f"{folder.name}.lock") as alone:
            if not _checked_before(folder):
                _make(source, tokenizer, folder, root, alone)
            return open_store(folder)
    except OSError as error:
        raise UserError(
            f"the cache of tokenised data cannot be kept in {str(cache_dir)!r}: {error}. Set data.cache_dir to a "
            "folder that can be written and has room."
        ) from error


def _local_folder(cache_dir: str | os.PathLike) -> pathlib.Path:
    """`cache_dir` as a folder of this machine.

    Raises:
      UserError: it is the address of something else.
    """
    if not storage.is_local(cache_dir):
        raise UserError(
            f"data.cache_dir is {str(cache_dir)!r}, but a run can tokenise data into a local folder only. Set "
            "data.cache_dir to one; or prepare the data there (python -m refusion_jax.prepare) and set data.store."
        )
    return pathlib.Path(cache_dir).expanduser()


def _files(folder: epath.Path) -> list[epath.Path]:
    return [path for path in sorted(folder.iterdir()) if path.name == "index.json" or path.name.startswith("shard-")]


def _checked_before(folder: epath.Path) -> bool:
    """Whether the store in a folder was sound once and no file has changed since; reads none."""
    return folder.is_dir() and bool(stamps.recall(pathlib.Path(folder, "checked.json"), _files(folder)))


def _make(source: Source, tokenizer: Tokenizer, folder: epath.Path, notes: pathlib.Path, alone: bool) -> None:
    """Makes what is missing of a store, or damaged.

    Args:
      alone: no other process makes it now; else several may, which write the same.
    """
    planned = plan(source, tokenizer, notes)
    write_plan(folder, planned)
    if alone:
        remove_parts(folder)
    whole = (folder / "index.json").exists()
    taken = stamps.take(_files(folder))
    numbers = range(len(planned["shards"]))
    missing = [number for number in numbers if not finished(folder, number)]
    if not missing and open_store(folder):
        stamps.remember(pathlib.Path(folder, "checked.json"), taken, True)
        return
    if whole:
        print(f"The cache of tokenised data {str(folder)!r} is damaged; it is made again.", file=sys.stderr)
    progress = Progress(f"tokenising {source.name}: shard", len(numbers), begun=len(numbers) - len(missing))
    for done, number in enumerate(missing, len(numbers) - len(missing) + 1):
        make_shard(source, tokenizer, planned["shards"][number], shard_path(folder, number))
        progress.show(done)
    store = write_index(folder, planned)
    taken = stamps.take(_files(folder))
    if store is None or not all(finished(folder, number) for number in missing):
        raise UserError(
            f"the cache of tokenised data {str(folder)!r} is damaged again right after it was written: check the "
            "disk, or set data.cache_dir to another one."
        )
    progress.say(f"tokenised {source.name}: {len(store):,} examples")
    stamps.remember(pathlib.Path(folder, "checked.json"), taken, True)
