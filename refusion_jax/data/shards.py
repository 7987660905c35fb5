"""The format of a shard: a stretch of a source's examples as token ids, read a block at a time.

  shard-00007.bin    uint32 tokens, examples end to end (prompt, response, end id: method section 2); then a record
                     `EXAMPLE` of each
  shard-00007.json   {"content": its counts, size and blocks, "crc32": of that}; written last

A block is a few consecutive examples, at most `BLOCK_TOKENS` tokens unless one example alone has more. It is what is
fetched and what has checksums, of its tokens and of its records.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from refusion_jax import storage
from refusion_jax.errors import UserError

BLOCK_TOKENS = 2**18
BLOCK_EXAMPLES = 2048
EXAMPLE = np.dtype(
    [
        ("hash", "<u8"),  # `examples.prompt_hash`
        ("length", "<u4"),  # tokens: prompt, response and end id
        ("prompt_length", "<u4"),
        ("document", "?"),  # plain text: the prompt is the begin id alone
    ]
)


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block is in its shard. Fields but the first two are counts and checksums (CRC-32)."""

    first_example: int
    first_token: int
    examples: int
    tokens: int
    examples_crc32: int
    tokens_crc32: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: `path` is that of its .bin file, `crc32` that of its description."""

    path: epath.Path
    examples: int
    tokens: int
    blocks: tuple[Block, ...]
    crc32: int

    @property
    def size(self) -> int:
        """Bytes of the .bin file."""
        return 4 * self.tokens + EXAMPLE.itemsize * self.examples

    def read_examples(self, block: Block) -> np.ndarray:
        """The records of a block: `EXAMPLE` [examples]."""
        start = 4 * self.tokens + EXAMPLE.itemsize * block.first_example
        return np.frombuffer(self._read(start, EXAMPLE.itemsize * block.examples, block.examples_crc32), EXAMPLE)

    def read_tokens(self, block: Block) -> np.ndarray:
        """The tokens of a block, end to end: uint32 [tokens]."""
        return np.frombuffer(self._read(4 * block.first_token, 4 * block.tokens, block.tokens_crc32), "<u4")

    def _read(self, start: int, size: int, crc32: int) -> bytes:
        for _ in range(2):  # what came wrong over a network may come right
            content = storage.read(self.path, start, start + size)
            if zlib.crc32(content) == crc32:
                return content
        raise UserError(
            f"{self.path} is damaged, or was changed after its index was written: bytes {start} to {start + size} have "
            "another checksum. Prepare the data again: python -m refusion_jax.prepare makes again what is damaged."
        )


def write(path: epath.Path, examples: Iterator[tuple[np.ndarray, int, int, bool]], scratch: str) -> Shard:
    """Writes a shard, which nobody ever sees half written.

    Args:
      path: of its .bin file.
      examples: (token ids, prompt length, hash, whether a document) of each.
      scratch: local file for the content on its way to a bucket.

    Returns:
      The shard. The checksums are of what was to be written, not of what can be read afterwards.
    """
    records, blocks, ids, counted = [], [], [], []
    first_example = first_token = 0

    def end_block(file) -> None:
        nonlocal first_example, first_token
        if not ids:
            return
        content, described = np.concatenate(ids).astype("<u4").tobytes(), np.array(counted, EXAMPLE).tobytes()
        blocks.append((len(ids), len(content) // 4, zlib.crc32(described), zlib.crc32(content)))
        file.write(content)
        records.append(described)
        first_example, first_token = first_example + len(ids), first_token + len(content) // 4
        ids.clear()
        counted.clear()

    def write_all(part: str) -> None:
        size = 0
        with open(part, "wb") as file:
            for sequence, prompt_length, hashed, document in examples:
                if ids and (size + len(sequence) > BLOCK_TOKENS or len(ids) == BLOCK_EXAMPLES):
                    end_block(file)
                    size = 0
                ids.append(sequence)
                counted.append((hashed, len(sequence), prompt_length, document))
                size += len(sequence)
            end_block(file)
            file.write(b"".join(records))

    if storage.is_local(path):
        with storage.replacing(path) as part:
            write_all(part)
    else:
        write_all(scratch)
        storage.upload(scratch, path)
    content = {"examples": first_example, "tokens": first_token, "blocks": blocks}
    return _shard(path, content, write_checked(path.with_suffix(".json"), content))


def read(path: epath.Path) -> Shard | None:
    """The shard whose .bin file is `path`; None if it is unfinished or its description damaged."""
    found = read_checked(path.with_suffix(".json"))
    return None if found is None else _shard(path, *found)


def sound(shard: Shard) -> bool:
    """Whether all of a shard is as it was written; reads it."""
    try:
        for block in shard.blocks:
            shard.read_examples(block)
            shard.read_tokens(block)
        return shard.path.stat().length == shard.size
    except (OSError, UserError):
        return False


def write_checked(path: epath.Path, content: dict) -> int:
    """Writes a JSON object with its checksum, which is returned."""
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    storage.write(path, json.dumps({"content": content, "crc32": crc32}).encode())
    return crc32


def read_checked(path: epath.Path) -> tuple[dict, int] | None:
    """(content, checksum) of what `write_checked` wrote; None if there is nothing or it is damaged."""
    try:
        found = json.loads(storage.read(path))
        content, crc32 = found["content"], found["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        return None
    return (content, crc32) if zlib.crc32(json.dumps(content, sort_keys=True).encode()) == crc32 else None


def _shard(path: epath.Path, content: dict, crc32: int) -> Shard:
    blocks, example, token = [], 0, 0
    for examples, tokens, *checksums in content["blocks"]:
        blocks.append(Block(example, token, examples, tokens, *checksums))
        example, token = example + examples, token + tokens
    return Shard(path, content["examples"], content["tokens"], tuple(blocks), crc32)
