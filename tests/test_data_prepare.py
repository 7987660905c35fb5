"""Stores made by many processes: the same byte for byte however they were made, and what is wrong is named."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import resource
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import stores
import zstandard

from refusion_jax import prepare as prepare_lib
from refusion_jax import storage
from refusion_jax.config import DataConfig, SourceConfig, load_config
from refusion_jax.data import preparation, shards
from refusion_jax.data.pipeline import load_rows
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")
SHARD = 2000  # bytes of text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A config with two sources, several files each, of many shards."""
    folder = tmp_path_factory.mktemp("data")
    for n in range(3):
        records = [{"query": f"question {n} {i}", "response": "é" * (i % 40 + 1)} for i in range(100)]
        (folder / f"{n}.jsonl").write_text("\n".join(map(json.dumps, records)))
    for n in range(10):
        (folder / f"{n}.txt").write_text(f"document {n} " * 100)
    sources = SourceConfig("jsonl", str(folder)), SourceConfig("text", str(folder))
    return DataConfig(train=sources, evaluation=(dataclasses.replace(sources[0], start=0.9),), max_length=256)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    assert prepare_lib.prepare(data, folder, shard_bytes=SHARD)
    return stores.contents(folder)


def test_there_are_many_shards_and_no_left_overs(whole):
    assert sum(name.endswith(".bin") for name in whole) > 20
    assert {pathlib.Path(name).suffix for name in whole} == {".bin", ".json", ".npy"}


@pytest.mark.parametrize("workers, processes", [(1, 2), (3, 1)])
def test_the_store_does_not_depend_on_who_makes_it(workers, processes, data, whole, tmp_path):
    done = [
        prepare_lib.prepare(data, tmp_path, processes=processes, worker=(n, workers), shard_bytes=SHARD)
        for n in reversed(range(workers))
    ]
    assert done == [False] * (workers - 1) + [True]
    assert stores.contents(tmp_path) == whole


def test_workers_that_are_last_of_different_sources_finish_the_store(data, whole, tmp_path, monkeypatch):
    """The first one ends the first source before the second has begun it, and the second source after it."""
    fill, begun, done = prepare_lib.fill, [], []

    def filled(config, *rest):
        if config.kind == "text" and not begun:
            begun.append(config)
            done.append(prepare_lib.prepare(data, tmp_path, worker=(1, 2), shard_bytes=SHARD))
        fill(config, *rest)

    monkeypatch.setattr(prepare_lib, "fill", filled)
    assert prepare_lib.prepare(data, tmp_path, worker=(0, 2), shard_bytes=SHARD) and done == [False]
    assert stores.contents(tmp_path) == whole


def test_again_nothing_is_made_and_damage_is_mended(data, whole, tmp_path, monkeypatch):
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    made = []
    make_shard = preparation.make_shard
    monkeypatch.setattr(preparation, "make_shard", lambda *a: made.append(a[-1].name) or make_shard(*a))
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    assert made == []
    first, second = sorted(tmp_path.glob("*/shard-00002.bin"))
    first.write_bytes(first.read_bytes()[:-1])
    second.with_suffix(".json").write_text("{}")
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    assert made == ["shard-00002.bin"] * 2 and stores.contents(tmp_path) == whole


def test_killed_at_any_time_it_ends_in_the_same_store(data, whole, tmp_path):
    """Four workers, killed 20 times between them."""
    chance, kills = random.Random(0), 0
    forks = multiprocessing.get_context("forkserver")  # no worker has to import anything
    forks.set_forkserver_preload(["pytest", "stores", "refusion_jax.prepare"])

    def start(worker):
        process = forks.Process(target=stores.prepare_slowly, args=(data, tmp_path, (worker, 4), SHARD))
        process.start()
        return process

    running = {n: start(n) for n in range(4)}
    end = time.monotonic() + 300
    while running:
        assert time.monotonic() < end
        time.sleep(0.05)
        for n, process in list(running.items()):
            begun = any(tmp_path.glob("*/plan.json"))  # not only while a worker starts
            if kills < 20 and begun and chance.random() < 0.5:
                process.kill()
                process.join()
                kills += 1
                running[n] = start(n)
            elif not process.is_alive():
                assert process.exitcode == 0
                if kills < 20:  # on a busy machine; it looks at what is there, and can be killed at that
                    running[n] = start(n)
                else:
                    del running[n]
    made = {name: content for name, content in stores.contents(tmp_path).items() if not name.endswith(".part")}
    assert made == whole


