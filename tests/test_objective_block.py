"""Block diffusion: the losses that the authors' code recorded, the same corruption anywhere, and what is drawn."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
from test_objective import KEY, MASK, MODEL, copies
from test_objective_masked import check_packed_equals_unpacked, check_reference, visible

from refusion_jax.errors import UserError
from refusion_jax.objective.block import METHODS, Block
from refusion_jax.objective.common import Inputs
from refusion_jax.settings import build

SETTINGS = METHODS | {
    "clipped": dataclasses.replace(METHODS["bd3"], clip=(0.3, 0.8), resample=True),
    "cosine": dataclasses.replace(METHODS["sdar"], schedule="cosine", norm="sequence", block_size=3),
}


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, objective) -> Inputs:
    return objective.corrupt(KEY, batch, MODEL, 0)


@pytest.mark.parametrize(
    "kind, lines", [("bd3", ["losses 6/6"]), ("sdar", ["losses 6/6", "losses_dllm 6/6"])], ids=["bd3", "sdar"]
)
def test_losses_and_gradients_equal_those_of_the_authors(
    kind, lines, repository, reference, monkeypatch, capsys, tmp_path
):
    """Corruption token for token, losses within 1e-5, norms of the gradient within 1e-4 (check_reference's bounds)."""
    folder = reference / "methods" / kind
    for path in folder.glob("losses*.npz"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model").symlink_to(folder / "model")
    code, out = check_reference(repository, tmp_path, monkeypatch, capsys)
    assert (code, out.splitlines()) == (0, lines)


def parts(inputs: Inputs, batch):
    """Per example id: what the model sees and must predict of both copies, and who sees whom."""
    found, length, seen = {}, batch.tokens.shape[1], visible(inputs)
    for r, e in zip(*np.nonzero(batch.lengths), strict=True):
        both = np.flatnonzero(np.asarray(inputs.context.segment_ids[r]) == e + 1)
        noisy = both[both < length]
        assert len(noisy) == batch.lengths[r, e] and len(both) == 2 * len(noisy)
        found[int(batch.example_ids[r, e])] = {
            "visible": seen[r][np.ix_(both, both)],
            "weights": np.asarray(inputs.terms["mdm"].weights)[r, noisy],
            "targets": np.asarray(inputs.targets)[r, noisy],
            **{name: np.asarray(getattr(inputs, name))[r, both] for name in ("tokens", "positions")},
        }
    return found


@pytest.mark.parametrize("name", [*SETTINGS])
def test_packed_equals_unpacked_in_any_order(name):
    check_packed_equals_unpacked(lambda batch: corrupted(batch, SETTINGS[name]), parts, streams=2)


def test_a_noisy_block_sees_itself_and_the_clean_blocks_before():
    """By a plain loop over the pairs of an example of three blocks, the last one shorter."""
    inputs = corrupted(copies(1, prompt=3, response=7), Block(block_size=4))
    everywhere = jnp.arange(20)
    seen = np.asarray(inputs.context.visible(everywhere, everywhere))[0]
    for q in range(20):
        for k in range(20):
            query, key, clean = q % 10 // 4, k % 10 // 4, k >= 10
            wanted = (key < query if clean else key == query) if q < 10 else clean and key <= query
            assert seen[q, k] == wanted
    np.testing.assert_array_equal(inputs.tokens[0, 10:], copies(1, 3, 7).tokens[0])
    assert not (np.asarray(inputs.tokens)[0, :3] == MASK).any()


@pytest.mark.parametrize("split", [((2, 1, 1), {"accumulation": 2}), ((2, 2, 2), {})], ids=["two", "eight"])
def test_mesh_and_accumulation_change_nothing(split):
    """Two or eight devices, for three optimizer steps of packed rows."""
    shape, changes = split
    objective = SETTINGS["clipped"]
    _, gradient, end, expected = test_step.run(objective=objective)
    _, split_gradient, split_end, actual = test_step.run(shape, objective=objective, **changes)
    chex.assert_trees_all_close(split_gradient, gradient, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(split_end, end, atol=2e-4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4)
    assert all(metrics["mdm_tokens"] > 0 and np.isfinite(metrics["loss"]) for metrics in actual)


def test_levels_of_an_example_are_spread_over_its_blocks():
    """Stratified: one level in each of as many parts as there are blocks, in any order; otherwise levels coincide."""
    batch, objective = copies(400, prompt=1, response=15), METHODS["bd3"]
    t = np.asarray(objective.draw(KEY, batch).t)[:, ::4]
    np.testing.assert_array_equal(np.sort(np.floor((t - 1e-3) / 0.999 * 4), axis=1), np.tile(np.arange(4), (400, 1)))
    counts = np.bincount(np.argmin(t, axis=1), minlength=4)
    assert ((counts - 100) ** 2 / 100).sum() < 16.3  # upper 0.1 % point of chi-square, 3 degrees
    t = np.asarray(METHODS["sdar"].draw(KEY, batch).t)
    assert (t == t[:, :1]).all() and len(np.unique(t)) == 400
    t = np.asarray(dataclasses.replace(objective, stratified=False).draw(KEY, batch).t)[:, ::4]
    assert len(np.unique(np.floor((t - 1e-3) / 0.999 * 4) @ [1, 5, 25, 125])) > 24


def test_resampled_blocks_have_shares_inside_the_clip():
    """Of whole blocks; the first token of an example counts though it is never masked, and a short block is left."""
    objective = SETTINGS["clipped"]
    batch = copies(500, prompt=1, response=13)
    masked = np.asarray(objective.draw(KEY, batch).masked)
    counts = masked[:, :12].reshape(500, 3, 4).sum(axis=2)
    assert set(np.unique(counts)) == {2, 3}
    assert set(np.unique(masked[:, 12:].sum(axis=1))) == {0, 1, 2}
    assert not (np.asarray(corrupted(batch, objective).tokens)[:, 0] == MASK).any()
    free = np.asarray(dataclasses.replace(objective, resample=False).draw(KEY, batch).masked)
    assert set(np.unique(free[:, :12].reshape(500, 3, 4).sum(axis=2))) == {0, 1, 2, 3, 4}


def test_blocks_of_one_token_at_full_noise_are_the_exact_likelihood():
    """Everything but the first token is masked, with weight 1."""
    objective = dataclasses.replace(METHODS["bd3"], block_size=1, clip=(1.0, 1.0))
    inputs = corrupted(copies(2, prompt=2, response=6), objective)
    np.testing.assert_array_equal(np.asarray(inputs.terms["mdm"].weights), np.tile([0.0] + [1.0] * 7, (2, 1)))
    assert (np.asarray(inputs.tokens)[:, 1:8] == MASK).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 0}, "must be greater than 0"),
        ({"clip": (0.0, 1.0)}, "0 < lowest <= highest <= 1"),
        ({"clip": (0.8, 0.3)}, "0 < lowest <= highest <= 1"),
        ({"clip": (0.5,)}, "give the lowest and the highest level"),
        ({"stratified": True}, "they have one in common"),
        ({"resample": True}, "needs a clip narrower"),
        ({"resample": True, "clip": (0.3, 0.8), "schedule": "cosine"}, "schedule = 'linear'"),
        ({"resample": True, "clip": (0.3, 0.4)}, "can never end: no number of masks in a block of 4"),
        ({"maskable": "all"}, "choose one of response, all_but_first"),
        ({"weight": "1-t"}, "choose one of elbo, uniform"),
        ({"var_min": True}, "Unknown setting objective.var_min"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        build(Block, settings, "objective")
    assert "\n" not in str(raised.value)
