"""Likelihoods of diffusion objectives: what authors' code recorded, and estimates beside sums over all masks."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, random_params
from test_objective_masked import check_reference

from refusion_jax.errors import UserError
from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.objective import block, masked
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.block import Block
from refusion_jax.objective.likelihood import log_likelihood, stratified_counts
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.sedd import Sedd

PARAMS = random_params(3, 0.5)
PROMPT, ANSWER, KEY = [2, 5, 7], [3, 8, 4], jax.random.key(1)


@pytest.mark.parametrize(
    "kind, file, count",
    [
        ("bd3", "likelihood.npz", 47),
        ("mdlm", "likelihood.npz", 18),
        ("sedd", "likelihood.npz", 11),
        ("llada", "loglik.jsonl", 10),
    ],
)
def test_likelihoods_equal_those_of_the_authors(
    kind, file, count, repository, reference, monkeypatch, capsys, tmp_path
):
    """Bounds and exact values of given corruption, totals, variances of BD3-LM's clips, LLaDA's estimates."""
    for name in (file, "model"):
        (tmp_path / name).symlink_to(reference / "methods" / kind / name)
    name = file.split(".")[0]
    assert check_reference(repository, tmp_path, monkeypatch, capsys) == (0, f"{name} {count}/{count}\n")


@jax.jit
def _log_probabilities(tokens, blocks):
    context = Packed(jnp.ones_like(tokens), blocks=blocks, see="block", implementation="xla")
    hidden, _ = Qwen3(MODEL).apply({"params": PARAMS}, tokens, jnp.arange(tokens.shape[1])[None], context)
    return over_vocabulary(MODEL, PARAMS, hidden, jax.nn.log_softmax)[0]


def predicted(open, size=100):
    """Sum of log probabilities of the answer's tokens at the `open` places, which are masks, under blocks of a size."""
    tokens = np.array([[*PROMPT, *ANSWER]])
    places = len(PROMPT) + np.array(open)
    noisy = tokens.copy()
    noisy[0, places] = MODEL.mask_token_id
    found = np.asarray(_log_probabilities(noisy, np.arange(tokens.shape[1])[None] // size))
    return found[places, tokens[0, places]].sum()


def test_estimate_has_the_sum_over_all_subsets_as_its_mean():
    """Every number of masks as likely, then every subset of so many."""
    a = len(ANSWER)
    wanted = np.mean(
        [
            np.mean([a / n * predicted(subset) for subset in itertools.combinations(range(a), n)])
            for n in range(1, a + 1)
        ]
    )
    estimates = np.array(
        [
            log_likelihood(Masked(), MODEL, PARAMS, [PROMPT], [ANSWER], jax.random.key(i), samples=8)[0]
            for i in range(60)
        ]
    )
    assert abs(estimates.mean() - wanted) < 4 * estimates.std() / np.sqrt(60)
    # The bound of MDLM is the same in the mean, with or without scores in place of a distribution.
    mdlm = dataclasses.replace(masked.METHODS["mdlm"], softmax="raw")
    bound = log_likelihood(dataclasses.replace(mdlm, schedule="log_linear"), MODEL, PARAMS, [PROMPT], [ANSWER], KEY)
    assert abs(bound[0] - wanted) < 4 * estimates.std() / 4


def test_what_is_not_random_is_exact():
    """One token; and blocks of one, the product from left to right."""
    one = log_likelihood(Masked(), MODEL, PARAMS, [PROMPT], [ANSWER[:1]], KEY)
    longer = np.array([[*PROMPT, MODEL.mask_token_id]])
    found = np.asarray(_log_probabilities(longer, np.zeros((1, 4), int)))
    np.testing.assert_allclose(one, found[3, ANSWER[0]], rtol=1e-5)
    exact = log_likelihood(Block(block_size=1), MODEL, PARAMS, [PROMPT], [ANSWER], KEY)
    tokens = [*PROMPT, *ANSWER]
    total = 0.0
    for i in range(len(PROMPT), len(tokens)):
        text = np.array([[*tokens[:i], MODEL.mask_token_id, *[0] * (5 - i)]])
        total += np.asarray(_log_probabilities(text, np.arange(6)[None]))[i, tokens[i]]
    np.testing.assert_allclose(exact, total, rtol=1e-5)


@pytest.mark.parametrize(
    "objective", [block.METHODS["bd3"], Sedd(), masked.METHODS["d3pm"], Masked(alignment="shift")], ids=lambda o: o.kind
)
def test_an_answer_has_its_own_draws(objective):
    """The same whatever else is asked, and other ones with another key."""
    pairs = [PROMPT, [4, 4], PROMPT], [ANSWER, [5, 6, 7, 8, 9], ANSWER]
    found = log_likelihood(objective, MODEL, PARAMS, *pairs, KEY, samples=8, batch_size=4)
    alone = log_likelihood(objective, MODEL, PARAMS, [PROMPT], [ANSWER], KEY, samples=8, batch_size=4)
    assert found[0] == alone[0] != found[2]
    assert np.isfinite(found).all() and (found < 0).all()


def test_guidance_moves_logits_away_from_those_without_the_prompt():
    answer = ANSWER[:1]
    guided = log_likelihood(Masked(), MODEL, PARAMS, [PROMPT], [answer], KEY, cfg_scale=0.5)
    mask, blocks = MODEL.mask_token_id, np.zeros((1, 4), int)
    real = slice(MODEL.logical_vocab_size)  # the others are -inf
    cond = np.asarray(_log_probabilities(np.array([[*PROMPT, mask]]), blocks))[3, real]
    without = np.asarray(_log_probabilities(np.array([[mask] * 4]), blocks))[3, real]
    logits = without + 1.5 * (cond - without)
    np.testing.assert_allclose(guided, logits[answer[0]] - np.log(np.exp(logits).sum()), rtol=1e-4)


def test_numbers_of_masks_are_spread_over_the_answer():
    assert stratified_counts(jnp.int32(6), jnp.int32(7), 8).tolist() == [6, 7, 1, 2, 3, 3, 4, 5]  # as recorded
    for k in range(1, 9):
        assert sorted(stratified_counts(jnp.int32(k), jnp.int32(8), 8).tolist()) == list(range(1, 9))


@pytest.mark.parametrize(
    "objective, options, message",
    [
        (Autoregressive(), {}, "has exact likelihoods"),
        (Masked(schedule="spindle", counts="counts.npy"), {}, "bounds no likelihood"),
        (Masked(), {"samples": 12}, "not a positive multiple of batch_size = 8"),
        (Sedd(), {"cfg_scale": 1.0}, "guidance is defined for the objective 'masked'"),
    ],
    ids=["autoregressive", "spindle", "samples", "guidance"],
)
def test_impossible_estimates_are_refused(objective, options, message):
    with pytest.raises(UserError, match=message):
        log_likelihood(objective, MODEL, PARAMS, [PROMPT], [ANSWER], KEY, **options)
