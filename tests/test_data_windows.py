"""Rows of data of many windows keep what rows of few examples have, and looking for one reads little."""

import itertools
import json
import threading

import numpy as np
import pytest
import stores

from refusion_jax.config import SourceConfig
from refusion_jax.data import shards, windows
from refusion_jax.data.pipeline import batches, load_rows
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.store import Store
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")
EXAMPLES = 1200


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks of 20 examples at most, windows of 8 blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_EXAMPLES", 20)
        patch.setattr(shards, "BLOCK_TOKENS", 500)
        patch.setattr(windows, "WINDOW_BLOCKS", 8)
        yield


@pytest.fixture(scope="module")
def data(small_blocks, tmp_path_factory):
    """(sources, cache): examples, and documents that are split."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = [{"query": f"{i}?", "response": "abcdefgh" * int(n)} for i, n in enumerate(rng.integers(1, 8, EXAMPLES))]
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "b.json").write_text(json.dumps([{"response": chr(97 + i) * (40 * i + 9)} for i in range(26)]))
    sources = SourceConfig("json", str(folder / "a.json")), SourceConfig("json", str(folder / "b.json"), query_field="")
    return sources, folder / "cache"


def load(data, sources=None, max_length=256, **settings):
    return load_rows(sources or data[0], TOKENIZER, max_length=max_length, cache_dir=data[1], **settings)


def examples_of(row):
    ends = np.cumsum(row["lengths"])
    for end, length, number in zip(ends, row["lengths"], row["example_ids"]):
        if length:
            yield tuple(row["tokens"][end - length : end].tolist()), int(number)


def epoch(rows, number):
    taken = itertools.takewhile(lambda i: rows.locate(i)[0] <= number, itertools.count())
    return [rows[i] for i in taken if rows.locate(i)[0] == number]


def test_every_example_once_per_epoch_in_another_order(data):
    rows = load(data, data[0][:1])
    store = prepared(open_source(data[0][0]), TOKENIZER, data[1])
    assert store.num_blocks > 3 * windows.WINDOW_BLOCKS
    expected = sorted(map(tuple, stores.sequences(store)))
    orders = []
    for number in range(3):
        found = [example for row in epoch(rows, number) for example in examples_of(row)]
        assert sorted(tokens for tokens, _ in found) == expected
        assert sorted(i for _, i in found) == list(range(number * EXAMPLES, (number + 1) * EXAMPLES))
        orders.append([i % EXAMPLES for _, i in found])
    assert orders[0] != orders[1] != orders[2]
    firsts = {tuple(order[:3]) for order in orders}
    assert len(firsts) == 3  # windows come in another order too


def test_neighbours_in_a_source_are_apart(data):
    """Examples that share a row come from blocks all over the source."""
    rows = load(data, data[0][:1])
    blocks = prepared(open_source(data[0][0]), TOKENIZER, data[1]).num_blocks
    queries = [[int(TOKENIZER.decode(t).split("?")[0]) for t, _ in examples_of(row)] for row in epoch(rows, 0)]
    spread = np.mean([np.std(row) for row in queries if len(row) > 2]) / EXAMPLES
    assert blocks > 60 and spread > 0.2  # 0.29 for a global shuffle


def test_rows_do_not_depend_on_who_reads_when(data):
    rows, number = load(data), 2 * load(data).rows_per_epoch
    expected = [rows[i] for i in range(number)]
    shuffled, read = load(data), {}
    order = np.random.default_rng(0).permutation(number)

    def reader(part):
        read.update({i: shuffled[i] for i in part})

    threads = [threading.Thread(target=reader, args=(order[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(number):
        for name, values in expected[i].items():
            np.testing.assert_array_equal(read[i][name], values)


@pytest.mark.parametrize("processes", [2, 4])
def test_other_process_counts_in_the_middle_of_an_epoch(processes, data):
    """1, then `processes`, then 1 again."""
    whole = batches(load(data), batch_size=8, local_rows=range(8))
    for n, count in enumerate((1, processes, 1)):
        shares = [np.arange(8)[p::count] for p in range(count)]
        parts = [batches(load(data), batch_size=8, local_rows=share, start_row=n * 3 * 8) for share in shares]
        for _ in range(3):
            expected, found = next(whole), [next(part) for part in parts]
            for share, piece in zip(shares, found):
                for name, values in piece.items():
                    np.testing.assert_array_equal(values, expected[name][share])


def test_a_row_is_found_by_reading_its_window_only(data, monkeypatch):
    rows = load(data, data[0][:1])
    store, read = rows._sources[0].store, []
    examples, tokens = store.examples, store.read_tokens
    monkeypatch.setattr(store, "examples", lambda block: read.append(block) or examples(block))
    monkeypatch.setattr(store, "read_tokens", lambda block: read.append(block) or tokens(block))
    rows[rows.rows_per_epoch // 7]
    assert 0 < len(set(read)) <= 2 * windows.WINDOW_BLOCKS  # its own, and perhaps the next one's


def test_other_blocks_are_other_rows_and_said_to_be(data, tmp_path, monkeypatch):
    before = load(data, data[0][:1])
    monkeypatch.setattr(shards, "BLOCK_TOKENS", 400)
    after = load_rows(data[0][:1], TOKENIZER, max_length=256, cache_dir=tmp_path)
    changed = {name for name, value in before.fingerprint.items() if after.fingerprint[name] != value}
    assert changed == {"data.train.0.content"}


def test_a_part_of_few_examples_may_leave_windows_without_any(data):
    source = SourceConfig("json", data[0][0].path, start=0.5, stop=0.51)
    rows = load(data, [source])
    found = [i for row in epoch(rows, 0) for _, i in examples_of(row)]
    assert 0 < len(found) == len(set(found)) == rows.report.examples < 40
    assert (rows._streams[0]._rows == 0).any()


def test_evaluation_is_one_fixed_order(data):
    first, again = load(data, shuffle=False), load(data, shuffle=False, seed=4)
    for i in range(first.rows_per_epoch):
        np.testing.assert_array_equal(first[i]["tokens"], again[i]["tokens"])
    found = [e for row in epoch(first, 0) for e in examples_of(row)]
    assert len(found) == first.report.examples


def test_a_reader_that_fails_says_so_to_who_waits(data, monkeypatch):
    rows = load(data, data[0][:1])

    def broken(*_):
        raise UserError("the disk is gone")

    monkeypatch.setattr(Store, "read_tokens", broken)
    with pytest.raises(UserError, match="the disk is gone"):
        for i in range(rows.rows_per_epoch):
            rows[i]
