"""What is in a store of tokenised examples, all of it."""

import gzip
import json
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard


def sequences(store) -> list[list[int]]:
    """Token ids of every example."""
    found = []
    for block in range(store.num_blocks):
        ends = np.cumsum(store.examples(block)["length"])
        found += [ids.tolist() for ids in np.split(store.tokens(block), ends[:-1])]
    return found


def records(store) -> np.ndarray:
    """The records of all examples."""
    return np.concatenate([store.examples(block) for block in range(store.num_blocks)])


def contents(folder) -> dict[str, bytes]:
    """Every file under a folder, but notes of what was read when."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith(("content-", "checked"))
    }


def write_all_kinds(folder) -> list[tuple[str, str]]:
    """Writes the same examples, which are returned, as files of every kind."""
    records = [{"query": f"q{i}", "response": "x" * (i % 50) + "é"} for i in range(500)]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    compressor = zstandard.ZstdCompressor()
    (folder / "c.jsonl.zst").write_bytes(compressor.compress(lines[:1000]) + compressor.compress(lines[1000:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet", row_group_size=70)
    (folder / "a.txt").write_text("\n\n".join(r["response"] for r in records))
    return [(r["query"], r["response"]) for r in records]


def prepare_slowly(data, out, worker: tuple[int, int], shard_bytes: int) -> None:
    """Prepares a config's data, so slowly that there is time to be killed."""
    from refusion_jax import prepare
    from refusion_jax.data import tokenizers

    encode = tokenizers.ByteTokenizer.encode_batch
    tokenizers.ByteTokenizer.encode_batch = lambda self, texts: time.sleep(0.1) or encode(self, texts)
    prepare.prepare(data, out, worker=worker, shard_bytes=shard_bytes)
