"""Data in object storage: the same store, read in ranges and again where a read fails, and what is wrong is named."""

import errno
import json

import numpy as np
import pytest
import stores

from refusion_jax import prepare as prepare_lib
from refusion_jax import storage
from refusion_jax.checkpoint import load as load_lib
from refusion_jax.checkpoint.orbax import Checkpoints
from refusion_jax.config import DataConfig, SourceConfig
from refusion_jax.data import store as store_lib
from refusion_jax.data.pipeline import load_rows
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    records = [{"query": f"q{i}", "response": "x" * (i % 50 + 1)} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, records)))
    return DataConfig(train=(SourceConfig("jsonl", str(path)),), max_length=128)


@pytest.fixture(scope="module")
def address(bucket, data):
    """Of a store in the bucket."""
    assert prepare_lib.prepare(data, f"{bucket}/store", shard_bytes=3000)
    return f"{bucket}/store"


def load(data, **settings):
    return load_rows(data.train, TOKENIZER, max_length=128, **{"cache_dir": "", **settings})


def contents(folder):
    return {p.name: storage.read(p) for f in storage.as_path(folder).iterdir() for p in f.iterdir()}


def test_a_store_in_a_bucket_is_the_same_as_on_a_disk(data, address, tmp_path):
    prepare_lib.prepare(data, tmp_path / "store", shard_bytes=3000)
    assert contents(address) == contents(tmp_path / "store")
    far, near = load(data, store=address), load(data, store=tmp_path / "store")
    assert far.fingerprint == near.fingerprint
    for i in range(2 * near.rows_per_epoch):
        for name, values in near[i].items():
            np.testing.assert_array_equal(values, far[i][name])


def test_several_workers_fill_a_bucket_together(data, address, bucket):
    done = [prepare_lib.prepare(data, f"{bucket}/other", worker=(n, 3), shard_bytes=3000) for n in (2, 0, 1)]
    assert done == [False, False, True] and contents(f"{bucket}/other") == contents(address)


@pytest.fixture
def failing(monkeypatch):
    """Lets so many of the next reads fail; gives the pauses made."""
    system = storage._file_system
    state, pauses = {"left": 0}, []

    def unreliable(path):
        real, name = system(path)

        class Unreliable:
            def cat_file(self, name, **limits):
                if state["left"]:
                    state["left"] -= 1
                    raise OSError(errno.ECONNRESET, "Connection reset by peer")
                return real.cat_file(name, **limits)

        return Unreliable(), name

    monkeypatch.setattr(storage, "_file_system", unreliable)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    return state, pauses


def test_a_read_that_fails_is_tried_again_with_growing_pauses(data, address, failing):
    state, pauses = failing
    expected = load(data, store=address)[0]
    store_lib._BLOCKS._held.clear()
    state["left"] = 4
    found = load(data, store=address)[0]
    for name, values in expected.items():
        np.testing.assert_array_equal(values, found[name])
    assert len(pauses) == 4 and all(0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(pauses))


def test_a_read_that_goes_on_failing_stops_the_run_with_a_paragraph(data, address, failing):
    state, _ = failing
    rows = load(data, store=address)
    store_lib._BLOCKS._held.clear()
    state["left"] = 10**9
    with pytest.raises(UserError, match=r"Cannot read gs://.*Connection reset.*\(6 attempts\). Check that the bucket"):
        rows[0]
    state["left"] = 0
    rows[0]  # nothing of the failure stays


def test_what_is_not_allowed_is_not_tried_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def forbidden():
        raise PermissionError("403")

    with pytest.raises(UserError, match="PermissionError: 403 .1 attempts"):
        storage.patiently(forbidden, "Cannot read x")
    assert not pauses


def test_a_bucket_that_is_not_there_is_named_before_anything_is_computed(data, bucket, monkeypatch):
    monkeypatch.setattr(prepare_lib, "begin", None)
    with pytest.raises(UserError, match="Cannot write to gs://nobody/store: .* Choose a --out that is there"):
        prepare_lib.prepare(data, "gs://nobody/store")
    with pytest.raises(UserError, match="data.store is 'gs://nobody/store', and there is no such folder"):
        load(data, store="gs://nobody/store")


def test_an_address_of_no_known_kind_is_named():
    with pytest.raises(UserError, match="cannot be used: Protocol not known: xyz"):
        storage.read("xyz://bucket/a")


def test_blocks_in_memory_are_bounded(data, address, monkeypatch):
    monkeypatch.setattr(store_lib, "CACHED_BYTES", 15000)
    store_lib._BLOCKS._held.clear()
    rows = load(data, store=address)
    for i in range(rows.rows_per_epoch):
        rows[i]
    held = [future.result().nbytes for future in store_lib._BLOCKS._held.values()]
    assert len(held) > 1 and sum(held) <= 15000 + max(held)


