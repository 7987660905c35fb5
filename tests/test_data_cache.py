"""A cache is used when sound, rebuilt when stale or damaged, and built once by processes that start together."""

import concurrent.futures
import fcntl
import json
import os
import time

import pytest
import stores
from etils import epath

from refusion_jax.config import SourceConfig
from refusion_jax.data import files, preparation, shards
from refusion_jax.data.preparation import prepared
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
    return prepared(open_source(SourceConfig("json", str(path), **fields)), tokenizer, tmp_path / "cache")


def test_training_sequences(data, tmp_path):
    store = load(data, tmp_path)
    assert len(store) == 50
    found, records = stores.sequences(store), stores.records(store)
    for i in (0, 7, 49):
        expected = [*TOKENIZER.encode_prompt(f"q{i}"), *("é" * (i % 5 + 1)).encode(), TOKENIZER.eos_id]
        assert found[i] == expected
        assert records["length"][i] == len(expected) and records["prompt_length"][i] == len(f"q{i}") + 2
    assert not records["document"].any()
    documents = load(data, tmp_path, query_field="")
    assert stores.sequences(documents)[0] == [TOKENIZER.begin_id, *"é".encode(), TOKENIZER.eos_id]
    assert set(stores.records(documents)["prompt_length"]) == {1} and stores.records(documents)["document"].all()


def test_tokenised_once(data, tmp_path, capfd):
    tokenizer = Counting()
    load(data, tmp_path, tokenizer)
    assert tokenizer.count == 50 and "data.json: 50 examples" in capfd.readouterr().err
    load(data, tmp_path, tokenizer, start=0.5)  # parts share a cache
    assert tokenizer.count == 50 and capfd.readouterr().err == ""


@pytest.fixture
def read(monkeypatch):
    """Counts the bytes of data files that are hashed, and the stores whose checksums are compared."""
    counts = {"raw": 0, "stores": 0}
    hash_of, sound = files.FileSource._hash, shards.sound

    def counted_hash(source):
        counts["raw"] += sum(os.path.getsize(path) for path in source.paths)
        return hash_of(source)

    def counted_sound(shard):
        counts["stores"] += 1
        return sound(shard)

    monkeypatch.setattr(files.FileSource, "_hash", counted_hash)
    monkeypatch.setattr(shards, "sound", counted_sound)
    return counts


def test_a_later_start_reads_and_locks_nothing(data, tmp_path, read, monkeypatch):
    load(data, tmp_path)
    assert read == {"raw": data.stat().st_size, "stores": 1}
    time.sleep(0.02)  # a file as young as the note about it is not trusted
    load(data, tmp_path)
    read.update(raw=0, stores=0)
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("a start that finds everything must not wait"))
    load(data, tmp_path)
    load(data, tmp_path, start=0.5)
    assert read == {"raw": 0, "stores": 0}


def test_what_changed_is_read_again(data, tmp_path, read):
    load(data, tmp_path)
    time.sleep(0.02)
    load(data, tmp_path)
    read.update(raw=0, stores=0)
    os.utime(data)  # touched: the content is hashed once more, and is the same
    tokenizer = Counting()
    load(data, tmp_path, tokenizer)
    assert read == {"raw": data.stat().st_size, "stores": 0} and tokenizer.count == 0
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    os.utime(folder / "shard-00000.bin")
    read.update(raw=0, stores=0)
    time.sleep(0.02)
    load(data, tmp_path, tokenizer)
    assert read["stores"] == 1 and tokenizer.count == 0


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
    assert TOKENIZER.decode(stores.sequences(load(data, tmp_path))[7]).startswith("q8")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "unlink"])
@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00000.json", "index.json"])
def test_damage_is_noticed_and_mended(harm, name, data, tmp_path, capfd):
    before = stores.sequences(load(data, tmp_path))
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    whole = stores.contents(tmp_path / "cache")
    harm(folder / name)
    tokenizer = Counting()
    after = load(data, tmp_path, tokenizer)
    assert tokenizer.count == (50 if "shard" in name else 0)
    if (folder / "index.json").exists() and harm in (flip, truncate):
        assert "damaged" in capfd.readouterr().err
    assert stores.sequences(after) == before and stores.contents(tmp_path / "cache") == whole


def test_every_byte_of_a_shard_has_a_checksum(data, tmp_path):
    load(data, tmp_path)
    (path,) = (tmp_path / "cache").glob("*/shard-00000.bin")
    shard, content = shards.read(epath.Path(path)), path.read_bytes()
    assert shards.sound(shard) and len(content) == shard.size
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert not shards.sound(shard)
    path.write_bytes(content + b"0")
    assert not shards.sound(shard)


def test_a_killed_run_left_shards_that_are_kept_and_parts_that_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 100)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"query": f"q{i}", "response": "é"}) + "\n" for i in range(50)))
    source = open_source(SourceConfig("jsonl", str(path)))
    prepared(source, TOKENIZER, tmp_path / "cache")
    whole = stores.contents(tmp_path / "cache")
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    (folder / "index.json").unlink()
    for number in (3, 5):
        (folder / f"shard-{number:05}.json").unlink()
    (folder / "shard-00005.bin").rename(folder / "shard-00005.bin.0.part")
    tokenizer = Counting()
    prepared(source, tokenizer, tmp_path / "cache")
    assert 0 < tokenizer.count < 15 and stores.contents(tmp_path / "cache") == whole


def test_a_bad_record_leaves_no_store(data, tmp_path):
    data.write_text(json.dumps([{"query": "a", "response": "b"}, {"query": "a", "response": ""}]))
    for _ in range(2):
        with pytest.raises(UserError, match="record 1"):
            load(data, tmp_path)
    assert not list((tmp_path / "cache").glob("*/shard*")) and not list((tmp_path / "cache").glob("*/index.json"))


def test_empty_source_and_unusable_folder(data, tmp_path):
    data.write_text("[]")
    with pytest.raises(UserError, match=r"data\.json' is empty"):
        load(data, tmp_path)
    with pytest.raises(UserError, match="into a local folder only"):
        prepared(open_source(SourceConfig("json", str(data))), TOKENIZER, "gs://bucket/cache")
    with pytest.raises(UserError, match="Set data.cache_dir"):
        prepared(open_source(SourceConfig("json", str(data))), TOKENIZER, data)


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
        found = list(pool.map(lambda tokenizer: load(data, tmp_path, tokenizer), tokenizers))
    for store in found[1:]:
        assert stores.sequences(store) == stores.sequences(found[0])
    assert sum(t.count for t in tokenizers) == (50 if locks else 200)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