def test_the_processes_of_a_killed_job_end_with_it(data, tmp_path):
    words = "from refusion_jax import prepare; import time, os, sys\n"
    words += "if __name__ == '__main__':\n with prepare.several(2) as mapped:\n"
    words += "  print(list(mapped(os.getppid, ())), [p.pid for p in __import__('multiprocessing').active_children()])\n"
    words += "  mapped(time.sleep, [600, 600]); time.sleep(1)\n"
    words += "  print(*[p.pid for p in __import__('multiprocessing').active_children()], flush=True); time.sleep(600)\n"
    script = tmp_path / "job.py"
    script.write_text(words)
    job = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    job.stdout.readline()
    children = list(map(int, job.stdout.readline().split()))
    assert len(children) == 2
    job.kill()
    job.wait()
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_impossible_sizes_of_shards_are_named(size, repository, tmp_path, monkeypatch):
    config = str(repository / "configs" / "tiny.py")
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", config, "--out", str(tmp_path), "--shard-mib", size])
    with pytest.raises(UserError, match=rf"--shard-mib {float(size)}; both must be greater than 0, and finite"):
        prepare_lib.main()


def test_an_option_may_be_a_list(repository, tmp_path):
    settings = {"path": "basic_arithmetic", "size": "50", "options": "[['operators', ['+', '-']]]"}
    overrides = {f"data.train.0.{name}": value for name, value in settings.items()} | {"data.evaluation": "[]"}
    data = load_config(str(repository / "configs" / "tiny.py"), overrides).data
    assert prepare_lib.prepare(data, tmp_path)
    assert len(load_rows(data.train, TOKENIZER, max_length=data.max_length, cache_dir="/nowhere", store=tmp_path)[0])


# --- Runs find what was prepared.


def settings(data, **changes):
    return dict(max_length=data.max_length, cache_dir="/nowhere", **changes)


def equal(rows, others, count):
    for i in range(count):
        for name, values in rows[i].items():
            np.testing.assert_array_equal(values, others[i][name])


def test_a_run_has_the_same_rows_from_the_store_as_from_the_data(data, tmp_path, monkeypatch):
    prepare_lib.prepare(data, tmp_path / "store", shard_bytes=SHARD)
    direct = load_rows(data.train, TOKENIZER, max_length=256, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(prepare_lib, "open_source", None)
    found = load_rows(data.train, TOKENIZER, **settings(data, store=tmp_path / "store"))
    assert found.fingerprint == direct.fingerprint
    equal(found, direct, 2 * direct.rows_per_epoch)


def test_the_rows_table_is_there_already(data, tmp_path, monkeypatch):
    from refusion_jax.data.windows import Windows

    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    monkeypatch.setattr(Windows, "read", lambda *_: pytest.fail("what prepare has found need not be found again"))
    load_rows(data.train, TOKENIZER, **settings(data, store=tmp_path))
    load_rows(data.evaluation, TOKENIZER, shuffle=False, **settings(data, store=tmp_path))


def test_what_is_wrong_with_a_store_is_named(data, tmp_path):
    load = lambda **changes: load_rows(
        data.train, **{"tokenizer": TOKENIZER, **settings(data, store=tmp_path)} | changes
    )
    with pytest.raises(UserError, match="no such folder. Run python -m refusion_jax.prepare .*--out"):
        load(store=tmp_path / "none")
    with pytest.raises(UserError, match="there is no store of 'jsonl:.*' with these settings"):
        load()
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD, worker=(0, 4))
    with pytest.raises(UserError, match=r"is unfinished: \d+ of its \d+ shards are missing"):
        load()
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    other = ByteTokenizer()
    other.fingerprint = "other"
    with pytest.raises(UserError, match="was made by another tokenizer"):
        load(tokenizer=other)
    rows = load()
    for path in tmp_path.glob("*/shard-*.bin"):
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged, or was changed after its index was written"):
        rows[0]
    for path in tmp_path.glob("*/shard-*.json"):  # a sound shard, but another one
        shards.write_checked(storage.as_path(path), shards.read_checked(storage.as_path(path))[0] | {"by": "others"})
    with pytest.raises(UserError, match="is missing, damaged, or was changed after its index was written"):
        load()[0]


def test_a_store_begun_with_other_shards_is_left_alone(data, tmp_path):
    prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD, worker=(0, 4))
    before = stores.contents(tmp_path)
    with pytest.raises(UserError, match="was begun with shards cut elsewhere .*--shard-mib as then"):
        prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD // 2)
    assert stores.contents(tmp_path) == before


