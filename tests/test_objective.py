"""Corruption: what the model sees and has to predict, against a plain oracle, and the distribution of the draws."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.common import Inputs, PackedBatch
from refusion_jax.objective.refusion import Refusion

MASK = 999
KEY = jax.random.key(7)
# Upper 0.1 % points of chi-square. The keys are fixed, so a test passes always or never.
CHI_SQUARE = {1: 10.8, 3: 16.3, 5: 20.5, 7: 24.3}

MODEL = ModelConfig(
    vocab_size=1000,
    hidden_size=2,
    intermediate_size=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    tie_embeddings=True,
    mask_token_id=MASK,
)


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, objective, key=KEY):
    return objective.corrupt(key, batch, MODEL, 0)


def example(number, prompt, response):
    """(id, tokens, prompt length), every token of it different."""
    return number, 10 + np.arange(prompt + response), prompt


def pack(rows, length, examples=None):
    """A PackedBatch from rows of examples; padding holds a token that is also a real one."""
    examples = examples or max(map(len, rows))
    batch = PackedBatch(
        tokens=np.full((len(rows), length), 11, np.int32),
        prompt_lengths=np.zeros((len(rows), examples), np.int32),
        lengths=np.zeros((len(rows), examples), np.int32),
        example_ids=np.zeros((len(rows), examples), np.uint32),
    )
    for r, row in enumerate(rows):
        start = 0
        for e, (number, tokens, prompt) in enumerate(row):
            batch.tokens[r, start : start + len(tokens)] = tokens
            batch.prompt_lengths[r, e], batch.lengths[r, e], batch.example_ids[r, e] = prompt, len(tokens), number
            start += len(tokens)
    return batch


def copies(count, prompt, response, length=None):
    """`count` passes over examples of one size, one to a row."""
    return pack([[example(i, prompt, response)] for i in range(count)], length or prompt + response)


def oracle(prompt, response, k, order, masked):
    """Method section 2, slot by slot: the clean ones in this order, then the masked ones.

    Returns:
      Buffer, targets (-1: none) and positions.
    """
    buffer, targets, positions = list(prompt), [-1] * len(prompt), list(range(len(prompt)))
    for slot in [*order, *masked]:
        tokens = list(response[slot * k : (slot + 1) * k])
        buffer += [MASK] * len(tokens) if slot in masked else tokens
        targets += tokens if slot in masked else [*tokens[1:], -1]
        positions += [len(prompt) + slot * k + j for j in range(len(tokens))]
    return buffer, targets, positions


def targets_of(inputs):
    """[batch, length] targets, -1 where no term has weight; no token may have two."""
    ar, mdm = (np.asarray(inputs.terms[name].weights) > 0 for name in ("ar", "mdm"))
    assert not (ar & mdm).any()
    return np.where(ar | mdm, inputs.targets, -1)


def slots_of(tokens, positions, prompt, k):
    """(clean slots in buffer order, masked slots in buffer order) of one example's part of the buffer."""
    first = lambda chosen: list(dict.fromkeys(((positions[prompt:][chosen]) - prompt) // k))
    masked = np.asarray(tokens[prompt:]) == MASK
    return first(~masked), first(masked)


def parts(inputs: Inputs, batch: PackedBatch):
    """Per example id: what the model sees and must predict, wherever it lies."""
    targets, found = targets_of(inputs), {}
    for r, e in zip(*np.nonzero(batch.lengths), strict=True):
        chosen = np.asarray(inputs.context.segment_ids[r]) == e + 1
        at = np.flatnonzero(chosen)
        assert len(at) == batch.lengths[r, e] and (np.diff(at) == 1).all()
        found[int(batch.example_ids[r, e])] = {
            "tokens": np.asarray(inputs.tokens[r])[at],
            "positions": np.asarray(inputs.positions[r])[at],
            "targets": targets[r][at],
            **{name: np.asarray(term.weights[r])[at] for name, term in inputs.terms.items()},
        }
    return found


def assert_same_parts(a, b):
    assert a.keys() == b.keys()
    for number in a:
        for field in a[number]:
            np.testing.assert_array_equal(a[number][field], b[number][field], err_msg=f"example {number} {field}")


def chi_square(counts, expected=None):
    counts = np.asarray(counts, float)
    expected = counts.sum() / len(counts) if expected is None else expected
    return ((counts - expected) ** 2 / expected).sum()


# --- What comes out.


def test_worked_example():
    """Method section 2: two slots of eight and six tokens; every pattern comes, and nothing else."""
    prompt, response = [100, 101, 102], list(range(1, 15))
    patterns = [([0, 1], []), ([1, 0], []), ([1], [0]), ([0], [1]), ([], [0, 1])]
    expected = [oracle(prompt, response, 8, *pattern) for pattern in patterns]
    tokens, targets, positions = expected[2]  # as it is written there
    assert tokens == [100, 101, 102, 9, 10, 11, 12, 13, 14] + [MASK] * 8
    assert targets == [-1, -1, -1, 10, 11, 12, 13, 14, -1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert positions == [0, 1, 2, 11, 12, 13, 14, 15, 16, 3, 4, 5, 6, 7, 8, 9, 10]
    batch = pack([[(i, np.array(prompt + response), 3)] for i in range(64)], 17)
    inputs = corrupted(batch, Refusion(slot_sizes=(8,)))
    found = [
        tuple(map(list, row))
        for row in zip(np.asarray(inputs.tokens), targets_of(inputs), np.asarray(inputs.positions), strict=True)
    ]
    assert all(row in expected for row in found)
    assert all(row in found for row in expected)


@pytest.mark.parametrize("masking", ["released", "paper"])
def test_packed_rows_equal_the_oracle(masking):
    """Ragged responses, a last slot that is shorter, a response of one token, several examples in a row, padding."""
    k = 4
    sizes = [(3, 17), (5, 1), (2, 9), (1, 12), (7, 4), (1, 31), (4, 6)]
    rows = [[example(10 * r + e, *size) for e, size in enumerate(sizes[r % 3 : r % 3 + 3])] for r in range(60)]
    batch = pack(rows, length=64, examples=5)
    inputs = corrupted(batch, Refusion(masking=masking, slot_sizes=(k,)))
    patterns = set()
    for number, part in parts(inputs, batch).items():
        _, tokens, prompt = rows[number // 10][number % 10]
        order, masked = slots_of(part["tokens"], part["positions"], prompt, k)
        assert masked == sorted(masked)
        buffer, targets, positions = oracle(tokens[:prompt], tokens[prompt:], k, order, masked)
        for field, expected in (("tokens", buffer), ("targets", targets), ("positions", positions)):
            np.testing.assert_array_equal(part[field], expected, err_msg=f"example {number} {field}")
        # A clean token still stands at its own position.
        clean = part["tokens"] != MASK
        np.testing.assert_array_equal(tokens[part["positions"][clean]], part["tokens"][clean])
        patterns.add((tuple(order), tuple(masked)))
    assert len(patterns) > 25  # the draws vary
    padding = np.asarray(inputs.context.segment_ids) == 0
    np.testing.assert_array_equal(padding, np.arange(64) >= batch.lengths.sum(axis=1, keepdims=True))
    assert (targets_of(inputs)[padding] == -1).all()


def test_oracle_equals_sequences_recorded_from_the_released_code(reference):
    """So what the oracle says is what the authors trained with."""
    data = np.load(reference / "tiny" / "losses.npz")
    checked = 0
    for b in range(8):
        batch = {key.split("/")[1]: data[key] for key in data.files if key.startswith(f"batch{b}/")}
        for row in range(len(batch["tokens"])):
            real = batch["attention_mask"][row].astype(bool)
            prompt, tokens = (
                int(batch["prompt_lengths"][row]),
                np.where(batch["masked"][row], MASK, batch["corrupted"][row])[real],
            )
            recorded = [
                list(tokens),
                [t if t >= 0 else -1 for t in batch["labels"][row][real]],
                list(batch["positions"][row][real]),
            ]
            original = batch["tokens"][row][batch["attention_mask"][row].astype(bool)]
            fits = []
            for k in (4, 8, 16, 32):
                order, masked = slots_of(tokens, batch["positions"][row][real], prompt, k)
                fits.append(list(oracle(original[:prompt], original[prompt:], k, order, masked)) == recorded)
            assert any(fits), f"batch{b} row {row}"
            checked += 1
    assert checked == 48


def test_targets_never_cross_a_slot():
    """With slots of every size: an autoregressive target is the next token of its own slot, a mask's its own."""
    batch = copies(200, prompt=3, response=61, length=70)
    inputs = corrupted(batch, Refusion())
    tokens, targets, positions = np.asarray(inputs.tokens), targets_of(inputs), np.asarray(inputs.positions)
    original = np.asarray(batch.tokens)
    for r in range(200):
        clean_targets = (tokens[r] != MASK) & (targets[r] >= 0)
        at = positions[r][clean_targets]
        np.testing.assert_array_equal(targets[r][clean_targets], original[r][at + 1])
        np.testing.assert_array_equal(
            np.flatnonzero(clean_targets) + 1, [np.flatnonzero(positions[r] == p + 1)[0] for p in at]
        )  # next in the buffer too
        masks = tokens[r] == MASK
        np.testing.assert_array_equal(targets[r][masks], original[r][positions[r][masks]])
        heads = np.setdiff1d(
            np.arange(3, 64), [*(at + 1), *positions[r][masks]]
        )  # predicted by nobody: first tokens of clean slots
        assert ((heads - 3) % 4 == 0).all()


# --- The same pass over an example, wherever it lies.


@pytest.mark.parametrize("kind", ["released", "paper"])
def test_packed_equals_unpacked_in_any_order(kind):
    config = Refusion(masking=kind, normalisation=kind)
    sizes = [(3, 17), (5, 1), (2, 40), (1, 12), (7, 4), (1, 31), (4, 66), (2, 2)]
    examples = [example(100 + i, *size) for i, size in enumerate(sizes)]
    layouts = [
        pack([[e] for e in examples], length=128, examples=9),  # one to a row
        pack(
            [examples[:3], examples[3:6], [], examples[6:], *[[]] * 4], length=128, examples=9
        ),  # packed, empty rows among them
        pack([*[[]] * 5, examples[5:], examples[2:5][::-1], examples[:2]], length=128, examples=9),  # another order
        pack([examples[1::2][::-1], examples[::2]], length=200, examples=4),  # rows of another shape
    ]
    outputs = [corrupted(batch, config) for batch in layouts]
    alone, *packed = (parts(inputs, batch) for inputs, batch in zip(outputs, layouts, strict=True))
    for other in packed:
        assert_same_parts(alone, other)
    for name in ("ar", "mdm"):
        assert len({float(inputs.terms[name].denominator) for inputs in outputs}) == 1


def test_other_passes_and_other_seeds_are_corrupted_otherwise():
    config, batch = Refusion(slot_sizes=(4,)), copies(2, prompt=2, response=64)
    same = batch.replace(example_ids=np.full_like(batch.example_ids, 5))
    first, second = np.asarray(corrupted(batch, config).positions)
    assert (first != second).any()
    first, second = np.asarray(corrupted(same, config).positions)
    np.testing.assert_array_equal(first, second)
    reseeded = corrupted(same, config, jax.random.key(8))
    assert (np.asarray(reseeded.positions)[0] != first).any()


# --- Distributions.


@functools.cache
def many(masking, response, slot_sizes, count=2400, cap=0.0):
    """[count, length] tokens, positions, targets and mdm weights of passes over examples with one prompt token."""
    config = Refusion(masking=masking, slot_sizes=slot_sizes, mdm_weight_cap=cap)
    inputs = corrupted(copies(count, prompt=1, response=response), config)
    assert float(inputs.terms["mdm"].denominator) == count
    return (
        np.asarray(inputs.tokens),
        np.asarray(inputs.positions),
        targets_of(inputs),
        np.asarray(inputs.terms["mdm"].weights),
    )


def test_slot_sizes_are_drawn_uniformly():
    """Paper masking always leaves a clean slot; a clean slot of k tokens has k - 1 targets."""
    tokens, _, targets, _ = many("paper", 32, (4, 8, 16, 32))
    clean = (tokens[:, 1:] != MASK).sum(axis=1)
    slots = clean - ((tokens != MASK) & (targets >= 0)).sum(axis=1)
    sizes, counts = np.unique(clean / slots, return_counts=True)
    np.testing.assert_array_equal(sizes, [4, 8, 16, 32])
    assert chi_square(counts) < CHI_SQUARE[3]


def test_released_masking_masks_each_slot_with_its_examples_probability():
    slots = 64
    tokens, _, _, weights = many("released", 4 * slots, (4,), count=800)
    masked = (tokens == MASK).sum(axis=1) / 4
    some = masked > 0
    q = 1 / (weights.max(axis=1)[some] * 4 * slots)
    assert (q >= 1e-3).all() and (q <= 1 + 1e-6).all()
    # Uniform over all examples; below 0.2 some examples have no mask that would tell.
    counts, _ = np.histogram(q, bins=np.linspace(0.2, 1.0, 9))
    assert chi_square(counts, expected=len(tokens) * 0.1 / 0.999) < CHI_SQUARE[7]
    # Binomial with its own q: variance 1 after standardising (slots are independent), mean 0.
    chosen = (q > 0.2) & (q < 0.95)
    z = (masked[some][chosen] - slots * q[chosen]) / np.sqrt(slots * q[chosen] * (1 - q[chosen]))
    assert abs(z.mean()) < 4 / np.sqrt(len(z)) and abs((z**2).mean() - 1) < 4 * np.sqrt(2 / len(z))
    # One weight for all masks of an example.
    assert np.allclose(
        np.where(weights > 0, weights, weights.max(axis=1, keepdims=True)), weights.max(axis=1, keepdims=True)
    )


def test_paper_masking_masks_a_random_part_of_the_slots():
    """floor(t K) of K = 8 slots, t uniform: 0 to 7 equally often, and every slot as often as the others."""
    tokens, positions, _, _ = many("paper", 32, (4,))
    masked = tokens == MASK
    counts = np.bincount(masked.sum(axis=1) // 4, minlength=9)
    assert counts[8] == 0 and chi_square(counts[:8]) < CHI_SQUARE[7]
    one = masked.sum(axis=1) == 4
    which = (positions[one][masked[one]].reshape(-1, 4)[:, 0] - 1) // 4
    assert chi_square(np.bincount(which, minlength=8)) < CHI_SQUARE[7]


def test_order_of_clean_slots_is_uniform():
    tokens, positions, _, _ = many("released", 12, (4,))
    orders = {}
    for row_tokens, row_positions in zip(tokens, positions, strict=True):
        order, masked = slots_of(row_tokens, row_positions, 1, 4)
        orders.setdefault(frozenset(order), []).append(tuple(order))
    for clean, found in orders.items():
        if len(clean) > 1:
            counts = [found.count(order) for order in itertools.permutations(clean)]
            assert sum(counts) == len(found) > 100
            assert chi_square(counts) < CHI_SQUARE[len(counts) - 1], (clean, counts)


# --- Weights (the loss they make is in test_losses.py).


def test_weight_cap_bounds_the_masking_weight():
    plain, capped = (12 * many("released", 12, (4,), cap=cap)[3] for cap in (0.0, 3.0))
    assert plain.max() > 6
    np.testing.assert_allclose(capped, np.minimum(plain, 3.0), rtol=1e-6)


def test_masking_weight_is_one_over_probability_and_response_length():
    """The probability is the pass's own, whatever the response: so weights of two responses are as their lengths."""
    short, long = many("released", 12, (4,))[3][:800].max(axis=1), many("released", 256, (4,), count=800)[3].max(axis=1)
    both = (short > 0) & (long > 0)
    assert both.sum() > 400
    np.testing.assert_allclose(12 * short[both], 256 * long[both], rtol=1e-6)


# --- Next-token prediction.


def test_autoregressive_predicts_the_response_from_what_comes_before():
    """Clean rows; every response token is predicted by its predecessor, the first one by the prompt's last token."""
    sizes = [(3, 5), (1, 1), (4, 2)]
    rows = [[example(e, *size) for e, size in enumerate(sizes)], [example(7, 2, 6)], []]
    batch = pack(rows, length=24)
    inputs = corrupted(batch, Autoregressive())
    (term,) = inputs.terms.values()
    expected = np.full(batch.tokens.shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for _, tokens, prompt in row:
            for i in range(prompt, len(tokens)):
                expected[r, start + i - 1] = tokens[i]
            np.testing.assert_array_equal(inputs.positions[r, start : start + len(tokens)], np.arange(len(tokens)))
            start += len(tokens)
    np.testing.assert_array_equal(np.where(np.asarray(term.weights) > 0, inputs.targets, -1), expected)
    np.testing.assert_array_equal(inputs.tokens, batch.tokens)
    assert float(term.denominator) == sum(response for _, response in [*sizes, (2, 6)]) == np.sum(term.weights)


def test_autoregressive_needs_no_mask_token():
    plain = dataclasses.replace(MODEL, mask_token_id=None)
    inputs = Autoregressive().corrupt(KEY, pack([[example(0, 2, 3)]], length=8), plain, 0)
    assert int(inputs.tokens[0, 0]) == 10
