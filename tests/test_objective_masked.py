"""Masked diffusion: the losses that the authors' code recorded, the same corruption anywhere, and what is drawn."""

import dataclasses
import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import test_step
from test_objective import KEY, MASK, MODEL, copies, example, pack

from refusion_jax.errors import UserError
from refusion_jax.model.head import over_vocabulary
from refusion_jax.objective import spindle
from refusion_jax.objective.cart import context_weights
from refusion_jax.objective.common import Inputs, layout
from refusion_jax.objective.masked import METHODS, Draws, Masked
from refusion_jax.settings import build

SETTINGS = METHODS | {
    "annealed": dataclasses.replace(METHODS["diffullama"], anneal_steps=3),
    "cart": dataclasses.replace(METHODS["dream"], weight="cart"),
    "blocks": dataclasses.replace(METHODS["blockwise_sft"], block_size=4, prefix_mask_rate=0.2, suffix_mask_prob=0.7),
    "log_uniform": dataclasses.replace(METHODS["mdlm"], schedule="log_uniform"),
}


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, objective, step=0) -> Inputs:
    return objective.corrupt(KEY, batch, MODEL, step)


def visible(inputs: Inputs) -> np.ndarray:
    """[batch, length, length] bool (query, key)."""
    everywhere = jnp.arange(inputs.context.segment_ids.shape[1])
    return np.asarray(inputs.context.visible(everywhere, everywhere))


# --- The authors' numbers.


@pytest.mark.parametrize(
    "kind, losses", [("llada", 12), ("dream", 84), ("diffullama", 12), ("mdlm", 6), ("d3pm", 6), ("spindle", 20)]
)
def test_losses_and_gradients_equal_those_of_the_authors(
    kind, losses, repository, reference, monkeypatch, capsys, tmp_path
):
    """Corruption token for token, losses within 1e-5, norms of the gradient within 1e-4 (check_reference's bounds)."""
    folder = reference / "methods" / kind
    (tmp_path / "losses.npz").symlink_to(folder / "losses.npz")
    named = folder / "MODEL"
    (tmp_path / "model").symlink_to(folder / (named.read_text().strip() if named.exists() else "model"))
    code, out = check_reference(repository, tmp_path, monkeypatch, capsys)
    assert (code, out) == (0, f"losses {losses}/{losses}\n")


def test_check_reference_lists_every_loss_that_differs(repository, reference, tmp_path, monkeypatch, capsys):
    """Of Blockwise SFT, whose model lies elsewhere; unchanged, all six are equal."""
    folder = reference / "methods" / "blockwise_sft"
    assert check_reference(repository, folder, monkeypatch, capsys) == (0, "losses 6/6\n")
    data = dict(np.load(folder / "losses.npz"))
    data["batch2/loss"] = data["batch2/loss"] * 1.001
    data["batch4/grad_norm"] = data["batch4/grad_norm"] * 0.99
    data["batch5/corrupted"][0, 8] = 5
    np.savez(tmp_path / "losses.npz", **data)
    (tmp_path / "MODEL").write_text(str(reference / "methods" / "mdlm" / "model"))
    code, out = check_reference(repository, tmp_path, monkeypatch, capsys)
    kind, *mismatches = out.splitlines()
    assert (code, kind) == (1, "losses 3/6")
    assert [line.split(":")[0].strip() for line in mismatches] == [
        "batch2 loss",
        "batch4 grad_norm",
        "batch5 corrupted",
    ]
    np.savez(tmp_path / "losses.npz", **{"batch0/tokens": data["batch0/tokens"]})
    with pytest.raises(UserError, match="losses of a method that is not known"):
        check_reference(repository, tmp_path, monkeypatch, capsys)


def check_reference(repository, folder, monkeypatch, capsys):
    """(exit code, output) of the tool."""
    monkeypatch.syspath_prepend(repository / "tools")
    monkeypatch.setattr(sys, "argv", ["check_reference", str(folder)])
    import check_reference as tool

    with pytest.raises(SystemExit) as stopped:
        tool.main()
    return stopped.value.code, capsys.readouterr().out