def test_changed_data_are_another_store(data, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a", "response": "b"}\n')
    config = dataclasses.replace(data, train=(SourceConfig("jsonl", str(path)),), evaluation=())
    prepare_lib.prepare(config, tmp_path / "store")
    path.write_text('{"query": "a", "response": "c"}\n')
    for use in (
        lambda: prepare_lib.prepare(config, tmp_path / "store"),
        lambda: load_rows(config.train, TOKENIZER, **settings(config, store=tmp_path / "store")),
    ):
        with pytest.raises(UserError, match="several stores of .* whose content has changed: jsonl-.*, jsonl-"):
            use()


def test_unwritable(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write to .*file/store.* Choose a --out"):
        prepare_lib.prepare(data, tmp_path / "file" / "store")


def test_a_full_disk_is_named_and_what_was_finished_is_kept(data, whole, tmp_path):
    """A limit on the size of files makes the kernel refuse a write, as a full disk does."""
    sizes = sorted(len(content) for name, content in whole.items() if name.endswith(".bin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, hard))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large. What is finished is kept: make room"):
            prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = stores.contents(tmp_path)
    assert any(name.endswith(".bin") for name in kept) and all(whole[name] == kept[name] for name in kept)
    assert prepare_lib.prepare(data, tmp_path, shard_bytes=SHARD) and stores.contents(tmp_path) == whole


@pytest.mark.parametrize(
    "environ, given, expected",
    [
        ({}, "", (0, 1)),
        ({}, "2/5", (2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, "", (2, 4)),
        ({"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"}, "", (3, 8)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "", (1, 2)),
        (
            {
                "TPU_WORKER_ID": "1",
                "TPU_WORKER_HOSTNAMES": "a,b",
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
            },
            "",
            (5, 6),
        ),
    ],
)
def test_which_worker_this_is(environ, given, expected):
    assert prepare_lib.which_worker(environ, given) == expected


@pytest.mark.parametrize("given", ["4/4", "-1/4", "0/0"])
def test_a_worker_out_of_range_is_named(given):
    with pytest.raises(UserError, match="is out of range: of N workers the indices are 0 to N - 1"):
        prepare_lib.which_worker({}, given)
    with pytest.raises(UserError, match="give I/N"):
        prepare_lib.which_worker({}, "first")


# --- Sources are cut into units that together are the source.


@pytest.mark.parametrize("size", [7, 100, 4096, 10**9])
@pytest.mark.parametrize(
    "kind, name, options",
    [
        ("json", "a.json", ()),
        ("jsonl", "a.jsonl", ()),
        ("jsonl", "b.jsonl.gz", ()),
        ("jsonl", "c.jsonl.zst", ()),
        ("parquet", "a.parquet", ()),
        ("text", "a.txt", (("separator", "\n\n"),)),
    ],
)
def test_units_are_the_whole_source_once(kind, name, options, size, tmp_path):
    expected = stores.write_all_kinds(tmp_path)
    if kind == "text":
        expected = [(None, response) for _, response in expected]
    source = open_source(SourceConfig(kind, str(tmp_path / name), options=options))
    units = source.units(size)
    assert [example for unit in units for example in source.read(unit)] == expected
    assert [source[i] for i in range(len(source))] == expected
    if name == "a.jsonl":
        assert max(unit.stop - unit.start for unit in units) <= size


def test_a_bad_line_is_named_wherever_its_unit_begins(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"query": "a", "response": "b"}'] * 50
    lines[40] = '{"query": "a"}'
    path.write_text("\n".join(lines))
    source = open_source(SourceConfig("jsonl", str(path)))
    for size in (50, 333, 10**6):
        with pytest.raises(UserError, match=r"a\.jsonl, line 41 has no field 'response'"):
            [example for unit in source.units(size) for example in source.read(unit)]


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-20],
        lambda content: content[:-1],
        lambda content: content[:50],
        lambda content: content[:3],
        lambda content: content + b"more",
        lambda content: b"no archive" + content,
        lambda content: content[:300] + bytes(100) + content[400:],
    ],
    ids=["end", "last byte", "most", "but its first bytes", "more behind it", "something else", "a hole"],
)
def test_a_damaged_archive_is_named(name, damaged, tmp_path):
    """Whether its records are counted or made into a store; none of them is lost in silence."""
    stores.write_all_kinds(tmp_path)
    path = tmp_path / name
    path.write_bytes(damaged(path.read_bytes()))
    source = open_source(SourceConfig("jsonl", str(path)))
    for use in (lambda: len(source), lambda: prepared(source, TOKENIZER, tmp_path / "cache")):
        with pytest.raises(UserError, match=rf"{name} is damaged: .*Fetch or write it again"):
            use()
    assert not list(tmp_path.glob("cache/*/index.json"))


def test_an_archive_is_read_a_little_at_a_time(tmp_path):
    line = json.dumps({"query": "a", "response": "b" * 100_000}).encode() + b"\n"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(line * 2000))
    source = open_source(SourceConfig("jsonl", str(path)))
    tracemalloc.start()
    try:
        assert sum(1 for unit in source.units(10**9) for _ in source.read(unit)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6 < 2000 * len(line)
