"""Whose turn a row is: exact shares, evenly spread, found without counting; and what that makes of runs."""

import dataclasses
import itertools
import json

import micro
import numpy as np
import pytest

from refusion_jax.config import MixtureConfig, SourceConfig, from_config_dict
from refusion_jax.data.mixture import Epochs, Pattern, Schedule, floor_sum
from refusion_jax.data.pipeline import load_rows
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")


def counted(turns, sources, rows):
    """Follows the turns one by one, and compares what is found without counting."""
    given, order = [0] * sources, []
    for row in range(rows):
        assert turns.before(row) == tuple(given)
        source, nth = turns.turn(row)
        assert nth == given[source]
        given[source] += 1
        order.append(source)
    return order


def test_sums_of_floors():
    for n, m, a, b in itertools.product((0, 1, 7), (1, 3, 10), (0, 2, 13), (0, 5, 40)):
        assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize("counts", [(5,), (3, 5), (0, 7, 2), (100, 1, 50, 3)])
def test_a_pattern_gives_each_source_its_rows_evenly(counts):
    pattern, total = Pattern(counts), sum(counts)
    sources = [pattern.source(row) for row in range(2 * total)]
    given = np.cumsum([[s == source for s in range(len(counts))] for source in sources], axis=0)
    assert [pattern.before(row + 1) for row in range(2 * total)] == [tuple(row) for row in given.tolist()]
    assert pattern.before(total) == counts
    due = np.outer(np.arange(1, 2 * total + 1), counts) / total
    assert np.abs(given - due).max() < 3


def test_weights_are_passes_per_epoch():
    turns = Epochs([7, 3], [0.5, 2.0])
    order = counted(turns, 2, 100)
    epochs = [[s for row, s in enumerate(order) if turns.locate(row)[0] == epoch] for epoch in range(6)]
    assert all(epoch.count(1) == 6 for epoch in epochs)
    assert [epoch.count(0) for epoch in epochs] == [4, 3] * 3
    assert [turns.locate(row)[1] for row in range(turns.start(1), turns.start(2))] == list(range(9))


def test_far_rows_are_found_at_once():
    turns = Epochs([10**9 + 7, 10**8], [1.0, 0.3])
    row = 10**13
    before, (source, nth) = turns.before(row), turns.turn(row)
    assert sum(before) == row and before[source] == nth
    epoch, at = turns.locate(row)
    assert turns.start(epoch) + at == row and at < turns.start(epoch + 1) - turns.start(epoch)


def test_shares_that_change_at_given_rows():
    turns = Schedule([(0, (0.25, 0.75)), (400, (1.0, 0.0)), (450, (1, 1))])
    order = counted(turns, 2, 1000)
    assert abs(order[:400].count(1) - 300) <= 2 and order[400:450].count(1) == 0
    assert abs(order[450:].count(1) - 275) <= 2


# --- In runs.


def numbers(count, name, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps([{"query": f"{name}{i}", "response": str(i)} for i in range(count)]))
    return SourceConfig("json", str(path))


def names_of(row):
    first = row["tokens"][1 : row["lengths"].sum() : 1]
    return TOKENIZER.decode(first[:1])


def test_a_run_with_a_mixture(tmp_path):
    sources = [numbers(200, "a", tmp_path), numbers(50, "b", tmp_path)]
    mixture = ((0, (0.9, 0.1)), (100, (0.5, 0.5)))
    rows = load_rows(sources, TOKENIZER, max_length=64, cache_dir=tmp_path / "cache", mixture=mixture)
    order = [names_of(rows[i]) for i in range(200)]
    assert abs(order[:100].count("b") - 10) <= 2 and abs(order[100:].count("b") - 50) <= 2
    again = load_rows(sources, TOKENIZER, max_length=64, cache_dir=tmp_path / "cache", mixture=mixture)
    for i in (150, 3, 199):
        for name, values in rows[i].items():
            np.testing.assert_array_equal(values, again[i][name])
    other = load_rows(sources, TOKENIZER, max_length=64, cache_dir=tmp_path / "cache")
    changed = {n for n, v in rows.fingerprint.items() if other.fingerprint.get(n) != v}
    assert changed == {"data.mixture"}
    with pytest.raises(UserError, match="mixture knows no epochs. Set config.steps"):
        rows.rows_per_epoch


@pytest.mark.parametrize("mixture", [(), ((0, (3.0, 1.0)), (50, (1.0, 1.0)))])
def test_tokens_of_each_source_are_said_beforehand(mixture, tmp_path):
    sources = [numbers(200, "a", tmp_path), dataclasses.replace(numbers(50, "b", tmp_path), weight=2.5)]
    rows = load_rows(sources, TOKENIZER, max_length=64, cache_dir=tmp_path / "cache", mixture=mixture)
    found = {"a": 0, "b": 0}
    for i in range(100):
        row = rows[i]
        found[names_of(row)] += int(row["lengths"].sum())
    said = rows.seen(100)
    assert [name.rpartition("/")[2] for name, _, _ in said] == ["a.json", "b.json"]
    for (_, tokens, _), count in zip(said, found.values()):
        assert tokens == pytest.approx(count, rel=0.05)


def test_bad_mixtures_are_named(tmp_path):
    sources = [numbers(20, "a", tmp_path), numbers(20, "b", tmp_path)]
    load = lambda *mixture: load_rows(sources, TOKENIZER, max_length=64, cache_dir=tmp_path / "c", mixture=mixture)
    for mixture in ([(5, (1, 1))], [(0, (1, 1)), (9, (1, 1)), (9, (0, 1))]):
        with pytest.raises(UserError, match="does not cover the run: its steps must begin with 0 and ascend"):
            load(*mixture)
    with pytest.raises(UserError, match=r"has the shares \(1, 1, 1\) for 2 sources"):
        load((0, (1, 1, 1)))
    for shares in ((), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(UserError, match="none may be negative, and not all 0"):
            MixtureConfig(0, shares)


@pytest.mark.parametrize("steps", [0, 99, 100])
def test_a_schedule_that_the_run_does_not_reach_is_named(steps):
    config = micro.get_config(f"steps={steps}")
    config.data.mixture = [dict(step=0, shares=(1.0,)), dict(step=100, shares=(1.0,))]
    with pytest.raises(UserError, match=f"mixture changes the shares at step 100, but config.steps is {steps}"):
        from_config_dict(config)
    config.steps = 101
    assert from_config_dict(config).data.mixture[1].step == 100