# --- The same pass over an example, wherever it lies.


def parts(inputs: Inputs, batch):
    """Per example id: what the model sees and must predict, and who sees whom."""
    found, seen = {}, visible(inputs)
    for r, e in zip(*np.nonzero(batch.lengths), strict=True):
        at = np.flatnonzero(np.asarray(inputs.context.segment_ids[r]) == e + 1)
        assert len(at) == batch.lengths[r, e]
        found[int(batch.example_ids[r, e])] = {
            "visible": seen[r][np.ix_(at, at)],
            "weights": inputs.terms["mdm"].weights[r, at],
            **{name: getattr(inputs, name)[r, at] for name in ("tokens", "positions", "targets")},
        }
    return found


def check_packed_equals_unpacked(corrupted, parts, streams: int = 1) -> None:
    """Each example alone in a row, and several to a row in two orders: the same is seen and asked of it.

    Args:
      corrupted: what the model sees, of a packed batch.
      parts: that and the batch taken apart, by example id.
      streams: copies of a row that the model sees side by side.
    """
    sizes = [(3, 17), (5, 1), (2, 14), (1, 12), (7, 4), (4, 11)]
    examples = [example(100 + i, *size) for i, size in enumerate(sizes)]
    layouts = [
        pack([[e] for e in examples], length=44, examples=3),  # one to a row
        pack([examples[:2], [], examples[2:4], examples[4:], [], []], length=44, examples=3),
        pack([examples[5:], [], [], examples[3:5], examples[:3][::-1], []], length=44, examples=3),
    ]
    outputs = [corrupted(batch) for batch in layouts]
    alone, *packed = (parts(inputs, batch) for inputs, batch in zip(outputs, layouts, strict=True))
    for other in packed:
        chex.assert_trees_all_close(other, alone, rtol=1e-6)
    for inputs, batch in zip(outputs, layouts, strict=True):
        np.testing.assert_allclose(inputs.terms["mdm"].denominator, outputs[0].terms["mdm"].denominator)
        segments = np.tile(np.asarray(layout(batch).segment_ids), streams)
        crossing = segments[:, :, None] != segments[:, None, :]
        assert not visible(inputs)[: len(segments)][crossing].any()


@pytest.mark.parametrize("name", [*SETTINGS])
def test_packed_equals_unpacked_in_any_order(name):
    check_packed_equals_unpacked(lambda batch: corrupted(batch, SETTINGS[name]), parts)