# --- Raw data.


@pytest.fixture(scope="module")
def raw(bucket, tmp_path_factory):
    """(folder, the same in the bucket)."""
    folder = tmp_path_factory.mktemp("raw")
    stores.write_all_kinds(folder)
    storage.copy_folder(folder, storage.as_path(f"{bucket}/raw"))
    return folder, f"{bucket}/raw"


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "a.parquet", "a.txt", "*.jsonl*", ""]
)
def test_sources_in_buckets_are_those_on_a_disk(name, raw):
    kind = {"json": "json", "parquet": "parquet", "txt": "text"}.get(name.rpartition(".")[2], "jsonl")
    near, far = (open_source(SourceConfig(kind, f"{place}/{name}".rstrip("/"))) for place in raw)
    assert far.key() == near.key() and len(far.paths) == len(near.paths)
    units = near.units(1000)
    assert far.units(1000) == units and len(far) == len(near)
    for unit in units:
        assert list(far.read(unit)) == list(near.read(unit))
    assert [far[i] for i in (0, len(far) - 1)] == [near[i] for i in (0, len(near) - 1)]


def test_a_large_source_in_a_bucket_is_known_by_samples(raw, monkeypatch):
    monkeypatch.setattr("refusion_jax.data.files.HASHED_WHOLE", 1000)
    near, far = (open_source(SourceConfig("jsonl", str(place))) for place in raw)
    assert far.key() == near.key()


def test_a_source_in_a_bucket_is_tokenised_once(raw, tmp_path, monkeypatch):
    (source,) = [SourceConfig("jsonl", f"{raw[1]}/a.jsonl")]
    store = prepared(open_source(source), TOKENIZER, tmp_path)
    monkeypatch.setattr(storage, "open_binary", None)  # neither hashed nor read again
    assert prepared(open_source(source), TOKENIZER, tmp_path).folder == store.folder


def test_what_is_wrong_with_a_source_in_a_bucket_is_named(raw, bucket):
    for path in (f"{bucket}/raw/d.jsonl", f"{bucket}/*.jsonl", "gs://nobody/raw"):
        with pytest.raises(UserError, match=r"data source 'jsonl:gs://.*' is missing: there is nothing of that kind"):
            open_source(SourceConfig("jsonl", path)).paths
    storage.write(storage.as_path(f"{bucket}/bad/a.jsonl"), b'{"query": "a", "response": "b"}\n' * 99 + b"{")
    source = open_source(SourceConfig("jsonl", f"{bucket}/bad"))
    with pytest.raises(UserError, match=r"gs://bucket/bad/a.jsonl, line 100, column 2: malformed JSON"):
        [example for unit in source.units(1000) for example in source.read(unit)]
    storage.write(storage.as_path(f"{bucket}/records/a.array_record"), b"")
    with pytest.raises(UserError, match="ArrayRecord files are read from folders only"):
        open_source(SourceConfig("array_record", f"{bucket}/records")).units(1000)


# --- s3://


def test_the_same_code_takes_raw_data_stores_and_weights_in_s3(s3_bucket, data, raw, address, reference):
    for folder, name in ((raw[0], "raw"), (reference / "qwen3_tied" / "model", "model")):
        storage.copy_folder(folder, storage.as_path(f"{s3_bucket}/{name}"))
    for kind in ("jsonl", "parquet"):
        near, far = (open_source(SourceConfig(kind, f"{place}")) for place in (raw[0], f"{s3_bucket}/raw"))
        assert far.key() == near.key()
        assert [e for u in far.units(1000) for e in far.read(u)] == [e for u in near.units(1000) for e in near.read(u)]
    assert prepare_lib.prepare(data, f"{s3_bucket}/store", shard_bytes=3000)
    assert contents(f"{s3_bucket}/store") == contents(address)
    far, near = load(data, store=f"{s3_bucket}/store"), load(data, store=address)
    np.testing.assert_array_equal(near[0]["tokens"], far[0]["tokens"])
    found = load_lib.fingerprint(f"{s3_bucket}/model")
    assert found == load_lib.fingerprint(reference / "qwen3_tied" / "model")
    with pytest.raises(UserError, match="Cannot write to s3://nobody/store"):
        prepare_lib.prepare(data, "s3://nobody/store")


def test_runs_in_s3_are_refused():
    with pytest.raises(UserError, match=r"s3://bucket/run cannot hold checkpoints: .*Use a gs:// bucket or a file"):
        Checkpoints("s3://bucket/run")
