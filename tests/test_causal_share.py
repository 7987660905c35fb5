"""A share of ReFusion's examples presented clean and in order: which ones, what they predict, and what it trains."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from test_objective import MASK, assert_same_parts, copies, corrupted, example, pack, parts
from test_step import CONFIG, MODEL, mesh_of, uneven_batch

from refusion_jax import step as steps_lib
from refusion_jax.config import LoraConfig
from refusion_jax.errors import UserError
from refusion_jax.model.qwen3 import init_params
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.refusion import Refusion

SIZES = [(3, 17), (5, 1), (2, 40), (1, 12), (7, 4), (1, 31), (4, 66), (2, 2)]


def all_parts(batch, objective):
    """Per example id what the model sees, the next tokens it must predict included (`parts` knows the other two)."""
    inputs = corrupted(batch, objective)
    causal = inputs.terms.get("causal")
    found = parts(inputs.replace(terms={name: inputs.terms[name] for name in ("ar", "mdm")}), batch)
    for r, e in zip(*np.nonzero(batch.lengths), strict=True):
        at = np.asarray(inputs.context.segment_ids[r]) == e + 1
        weights = np.zeros(at.sum()) if causal is None else np.asarray(causal.weights[r])[at]
        found[int(batch.example_ids[r, e])] |= {
            "causal": weights,
            "next": np.where(weights > 0, np.asarray(inputs.targets[r])[at], -1),
        }
    return found


def test_causal_examples_are_clean_in_order_and_predict_every_response_token():
    """The others are what they are without a share, to the bit."""
    examples = [example(100 + i, *SIZES[i % len(SIZES)]) for i in range(64)]
    batch = pack([examples[i : i + 4] for i in range(0, 64, 4)], length=160)
    without = all_parts(batch, Refusion())
    shares = {share: all_parts(batch, Refusion(causal_share=share)) for share in (0.3, 0.7)}
    causal = {share: {n for n, part in found.items() if part["causal"].any()} for share, found in shares.items()}
    assert 10 < len(causal[0.3]) < len(causal[0.7]) < 54
    assert causal[0.3] < causal[0.7]  # by the example's own draw, whatever the share
    for share, found in shares.items():
        for number, tokens, prompt in examples:
            part = found[number]
            if number not in causal[share]:
                assert_same_parts({number: part}, {number: without[number]})
                continue
            np.testing.assert_array_equal(part["tokens"], tokens)
            np.testing.assert_array_equal(part["positions"], np.arange(len(tokens)))
            expected = np.where(np.arange(len(tokens)) >= prompt - 1, np.append(tokens[1:], -1), -1)
            np.testing.assert_array_equal(part["next"], expected)
            np.testing.assert_array_equal(part["causal"], expected >= 0)
            assert not part["ar"].any() and not part["mdm"].any()


def test_packed_equals_unpacked():
    examples = [example(100 + i, *size) for i, size in enumerate(SIZES)]
    objective = Refusion(causal_share=0.5)
    alone = all_parts(pack([[e] for e in examples], length=128, examples=9), objective)
    together = all_parts(pack([examples[1::2][::-1], examples[::2]], length=200, examples=4), objective)
    assert_same_parts(alone, together)
    assert 0 < sum(part["causal"].any() for part in alone.values()) < len(alone)


def test_share_and_denominators_are_counted():
    """About the share of many examples; the denoising term is divided by the examples it is about."""
    batch = copies(2000, prompt=1, response=6)
    inputs = corrupted(batch, Refusion(causal_share=0.3))
    chosen = np.asarray(inputs.terms["causal"].weights).any(axis=1)
    assert abs(chosen.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)
    assert float(inputs.terms["causal"].denominator) == 6 * chosen.sum()
    assert float(inputs.terms["mdm"].denominator) == 2000 - chosen.sum()
    assert (np.asarray(inputs.tokens)[chosen] != MASK).all()


# --- What is trained.


@functools.cache
def trained(objective, shape=(1, 1, 1), **changes):
    """(start, end, metrics) of two steps."""
    config = dataclasses.replace(CONFIG, objective=objective, **changes)
    program = steps_lib.build(config, mesh_of(*shape), 2)
    state = program.init(jax.random.key(1))
    if config.lora.rank:
        state = state.replace(frozen=nn.unbox(init_params(MODEL, jax.random.key(2))))
    start, metrics = jax.device_get(state.params), []
    for step in range(2):
        state, values = program.train(state, uneven_batch(step))
        metrics.append({name: float(x) for name, x in values.items()})
    return start, jax.device_get(state.params), metrics


WAYS = {
    "plain": {},
    "accumulation 2 on 2x2x2": dict(shape=(2, 2, 2), accumulation=2),
    "adapters": dict(lora=LoraConfig(rank=2, base_dtype="float32")),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_share_of_one_is_the_autoregressive_objective(way):
    start, end, metrics = trained(Refusion(causal_share=1.0), **WAYS[way])
    other_start, other_end, expected = trained(Autoregressive(), **WAYS[way])
    chex.assert_trees_all_equal(start, other_start)
    for step, (actual, wanted) in enumerate(zip(metrics, expected, strict=True)):
        for name, other in (("loss", "loss"), ("causal_loss", "ar_loss"), ("causal_tokens", "ar_tokens")):
            np.testing.assert_allclose(actual[name], wanted[other], rtol=1e-6, err_msg=f"step {step} {name}")
        np.testing.assert_allclose(actual["grad_norm"], wanted["grad_norm"], rtol=1e-5)
        assert actual["ar_tokens"] == actual["mdm_tokens"] == actual["ar_loss"] == actual["mdm_loss"] == 0
    chex.assert_trees_all_close(end, other_end, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(shape=(2, 2, 2), accumulation=2), dict(shape=(1, 1, 1), accumulation=4)])
def test_mesh_and_accumulation_change_nothing(changes):
    """Microbatches without a causal example, or with nothing else, among them; three terms, each reported."""
    objective = Refusion(slot_sizes=(4, 8), causal_share=0.4)
    _, end, metrics = trained(objective, **changes)
    _, expected_end, expected = trained(objective)
    for actual, wanted in zip(metrics, expected, strict=True):
        chex.assert_trees_all_close(actual, wanted, rtol=1e-4)
        assert min(wanted[f"{name}_tokens"] for name in ("ar", "mdm", "causal")) > 0
        parts_of_loss = wanted["ar_loss"] + wanted["mdm_loss"] + wanted["causal_loss"]
        np.testing.assert_allclose(wanted["loss"], parts_of_loss, rtol=1e-6)
    chex.assert_trees_all_close(end, expected_end, atol=2e-4)


def test_bad_share():
    for share in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"causal_share is {share}.*between 0 and 1"):
            Refusion(causal_share=share)
