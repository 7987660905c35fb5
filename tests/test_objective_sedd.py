"""Score entropy: the losses that the authors' code recorded, and what it is the same as."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
from test_objective import KEY, MODEL, copies
from test_objective_masked import check_reference

from refusion_jax.errors import UserError
from refusion_jax.objective.masked import METHODS
from refusion_jax.objective.sedd import Sedd
from refusion_jax.settings import build


def test_losses_and_gradients_equal_those_of_the_authors(repository, reference, monkeypatch, capsys, tmp_path):
    """Corruption token for token, losses within 1e-5, norms of the gradient within 1e-4 (check_reference's bounds)."""
    for name in ("losses.npz", "model"):
        (tmp_path / name).symlink_to(reference / "methods" / "sedd" / name)
    assert check_reference(repository, tmp_path, monkeypatch, capsys) == (0, "losses 6/6\n")


def test_scores_that_are_a_distribution_have_the_loss_of_masked_diffusion():
    """Normalised over the real ids; and of any scores the loss is at least that of the true ones, a distribution's."""
    model = dataclasses.replace(MODEL, vocab_size=8, logical_vocab_size=7, mask_token_id=5)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32).at[:, 7].set(-jnp.inf)
    targets = jnp.asarray(rng.choice([0, 1, 2, 3, 4, 6], 50))
    wanted = METHODS["mdlm"].per_token(model, logits, targets).loss
    real = jnp.where(jnp.arange(8) == 5, -jnp.inf, logits)
    normalised = logits - jnp.log(jnp.exp(real).sum(axis=1, keepdims=True)) + jnp.log(6.0)
    found = Sedd().per_token(model, normalised, targets)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.correct, jnp.argmax(real, axis=1) == targets)
    assert (Sedd().per_token(model, logits, targets).loss > wanted - 1e-5).all()


def test_corruption_is_that_of_masked_diffusion():
    batch = copies(20, prompt=2, response=12)
    inputs = Sedd(norm="token").corrupt(KEY, batch, MODEL, 0)
    wanted = METHODS["mdlm"].corrupt(KEY, batch, MODEL, 0)
    chex.assert_trees_all_equal((inputs.tokens, inputs.terms), (wanted.tokens, wanted.terms))
    assert not (np.asarray(Sedd(maskable="response").corrupt(KEY, batch, MODEL, 0).terms["mdm"].weights)[:, :2]).any()


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2)], ids=["two", "eight"])
def test_mesh_and_accumulation_change_nothing(shape):
    _, gradient, end, expected = test_step.run(objective=Sedd())
    _, split_gradient, split_end, actual = test_step.run(shape, objective=Sedd(), accumulation=2)
    # Of a sum, whose small entries are what large ones leave: the error is relative to the largest.
    error = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), split_gradient, gradient)
    assert max(jax.tree.leaves(error)) < 1e-5, error
    chex.assert_trees_all_close(split_end, end, atol=2e-4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"norm": "sequence"}, {"maskable": "block"}, {"kind": "score"}], ids=str)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match="choose one of"):
        build(Sedd, settings, "objective")
