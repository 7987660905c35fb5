"""Rows are a partition of the examples, nearly full, and chance decides who meets whom."""

import json

import numpy as np
import pytest

from refusion_jax.data.packing import examples_per_row, pack, pack_into, rows_needed
from refusion_jax.data.preparation import example_ids
from refusion_jax.data.tokenizers import load_tokenizer


def rng(seed=0):
    return np.random.default_rng(seed)


def limit_of(lengths, max_length):
    return examples_per_row(len(lengths), lengths.sum(), lengths.min(), max_length)


def loads(plan, lengths):
    return np.array([lengths[plan[row]].sum() for row in range(len(plan))])


@pytest.mark.parametrize(
    "count, max_length, max_examples", [(1, 50, 4), (7, 9, 2), (500, 60, 5), (500, 60, 1), (3000, 400, 1000)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_within_the_limits(count, max_length, max_examples, shuffle):
    lengths = rng(count).integers(1, min(max_length, 80) + 1, count)
    plan = pack(lengths, max_length, max_examples, rng() if shuffle else None)
    assert sorted(plan.order) == list(range(count))
    sizes = np.array([len(plan[row]) for row in range(len(plan))])
    assert sizes.min() >= 1 and sizes.max() <= max_examples
    assert loads(plan, lengths).max() <= max_length


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "count, low, high, limit", [(1, 5, 6, 9), (2000, 1, 80, 20), (4000, 33, 64, 9), (40, 64, 65, 9)]
)
def test_every_pass_needs_the_same_number_of_rows(count, low, high, limit, shuffle):
    lengths = rng(count).integers(low, high, count)
    rows = rows_needed(lengths, 64 if high < 66 else 256, limit, shuffle)
    orders = set()
    for number in range(4):
        plan = pack_into(rows, lengths, 64 if high < 66 else 256, limit, (7, number, 0) if shuffle else None)
        assert len(plan) == rows and sorted(plan.order) == list(range(count))
        sizes = np.diff(plan.starts)
        assert sizes.min() >= 1 and sizes.max() <= limit and loads(plan, lengths).max() <= 256
        orders.add(tuple(plan.order))
    assert len(orders) == (1 if count == 1 or not shuffle else 4)


def test_no_examples_no_rows():
    assert len(pack(np.zeros(0, int), 10, 3, rng())) == 0


def test_exact_fits_leave_no_padding():
    lengths = np.array([60, 40] * 100)
    assert len(pack(lengths, 100, 8, rng())) == 100


def test_a_seed_repeats_and_another_differs():
    lengths = rng().integers(5, 80, 300)
    first, again, other = (pack(lengths, 256, 20, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.order, again.order)
    assert not np.array_equal(first.order, other.order)
    fixed = [pack(lengths, 256, 20, None) for _ in range(2)]
    np.testing.assert_array_equal(fixed[0].order, fixed[1].order)


def test_companions_are_random():
    """Two given examples of equal length meet in a row about as often as under a random packing."""
    lengths = np.full(4000, 25)
    rows = [pack(lengths, 100, 4, rng(seed)) for seed in range(3)]
    for plan in rows:
        row_of = np.empty(4000, int)
        row_of[plan.order] = np.repeat(np.arange(len(plan)), np.diff(plan.starts))
        assert (row_of[0::2] == row_of[1::2]).mean() < 0.01  # neighbours in the source
        assert abs(np.corrcoef(np.arange(4000), row_of)[0, 1]) < 0.1  # rows do not follow the source's order
    mixed = rng().integers(1, 200, 20000)
    plan = pack(mixed, 1000, 100, rng())
    spread = [mixed[plan[row]].std() for row in range(len(plan) - 20)]
    assert np.median(spread) > 0.7 * mixed.std()  # rows are not sorted by length


def test_padding_of_the_released_sample(test_data):
    """At most 3 % padding at 4096 on lengths like the sample's, and as few rows as possible on the sample."""
    tokenizer = load_tokenizer(str(test_data / "tokenizers" / "qwen3"))
    records = json.loads((test_data / "data" / "query_response_100.json").read_text())
    sample = np.array([len(ids) for ids, _ in example_ids(tokenizer, [(r["query"], r["response"]) for r in records])])
    plan = pack(sample, 4096, limit_of(sample, 4096), rng())
    assert len(plan) == -(-sample.sum() // 4096)
    for count in (1000, 3000, 10000):
        lengths = rng(count).choice(sample, count)
        plan = pack(lengths, 4096, limit_of(lengths, 4096), rng())
        padding = 1 - lengths.sum() / (4096 * len(plan))
        print(f"{count} examples of {lengths.mean():.0f} tokens: {len(plan)} rows, {padding:.2%} padding")
        assert padding <= 0.03


def test_rows_come_in_random_order():
    lengths = np.arange(1, 101)
    plans = [pack(lengths, 200, 50, rng(seed)) for seed in range(20)]
    row_of_longest = {next(r for r in range(len(plan)) if 99 in plan[r]) for plan in plans}
    assert len(row_of_longest) > 8


@pytest.mark.parametrize("low, high, max_length", [(4, 40, 512), (200, 900, 4096), (30, 60, 64)])
def test_automatic_maximum_costs_no_rows(low, high, max_length):
    lengths = rng().integers(low, high, 5000)
    limit = limit_of(lengths, max_length)
    assert limit <= max_length
    assert len(pack(lengths, max_length, limit, rng())) <= 1.005 * len(pack(lengths, max_length, max_length, rng()))
