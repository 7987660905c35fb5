"""A cache is used when sound, rebuilt when stale or damaged, and built once by processes that start together."""

import concurrent.futures
import fcntl
import json
import os
import time

import numpy as np
import pytest

from refusion_jax.config import SourceConfig
from refusion_jax.data import cache as cache_lib
from refusion_jax.data import files
from refusion_jax.data.cache import cached_tokens
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")


class Counting(ByteTokenizer):
    """Counts the texts it is given."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def encode_batch(self, texts):
        self.count += len(texts)
        return super().encode_batch(texts)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"query": f"q{i}", "response": "é" * (i % 5 + 1)} for i in range(50)]))
    return path


def load(path, tmp_path, tokenizer=TOKENIZER, **fields):
    return cached_tokens(open_source(SourceConfig("json", str(path), **fields)), tokenizer, tmp_path / "cache")


def test_training_sequences(data, tmp_path):
    cache = load(data, tmp_path)
    assert len(cache) == 50
    for i in (0, 7, 49):
        expected = [*TOKENIZER.encode_prompt(f"q{i}"), *("é" * (i % 5 + 1)).encode(), TOKENIZER.eos_id]
        assert cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist() == expected
        assert cache.lengths[i] == len(expected) and cache.prompt_lengths[i] == len(f"q{i}") + 2
    documents = load(data, tmp_path, query_field="")
    assert documents.tokens[: documents.offsets[1]].tolist() == [TOKENIZER.begin_id, *"é".encode(), TOKENIZER.eos_id]
    assert set(documents.prompt_lengths) == {1}


def test_tokenised_once(data, tmp_path, capfd):
    tokenizer = Counting()
    load(data, tmp_path, tokenizer)
    assert tokenizer.count == 50 and "data.json: 50 examples" in capfd.readouterr().err
    load(data, tmp_path, tokenizer, start=0.5)  # parts share a cache
    assert tokenizer.count == 50 and capfd.readouterr().err == ""


@pytest.fixture
def read(monkeypatch):
    """Counts the bytes of data files that are hashed and of caches whose checksums are compared."""
    counts = {"raw": 0, "cache": 0}
    hash_of, checksum_of = files.FileSource._hash, cache_lib._checksum

    def counted_hash(source):
        counts["raw"] += sum(os.path.getsize(path) for path in source.paths)
        return hash_of(source)

    def counted_checksum(path):
        counts["cache"] += path.stat().st_size
        return checksum_of(path)

    monkeypatch.setattr(files.FileSource, "_hash", counted_hash)
    monkeypatch.setattr(cache_lib, "_checksum", counted_checksum)
    return counts


def size_of(cache):
    return sum(getattr(cache, name).nbytes for name in ("tokens", "offsets", "prompt_lengths", "hashes"))


def test_a_later_start_reads_and_locks_nothing(data, tmp_path, read, monkeypatch):
    cache = load(data, tmp_path)
    assert read == {"raw": data.stat().st_size, "cache": size_of(cache)}
    time.sleep(0.02)  # a file as young as the note about it is not trusted
    load(data, tmp_path)
    read.update(raw=0, cache=0)
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("a start that finds everything must not wait"))
    load(data, tmp_path)
    load(data, tmp_path, start=0.5)
    assert read == {"raw": 0, "cache": 0}


def test_what_changed_is_read_again(data, tmp_path, read):
    cache = load(data, tmp_path)
    time.sleep(0.02)
    load(data, tmp_path)
    read.update(raw=0, cache=0)
    os.utime(data)  # touched: the content is hashed once more, and is the same
    tokenizer = Counting()
    load(data, tmp_path, tokenizer)
    assert read == {"raw": data.stat().st_size, "cache": 0} and tokenizer.count == 0
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    os.utime(folder / "tokens.bin")
    read.update(raw=0, cache=0)
    time.sleep(0.02)
    load(data, tmp_path, tokenizer)
    assert read["cache"] == size_of(cache) and tokenizer.count == 0


def test_a_cache_that_cannot_be_written_is_read(data, tmp_path, monkeypatch):
    """One that was filled by somebody else, say: nothing needs to be locked or written."""
    load(data, tmp_path)
    time.sleep(0.02)
    load(data, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    load(data, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == written


def test_stale_caches_are_not_used(data, tmp_path):
    load(data, tmp_path)
    tokenizer = Counting()
    tokenizer.fingerprint = "another"
    load(data, tmp_path, tokenizer)
    assert tokenizer.count == 50
    data.write_text(data.read_text().replace("q7", "q8"))  # same size, another content
    cache = load(data, tmp_path)
    assert TOKENIZER.decode(cache.tokens[cache.offsets[7] : cache.offsets[8]]).startswith("q8")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


ARRAYS = ("tokens.bin", "offsets.bin", "prompt_lengths.bin", "hashes.bin")


@pytest.mark.parametrize(
    "harm, name",
    [(flip, name) for name in ARRAYS]  # a flip in meta.json may hit a name, which does no harm
    + [(harm, name) for harm in (truncate, lambda path: path.unlink()) for name in (*ARRAYS, "meta.json")],
)
def test_damage_is_noticed_and_mended(harm, name, data, tmp_path, capfd):
    before = load(data, tmp_path)
    tokens, offsets = np.array(before.tokens), np.array(before.offsets)
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    harm(folder / name)
    tokenizer = Counting()
    after = load(data, tmp_path, tokenizer)
    assert tokenizer.count == 50 and "damaged" in capfd.readouterr().err
    np.testing.assert_array_equal(after.tokens, tokens)
    np.testing.assert_array_equal(after.offsets, offsets)


def test_left_overs_of_a_killed_build_are_no_cache(data, tmp_path):
    load(data, tmp_path)
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    left_over = folder.rename(folder.with_name(folder.name + ".unfinished-0"))
    tokenizer = Counting()
    load(data, tmp_path, tokenizer)
    assert tokenizer.count == 50 and folder.exists() and not left_over.exists()


def test_a_bad_record_leaves_no_cache(data, tmp_path):
    data.write_text(json.dumps([{"query": "a", "response": "b"}, {"query": "a", "response": ""}]))
    for _ in range(2):
        with pytest.raises(UserError, match="record 1"):
            load(data, tmp_path)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_empty_source_and_unusable_folder(data, tmp_path):
    data.write_text("[]")
    with pytest.raises(UserError, match=r"data\.json' is empty"):
        load(data, tmp_path)
    with pytest.raises(UserError, match="must be in a local folder"):
        cached_tokens(open_source(SourceConfig("json", str(data))), TOKENIZER, "gs://bucket/cache")
    with pytest.raises(UserError, match="Set data.cache_dir"):
        cached_tokens(open_source(SourceConfig("json", str(data))), TOKENIZER, data)


@pytest.mark.parametrize("locks", [True, False])
def test_builders_that_start_together(locks, data, tmp_path, monkeypatch):
    """With file locks (of open files: threads stand for processes) one builds; without, the first to finish wins."""

    class Slow(Counting):
        def encode_batch(self, texts):
            time.sleep(0.2)
            return super().encode_batch(texts)

    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    tokenizers = [Slow() for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        caches = list(pool.map(lambda tokenizer: load(data, tmp_path, tokenizer), tokenizers))
    for cache in caches[1:]:
        np.testing.assert_array_equal(cache.tokens, caches[0].tokens)
    assert sum(t.count for t in tokenizers) == (50 if locks else 200)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