@pytest.mark.parametrize("name, shape", [("d3pm", (2, 2, 2)), ("annealed", (2, 1, 1))])
def test_mesh_and_accumulation_change_nothing(name, shape):
    """Eight or two devices and two microbatches, for three optimizer steps."""
    objective = SETTINGS[name]
    _, gradient, end, expected = test_step.run(objective=objective)
    _, split_gradient, split_end, actual = test_step.run(shape, objective=objective, accumulation=2)
    chex.assert_trees_all_close(split_gradient, gradient, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(split_end, end, atol=2e-4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4)
    assert all(metrics["mdm_tokens"] > 0 and np.isfinite(metrics["loss"]) for metrics in actual)


# --- What is drawn and what it does.


def test_tokens_are_masked_independently_with_the_probability_of_their_level():
    """Binomial counts with the level that the weight tells; levels are uniform; prompts stay."""
    count, response = 1500, 64
    objective = Masked(norm="batch")
    inputs = corrupted(copies(count, prompt=3, response=response), objective)
    masked = np.asarray(inputs.tokens) == MASK
    assert not masked[:, :3].any()
    np.testing.assert_array_equal(masked, np.asarray(inputs.terms["mdm"].weights) > 0)
    some = masked.any(axis=1)
    t = 1 / np.asarray(inputs.terms["mdm"].weights).max(axis=1)[some]
    assert t.min() >= 1e-3 and t.max() <= 1
    counts, _ = np.histogram(t, bins=np.linspace(0.2, 1.0, 9))
    expected = count * 0.1 / 0.999
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # upper 0.1 % point of chi-square, 7 degrees
    chosen = (t > 0.2) & (t < 0.95)
    z = (masked[some].sum(axis=1) - response * t)[chosen] / np.sqrt(response * t * (1 - t))[chosen]
    assert abs(z.mean()) < 4 / np.sqrt(len(z)) and abs((z**2).mean() - 1) < 4 * np.sqrt(2 / len(z))
    np.testing.assert_array_equal(
        np.asarray(inputs.targets)[masked], np.asarray(copies(1, 3, response).tokens)[0][np.nonzero(masked)[1]]
    )


def test_shifted_targets_are_the_next_token_of_the_same_example():
    batch = pack([[example(1, 2, 9), example(2, 0, 6), example(3, 1, 8)]], length=30)
    objective = dataclasses.replace(METHODS["dream"], norm="batch")
    for number in range(20):
        moved = batch.replace(example_ids=batch.example_ids + number)
        inputs, same = corrupted(moved, objective), corrupted(moved, dataclasses.replace(objective, alignment="same"))
        np.testing.assert_array_equal(inputs.tokens, same.tokens)
        weights, unshifted = (np.array(x.terms["mdm"].weights)[0] for x in (inputs, same))
        unshifted[[0, 11, 17]] = 0  # nothing in the example is before its first token
        np.testing.assert_array_equal(weights[:-1], unshifted[1:])
        assert weights[-1] == 0
        at = np.flatnonzero(weights)
        np.testing.assert_array_equal(np.asarray(inputs.targets)[0][at], batch.tokens[0][at + 1])


def test_a_block_is_learnt_behind_clean_ones_and_before_masked_ones():
    """Responses of 10 tokens in blocks of 4: each of the three is drawn as often, and only its masks are targets."""
    objective = dataclasses.replace(METHODS["blockwise_sft"], block_size=4)
    inputs = corrupted(copies(900, prompt=3, response=10), objective)
    tokens, trained = np.asarray(inputs.tokens)[:, 3:], np.asarray(inputs.terms["mdm"].weights)[:, 3:] > 0
    masked, drawn = tokens == MASK, []
    for row, targets in zip(masked, trained, strict=True):
        if not targets.any():
            continue
        block = np.flatnonzero(targets)[0] // 4
        start, end = 4 * block, min(4 * block + 4, 10)
        assert not row[:start].any() and row[end:].all()
        np.testing.assert_array_equal(targets[start:end], row[start:end])
        assert targets.sum() == row[start:end].sum()
        drawn.append(block)
    assert not np.asarray(inputs.terms["mdm"].weights)[:, :3].any()
    assert len(drawn) > 600 and np.bincount(drawn).min() > 150
    np.testing.assert_allclose(np.asarray(inputs.terms["mdm"].weights).sum(axis=1)[trained.any(axis=1)], 1, rtol=1e-5)


def test_attention_is_annealed_from_causal_to_bidirectional():
    """At step s each later token is seen with probability (s + 1) / 4; held-out examples are seen as at the end."""
    objective = dataclasses.replace(METHODS["diffullama"], anneal_steps=4)
    batch = pack([[example(1, 2, 50), example(2, 2, 40)]], length=100)
    segments = np.asarray(layout(batch).segment_ids)
    same = segments[:, :, None] == segments[:, None, :]
    later = same & (np.arange(100)[:, None] < np.arange(100))
    for step, share in [(0, 0.25), (1, 0.5), (3, 1), (9, 1), (float("inf"), 1)]:
        seen = visible(corrupted(batch, objective, step))
        np.testing.assert_array_equal(seen & ~later, same & ~later)
        assert abs(seen[later].mean() - share) < 0.03
        assert share < 1 or seen[later].all()
    np.testing.assert_array_equal(visible(corrupted(batch, METHODS["llada"])), same)


def test_context_weights_equal_plain_sums_in_every_example():
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 3, 0], [9, 1, 14, 4])
    clean = rng.uniform(size=segments.shape) < 0.5
    expected = [
        sum(
            0.5 * 0.3 * 0.7 ** (abs(j - m) - 1)
            for m in range(len(segments))
            if m != j and clean[m] and segments[m] == segments[j]
        )
        for j in range(len(segments))
    ]
    np.testing.assert_allclose(context_weights(clean[None], segments[None], 0.3)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def counts(tmp_path):
    """A file of counts, ids 10 to 29 being the more frequent the higher they are."""
    path = tmp_path / "counts.npy"
    np.save(path, np.where(np.arange(1000) < 30, np.maximum(np.arange(1000) - 9, 0) ** 3, 0))
    return str(path)


def test_frequent_tokens_are_masked_later_than_rare_ones(counts):
    """At half the noise; each as often as its own probability says, whatever else lies in the row; weights are p'/p."""
    objective = Masked(schedule="spindle", counts=counts, strength=0.5, norm="batch", maskable="all")
    batch = pack([[example(i, 4, 16), example(900 + i, 1, 3)] for i in range(400)], length=24)
    draws = objective.draw(KEY, batch, 0)
    half = draws.replace(t=jnp.full_like(draws.t, 0.5))
    inputs = objective.inputs(batch, MODEL, half)
    share = (np.asarray(inputs.tokens) == MASK).mean(axis=0)[:20]
    f = spindle.frequencies(MODEL, counts)[10:30]
    p = 1 - np.clip(0.5 + 0.5 * (f - f.mean()), 0, 0.999)
    assert p[0] > 0.6 and p[-1] < 0.5 and (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 400)).all()
    weights = np.asarray(inputs.terms["mdm"].weights)[:, :20]
    np.testing.assert_allclose(weights[weights > 0], np.tile(1 / p, (400, 1))[weights > 0], rtol=1e-5)
    alone = pack([[example(i, 4, 16)] for i in range(400)], length=24)
    t, u = (np.asarray(x) for x in (half.t, half.u))
    other = objective.inputs(alone, MODEL, Draws(jnp.asarray(t), jnp.asarray(u)))
    np.testing.assert_array_equal(other.tokens[:, :20], inputs.tokens[:, :20])


