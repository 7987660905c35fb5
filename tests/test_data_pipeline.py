"""Rows by number: independent of processes, resumable anywhere, every example once per epoch."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import threading

import chex
import numpy as np
import pytest
import stores

from refusion_jax.config import SourceConfig
from refusion_jax.data import packing
from refusion_jax.data.pipeline import batches, epoch_batches, load_rows
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def spelling(size=400, **settings):
    return SourceConfig("procedural", "spell_backward", size=size, **settings)


def load(cache_dir, *sources, max_length=256, **settings):
    return load_rows(sources or (spelling(),), TOKENIZER, max_length=max_length, cache_dir=cache_dir, **settings)


def row_examples(row):
    """(tokens, prompt length, id) of each example of a row."""
    ends = np.cumsum(row["lengths"])
    for end, length, prompt_length, number in zip(ends, row["lengths"], row["prompt_lengths"], row["example_ids"]):
        if length:
            yield tuple(row["tokens"][end - length : end].tolist()), int(prompt_length), int(number)


def epoch_examples(rows, epoch):
    numbers = itertools.takewhile(lambda i: rows.locate(i)[0] <= epoch, itertools.count())
    return [e for i in numbers if rows.locate(i)[0] == epoch for e in row_examples(rows[i])]


def test_a_row_is_examples_end_to_end_then_padding(cache_dir):
    rows = load(cache_dir)
    for i in range(10):
        row = rows[i]
        assert [row[name].dtype for name in ("tokens", "lengths", "prompt_lengths")] == [np.int32] * 3 and row[
            "example_ids"
        ].dtype == np.uint32
        assert row["tokens"].shape == (256,) and row["lengths"].shape == (rows.max_examples_per_row,)
        count = int((row["lengths"] > 0).sum())
        assert count > 1 and not row["lengths"][count:].any() and not row["prompt_lengths"][count:].any()
        assert (row["tokens"][row["lengths"].sum() :] == TOKENIZER.pad_id).all()
        for tokens, prompt_length, _ in row_examples(row):
            query, response = TOKENIZER.decode(tokens[:prompt_length]), TOKENIZER.decode(tokens[prompt_length:])
            assert tokens[-1] == TOKENIZER.eos_id and query.endswith(response[::-1])


def test_every_example_once_per_epoch_in_another_order(cache_dir):
    rows = load(cache_dir)
    store = prepared(open_source(spelling()), TOKENIZER, cache_dir)
    expected = sorted(map(tuple, stores.sequences(store)))
    epochs = [epoch_examples(rows, epoch) for epoch in range(3)]
    for epoch, examples in enumerate(epochs):
        assert sorted(tokens for tokens, _, _ in examples) == expected
        assert sorted(number for _, _, number in examples) == list(range(epoch * 400, epoch * 400 + 400))
    order = [[number % 400 for _, _, number in examples] for examples in epochs]
    assert order[0] != order[1] != order[2]
    assert [e for e in epoch_examples(load(cache_dir, seed=1), 0)] != epochs[0]


def test_example_ids_do_not_depend_on_packing(cache_dir):
    packed, unpacked = load(cache_dir), load(cache_dir, max_examples_per_row=1, seed=5)
    assert unpacked.max_examples_per_row == 1 and unpacked.rows_per_epoch == 400
    for epoch in (0, 1):
        assert sorted(epoch_examples(packed, epoch)) == sorted(epoch_examples(unpacked, epoch))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_process_count(processes, cache_dir):
    rows = load(cache_dir)
    whole = batches(rows, batch_size=8, local_rows=range(8), start_row=3)
    shares = [np.arange(8)[p::processes] for p in range(processes)]
    parts = [batches(load(cache_dir), batch_size=8, local_rows=share, start_row=3) for share in shares]
    for n in range(12):  # about two epochs
        expected, pieces = next(whole), [next(part) for part in parts]
        joined = {name: np.empty_like(expected[name]) for name in expected}
        for share, piece in zip(shares, pieces):
            for name in joined:
                joined[name][share] = piece[name]
        chex.assert_trees_all_equal(joined, expected)
        chex.assert_trees_all_equal({name: x[2] for name, x in expected.items()}, rows[3 + n * 8 + 2])


def test_a_process_reads_only_its_rows(cache_dir, monkeypatch):
    rows, asked = load(cache_dir), []
    read = type(rows).__getitem__
    monkeypatch.setattr(type(rows), "__getitem__", lambda self, i: asked.append(i) or read(self, i))
    iterator = batches(rows, batch_size=8, local_rows=[2, 6])
    next(iterator), next(iterator)
    iterator.close()
    assert asked and {i % 8 for i in asked} == {2, 6}


@pytest.mark.parametrize("batch_size, next_batch_size", [(4, 4), (4, 6)])
def test_resume_at_any_row_is_exact(batch_size, next_batch_size, cache_dir):
    rows = load(cache_dir)
    total = 4 * rows.rows_per_epoch
    for start in (4, total // 2 // 4 * 4, total):  # at once, in the middle, in a later epoch
        fresh = batches(load(cache_dir), batch_size=next_batch_size, local_rows=range(next_batch_size), start_row=start)
        resumed = [next(fresh) for _ in range(3)]
        for n, batch in enumerate(resumed):
            for i in range(next_batch_size):
                chex.assert_trees_all_equal(
                    {name: x[i] for name, x in batch.items()}, rows[start + n * next_batch_size + i]
                )


def test_the_next_epoch_is_planned_while_this_one_is_read(cache_dir, monkeypatch):
    """Once half of an epoch is read, the next one is begun; nobody waits for it who does not need it."""
    rows = load(cache_dir)
    rows[0]
    begun, go_on, pack = threading.Event(), threading.Event(), packing.pack

    def slow(*arguments):
        begun.set()
        assert go_on.wait(60)
        return pack(*arguments)

    monkeypatch.setattr(packing, "pack", slow)
    last = rows.rows_per_epoch - 1
    reader = threading.Thread(target=lambda: [rows[i] for i in range(last + 1)], daemon=True)
    try:
        reader.start()
        reader.join(60)
        assert not reader.is_alive() and begun.wait(60)
        waiting = threading.Thread(target=lambda: rows[last + 1], daemon=True)
        waiting.start()  # this one has to wait
        rows[last]
        assert waiting.is_alive()
    finally:
        go_on.set()
    waiting.join(60)
    assert not waiting.is_alive()


def test_rows_do_not_depend_on_who_reads_when(cache_dir):
    rows, number = load(cache_dir), 3 * load(cache_dir).rows_per_epoch
    expected = [rows[i] for i in range(number)]
    shuffled, read = load(cache_dir), {}
    order = np.random.default_rng(0).permutation(number)
    threads = [
        threading.Thread(target=lambda part: read.update({i: shuffled[i] for i in part}), args=(order[n::4],))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chex.assert_trees_all_equal([read[i] for i in range(number)], expected)


def test_evaluation_is_one_fixed_epoch_filled_up_with_empty_rows(cache_dir):
    rows = load(cache_dir, shuffle=False)
    batch_size = next(b for b in range(3, 20) if rows.rows_per_epoch % b)
    seen = list(epoch_batches(rows, batch_size=batch_size, local_rows=range(batch_size)))
    assert len(seen) == -(-rows.rows_per_epoch // batch_size)
    last = seen[-1]["lengths"][rows.rows_per_epoch % batch_size :]
    assert last.size and not last.any()
    examples = [e for b in seen for i in range(batch_size) for e in row_examples({name: x[i] for name, x in b.items()})]
    assert sorted(number for _, _, number in examples) == list(range(400))
    again = epoch_batches(load(cache_dir, shuffle=False, seed=9), batch_size=batch_size, local_rows=range(batch_size))
    for a, b in zip(again, seen, strict=True):
        chex.assert_trees_all_equal(a, b)


def test_mixture_weights_are_passes_per_epoch(cache_dir):
    other = SourceConfig("procedural", "basic_arithmetic", size=100, weight=2.0)
    rows = load(cache_dir, spelling(weight=0.5), other)
    epochs = [[number for _, _, number in epoch_examples(rows, epoch)] for epoch in range(4)]
    for numbers in epochs:
        spelled = [n for n in numbers if n % 500 < 400]
        assert 180 < len(spelled) < 220 and len(set(n % 500 for n in spelled)) == len(spelled)  # half of the rows
        assert np.bincount([n % 500 - 400 for n in numbers if n % 500 >= 400]).tolist() == [2] * 100
    for a, b in (epochs[:2], epochs[2:]):  # two halves make a whole
        assert sorted(n % 500 for n in a + b if n % 500 < 400) == list(range(400))
    assert len(set(sum(epochs, []))) == 4 * 400  # a pass over an example never shares its id
    assert rows.report.examples == 400


def test_report_counts_what_is_there(cache_dir):
    whole = load(cache_dir).report
    lengths = stores.records(prepared(open_source(spelling()), TOKENIZER, cache_dir))["length"].astype(int)
    assert (whole.examples, whole.dropped, whole.tokens) == (400, 0, lengths.sum())
    assert whole.padding_share == pytest.approx(1 - lengths.sum() / (whole.rows * 256))
    limit = int(np.median(lengths))
    cut = load(cache_dir, max_length=limit)
    dropped = int((lengths > limit).sum())
    assert dropped and (cut.report.examples, cut.report.dropped) == (400 - dropped, dropped)
    assert f"{dropped} dropped (longer than {limit})" in str(cut.report) and "% padding" in str(cut.report)
    assert max(len(tokens) for tokens, _, _ in epoch_examples(cut, 0)) <= limit


# --- Long documents.


def documents(folder, *texts):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return SourceConfig("text", str(folder))


def letters(count, seed=0):
    return "".join(np.random.default_rng(seed).choice(list("abcdefgh"), count))


@pytest.mark.parametrize("count", [61, 62, 63, 64, 125, 126, 127, 128, 1000])
def test_a_long_document_is_split_and_nothing_of_it_is_lost(count, cache_dir, tmp_path):
    """Rows of 64 hold 63 characters behind the begin id, or 62 and the end id."""
    text = letters(count)
    rows = load(cache_dir, documents(tmp_path, text), max_length=64, shuffle=False, max_examples_per_row=1)
    pieces = [next(row_examples(rows[i])) for i in range(rows.rows_per_epoch)]
    assert len(pieces) == -(-count // 63) and all(length == 1 for _, length, _ in pieces)
    assert all(tokens[0] == TOKENIZER.begin_id and len(tokens) <= 64 for tokens, _, _ in pieces)
    joined = [t for tokens, _, _ in pieces for t in tokens[1:]]
    assert TOKENIZER.decode(joined) == text
    # Only the end of the document is an end; where it would be a piece of its own, it is left out.
    assert joined.count(TOKENIZER.eos_id) == (count % 63 != 0)
    assert len({number for _, _, number in pieces}) == len(pieces)


def test_where_a_document_is_cut_depends_on_nothing_else(cache_dir, tmp_path):
    texts = [letters(n, n) for n in (300, 20, 64, 150)]
    together = load(cache_dir, documents(tmp_path / "all", *texts), spelling(), max_length=64, seed=3)
    found = sorted(e[0] for e in epoch_examples(together, 0) if e[1] == 1)
    alone = [load(cache_dir, documents(tmp_path / f"{i}", text), max_length=64) for i, text in enumerate(texts)]
    assert found == sorted(e[0] for rows in alone for e in epoch_examples(rows, 0))
    report = together.report
    assert report.sources[0] == (f"text:{tmp_path / 'all'}", 5 + 1 + 2 + 3, 10, 0)
    assert "11 examples, 10 of them pieces of documents longer than 64" in str(report)


def test_responses_are_filled_with_end_ids_and_documents_are_not(cache_dir, tmp_path):
    """To the next multiple, none where it is one already; prompts, ids and what was there before stay."""
    sources = spelling(), documents(tmp_path, letters(20), letters(200))
    plain, filled = (load(cache_dir, *sources, max_length=96, **s) for s in ({}, {"response_multiple": 8}))
    by_number = lambda rows: {number: (tokens, prompt) for tokens, prompt, number in epoch_examples(rows, 0)}
    before, after = by_number(plain), by_number(filled)
    assert before.keys() == after.keys() and len(before) > 400
    added = set()
    for number, (tokens, prompt) in before.items():
        assert after[number][1] == prompt
        more = 0 if prompt == 1 else -(len(tokens) - prompt) % 8
        assert after[number][0] == tokens + (TOKENIZER.eos_id,) * more
        added.add(more)
    assert added == set(range(8))


def test_a_document_is_in_one_part_with_all_its_pieces(cache_dir, tmp_path):
    source = documents(tmp_path, *(letters(200, n) for n in range(20)))
    train, held_out = (
        load(cache_dir, dataclasses.replace(source, start=a, stop=b), max_length=64) for a, b in ((0, 0.6), (0.6, 1))
    )
    numbers = [{number // 4 for _, _, number in epoch_examples(rows, 0)} for rows in (train, held_out)]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]
    assert train.report.examples + held_out.report.examples == 80


# --- What rows are.


def test_the_fingerprint_names_what_the_rows_depend_on(cache_dir, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"query": str(i), "response": "b"} for i in range(50)]))
    source = SourceConfig("json", str(tmp_path / "a.json"))
    settings = dict(max_length=64, max_examples_per_row=4, seed=1)
    before = load(cache_dir, source, **settings).fingerprint
    assert json.loads(json.dumps(before)) == before

    def changed(*sources, **other):
        now = load(cache_dir, *sources, **{**settings, **other}).fingerprint
        return {name for name in before | now if before.get(name) != now.get(name)}

    assert changed(source) == set()
    assert changed(source, seed=2) == {"seed"}
    assert changed(source, max_length=128) == {"data.max_length"}
    assert changed(source, max_examples_per_row=0) == {"data.max_examples_per_row"}
    assert changed(source, response_multiple=8) == {"data.response_multiple"}
    assert changed(dataclasses.replace(source, stop=0.9, weight=2.0)) == {"data.train.0.stop", "data.train.0.weight"}
    more = {f"data.train.1.{name}" for name in ("content", "start", "stop", "weight")}
    assert changed(source, spelling()) == more
    moved = (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert changed(SourceConfig("json", str(moved))) == set()  # the content counts, not where it is
    moved.write_text(moved.read_text().replace('"b"', '"c"'))
    assert changed(SourceConfig("json", str(moved))) == {"data.train.0.content"}


def test_parts_of_a_source_share_no_prompt(cache_dir):
    train, held_out = load(cache_dir, spelling(stop=0.8)), load(cache_dir, spelling(start=0.8))
    prompts = [{tokens[:n] for tokens, n, _ in epoch_examples(rows, 0)} for rows in (train, held_out)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert train.report.examples + held_out.report.examples == 400


def test_sample_file_with_the_real_vocabulary(test_data, cache_dir):
    tokenizer = load_tokenizer(str(test_data / "tokenizers" / "qwen3"))
    path = test_data / "data" / "query_response_100.json"
    rows = load_rows([SourceConfig("json", str(path))], tokenizer, max_length=4096, cache_dir=cache_dir, shuffle=False)
    records = json.loads(path.read_text())
    assert rows.report.examples == 100 and rows.report.dropped == 0
    for tokens, prompt_length, number in epoch_examples(rows, 0):
        assert list(tokens[:prompt_length]) == tokenizer.encode_prompt(records[number]["query"])
        assert tokenizer.decode(tokens[prompt_length:-1]) == records[number]["response"] and tokens[-1] == 151645


@pytest.mark.parametrize("seed, digest", [(0, "ff15c20dd248cc2a"), (1, "a029d0962c221a44")])
def test_rows_of_the_sample_file_stay_what_they_are(seed, digest, test_data, cache_dir):
    """Over four epochs; another digest needs another `packing.FORMAT`."""
    tokenizer = load_tokenizer(str(test_data / "tokenizers" / "qwen3"))
    source = SourceConfig("json", str(test_data / "data" / "query_response_100.json"))
    rows = load_rows([source], tokenizer, max_length=4096, seed=seed, cache_dir=cache_dir)
    assert rows.rows_per_epoch == 12 and rows.report.padding_share < 0.1
    found = hashlib.blake2b(digest_size=8)
    for i in range(4 * 12):
        for _, values in sorted(rows[i].items()):
            found.update(values.tobytes())
    assert found.hexdigest() == digest


def test_bad_settings_are_named(cache_dir, tmp_path):
    with pytest.raises(UserError, match="no data source"):
        load_rows([], TOKENIZER, max_length=64, cache_dir=cache_dir)
    with pytest.raises(UserError, match=r"spell_backward.*max_length is 20, but its shortest example has \d+ tokens"):
        load(cache_dir, max_length=20)
    with pytest.raises(
        UserError, match="none of its 400 examples falls in the part from start = 0.5 to stop = 0.5000001"
    ):
        load(cache_dir, spelling(start=0.5, stop=0.5000001))
    with pytest.raises(UserError, match="weight = 0.001 of 400 examples"):
        load(cache_dir, spelling(weight=0.001))
    (tmp_path / "a.json").write_text('[{"query": "a", "response": "b"}, {"query": "a"}]')
    with pytest.raises(UserError, match=r"a\.json, record 1 .*no field 'response'"):
        load(cache_dir, SourceConfig("json", str(tmp_path / "a.json")))


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_configs_hold_out_their_evaluation_tasks(name, repository):
    """Another seed would not do: reasoning-gym draws example i from seed + i."""
    spec = importlib.util.spec_from_file_location(name, repository / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.get_config().data
    for held_out in data.evaluation:
        for source in data.train:
            same_stream = all(held_out.get(k) == source.get(k) for k in ("kind", "path", "size", "seed", "options"))
            assert same_stream and source["stop"] <= held_out["start"]