def test_ids_of_the_training_data_are_counted(tmp_path, repository, monkeypatch):
    """Every token of the texts once, with the ids around them; what is held out is not counted."""
    monkeypatch.syspath_prepend(repository / "tools")
    import count_tokens

    micro.write_examples(tmp_path / "data.json")
    config = f"{repository}/tests/micro.py:data={tmp_path}/data.json"
    out = tmp_path / "counts.npy"
    override = f"--config.data.train={[{'kind': 'json', 'path': str(tmp_path / 'data.json')}]}"
    monkeypatch.setattr(sys, "argv", ["count_tokens", "--config", config, override, "--out", str(out)])
    count_tokens.main()
    counts = np.load(out)
    texts = "".join(x["query"] + x["response"] for x in json.loads((tmp_path / "data.json").read_text()))
    assert counts.shape == (262,)
    for digit in "0123456789":
        assert counts[ord(digit)] == texts.count(digit) > 0
    assert counts[257] == 60  # an end for each response


def test_counts_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "counts.npy"
    objective = Masked(schedule="spindle", counts=str(path))
    with pytest.raises(UserError, match="cannot be read .*; name a .npy file"):
        corrupted(copies(1, 1, 3), objective)
    np.save(path, np.ones(7))
    with pytest.raises(UserError, match="one count, at least 0, for each of the model's 1000 ids"):
        corrupted(copies(1, 1, 3), objective)


def test_trailing_eos_tokens_are_masked_together():
    """All of them or none, by the first one's number; an EOS inside the response is a token like others."""
    eos, model = 12, dataclasses.replace(MODEL, eos_token_id=12)
    tokens = np.array([20, 21, 30, eos, 31, eos, eos, eos])
    batch = pack([[(1, tokens, 2), (2, tokens[:6], 2)]], length=16)
    u = np.tile([0.9, 0.9, 0.1, 0.9, 0.1, 0.3, 0.9, 0.9], 2)[None].astype(np.float32)
    for t, masks in [(0.2, [2, 4, 10, 12]), (0.5, [2, 4, 5, 6, 7, 10, 12, 13])]:
        draws = Draws(jnp.full((1, 16), t), jnp.asarray(u))
        inputs = Masked(eos_as_one=True).inputs(batch, model, draws)
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(inputs.tokens)[0] == MASK), masks)
    with pytest.raises(UserError, match="set config.model.eos_token_id"):
        Masked(eos_as_one=True).inputs(batch, MODEL, draws)


def test_without_its_mask_the_softmax_is_that_of_the_other_ids():
    """And the mask's row of the table gets no gradient."""
    model = dataclasses.replace(MODEL, vocab_size=8, logical_vocab_size=8, mask_token_id=5)
    rng = np.random.default_rng(0)
    table, hidden = (rng.normal(size=size).astype(np.float32) for size in ((8, 2), (1, 6, 2)))
    targets = np.array([[0, 1, 2, 3, 4, 7]])

    def total(table):
        per_token = functools.partial(METHODS["mdlm"].per_token, model)
        return jnp.sum(over_vocabulary(model, {"embed": {"embedding": table}}, hidden, per_token, targets).loss)

    value, slope = jax.value_and_grad(total)(table)
    logits = np.delete((hidden @ table.T)[0].astype(np.float64), 5, axis=1)
    own = np.where(targets[0] > 5, targets[0] - 1, targets[0])
    np.testing.assert_allclose(value, (np.log(np.exp(logits).sum(1)) - logits[np.arange(6), own]).sum(), rtol=1e-5)
    assert not np.asarray(slope)[5].any() and np.asarray(slope)[:5].all()


# --- Settings.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alignment": "left"}, "alignment is 'left'; choose one of same, shift"),
        ({"alignment": "right"}, "some masks would have no prediction"),
        ({"schedule": "importance"}, "log_uniform, which is its name here"),
        ({"schedule": "spindle"}, "objective.counts, the file with the count of every id, need each other"),
        ({"counts": "counts.npy"}, "need each other"),
        ({"schedule": "spindle", "counts": "counts.npy", "weight": "1-t"}, "not t under schedule = 'spindle'"),
        ({"schedule": "spindle", "counts": "counts.npy", "diffusion_steps": 8}, "with loss = 'diffusionbert'"),
        ({"loss": "diffusionbert"}, "needs schedule = 'spindle', a positive diffusion_steps"),
        ({"weight": "focal"}, "'focal' is not supported"),
        ({"norm": "micro_batch"}, "masked counts over the batch"),
        ({"stratified": True}, "Unknown setting objective.stratified"),
        ({"cart_p": 1.5}, "cart_p is 1.5; it is a probability"),
        ({"weight": "cart", "cart_p": 0.0}, "every weight of 'cart' is 0"),
        ({"diffusion_steps": 10}, "defined for schedule = 'log_linear' only"),
        ({"loss": "d3pm"}, "positive diffusion_steps"),
        ({"schedule": "log_uniform", "weight": "1-t"}, "not t under schedule"),
        ({"block_size": 8, "maskable": "all"}, "cuts responses into blocks"),
        ({"block_size": 8, "anneal_steps": 10}, "goes with none of"),
        ({"prefix_mask_rate": 0.5}, "block_size is 0"),
        ({"block_size": -1}, "must not be negative"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        build(Masked, settings, "objective")
    assert "\n" not in str(raised.value)
