"""Cross-entropy in chunks and the loss terms: float64 oracles, plain loops, losses recorded from the released code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from refusion_jax.checkpoint import load
from refusion_jax.model import head as head_lib
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import init_params
from refusion_jax.objective.common import Inputs, PackedBatch, Term, cross_entropy, sums_per_example, token_losses
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

BATCH, LENGTH, WIDTH, VOCAB, LOGICAL = 8, 23, 16, 52, 43
MODEL = ModelConfig(
    vocab_size=VOCAB,
    logical_vocab_size=LOGICAL,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    mask_token_id=42,
)


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, objective):
    return objective.corrupt(jax.random.key(3), batch, MODEL, 0)


def losses_and_slopes(hidden, table, targets, weights):
    """TokenLoss, and the gradients of sum(weights * loss) to hidden states and table."""

    def weighted(hidden, table):
        found = over_vocabulary(MODEL, {"embed": {"embedding": table}}, hidden, cross_entropy, targets)
        return jnp.sum(weights * found.loss), found

    (_, found), slopes = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(hidden, table)
    return found, slopes


@pytest.fixture(scope="module")
def head():
    """hidden [batch, length, width], table [vocab, width], targets [batch, length]; logits up to about 30."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    return (
        hidden,
        (2 * rng.normal(size=(VOCAB, WIDTH))).astype(np.float32),
        rng.integers(0, LOGICAL, (BATCH, LENGTH)).astype(np.int32),
    )


def oracle(hidden, table, targets, weights):
    """Cross-entropy, correctness and the gradients of sum(weights * cross_entropy), in float64 and in one piece."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    scores = hidden @ table[:LOGICAL].T
    scores -= scores.max(axis=-1, keepdims=True)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    at = np.take_along_axis(probabilities, targets[..., None].astype(int), axis=-1)[..., 0]
    slope = weights[..., None] * (probabilities - np.eye(LOGICAL)[targets])
    d_table = np.zeros_like(table)
    d_table[:LOGICAL] = np.einsum("btv,btd->vd", slope, hidden)
    return -np.log(at), scores.argmax(axis=-1) == targets, slope @ table[:LOGICAL], d_table


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_cross_entropy_in_chunks_equals_the_whole_in_float64(monkeypatch, tokens, mesh, head):
    """Chunks of one token, of a few with a ragged last one, or all at once; on a mesh each device has its own."""
    monkeypatch.setattr(head_lib, "LOGIT_BYTES", tokens * VOCAB * 4 // mesh[2])
    hidden, table, targets = head
    weights = np.random.default_rng(1).uniform(size=targets.shape).astype(np.float32)
    weights[:, ::3] = 0
    with sharding.use(make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)]), sharding.TRAIN_RULES):
        found, (d_hidden, d_table) = jax.jit(losses_and_slopes)(hidden, table, targets, weights)
    entropy, correct, expected_hidden, expected_table = oracle(hidden, table, targets, weights)
    assert found.loss.dtype == jnp.float32
    np.testing.assert_allclose(found.loss, entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.correct, correct)
    np.testing.assert_allclose(d_hidden, expected_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_table, expected_table, rtol=1e-4, atol=1e-5)
    assert (np.asarray(d_table)[LOGICAL:] == 0).all()  # padding rows of the table


def test_cross_entropy_of_bfloat16_hidden_states_is_float32(head):
    """Only the inputs are rounded: bfloat16 logits would be off by up to 0.1 here."""
    hidden, table, targets = head
    half, _ = losses_and_slopes(jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(table), targets, 1.0)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, table)]
    np.testing.assert_allclose(half.loss, oracle(*rounded, targets, np.ones(targets.shape))[0], rtol=1e-4, atol=1e-4)


def products_with_the_table(jaxpr) -> int:
    """Matrix products in a jaxpr, inner ones times the turns of the loops around them."""
    inner = [
        (eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1) * products_with_the_table(sub)
        for eqn in jaxpr.eqns
        for sub in jaxprs_in_params(eqn.params)
    ]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize("rows", [8, 256])
def test_the_head_is_read_once_where_its_logits_fit(rows):
    """Rows do not count, only the bytes of their logits: each product with the table reads it once."""
    read = lambda hidden: over_vocabulary(
        MODEL, {"embed": {"embedding": jnp.ones((VOCAB, WIDTH))}}, hidden, lambda logits: logits.argmax(-1)
    )
    assert products_with_the_table(jax.make_jaxpr(read)(jnp.ones((rows, 128, WIDTH))).jaxpr) == 1


def test_tokens_without_weight_give_exactly_nothing():
    entropy = jnp.array([[1.0, jnp.inf, 2.0, jnp.nan]])
    term = Term(jnp.array([[0.5, 0.0, 1.0, 0.0]]), jnp.float32(1), jnp.float32(1))
    value, slope = jax.value_and_grad(term.numerator)(entropy)
    assert value == 2.5
    np.testing.assert_array_equal(slope, [[0.5, 0, 1, 0]])


# --- The two terms.


def random_batch(rows=6, length=96, seed=0):
    """Packed examples of uneven lengths: responses of 1 to 40 tokens, some rows nearly empty."""
    rng = np.random.default_rng(seed)
    lengths, prompts = np.zeros((rows, 8), np.int32), np.zeros((rows, 8), np.int32)
    for r in range(rows):
        for e in range(8 - r):
            prompt, response = rng.integers(1, 9), rng.choice([1, 3, 8, 20, 40])
            if lengths[r].sum() + prompt + response <= length:
                lengths[r, e], prompts[r, e] = prompt + response, prompt
        kept = lengths[r] > 0  # examples lie end to end
        lengths[r], prompts[r] = (np.pad(x[r][kept], (0, 8 - kept.sum())) for x in (lengths, prompts))
    ids = rng.integers(0, 2**32, (rows, 8), dtype=np.uint32)
    return PackedBatch(rng.integers(0, 40, (rows, length)).astype(np.int32), prompts, lengths, ids)


@pytest.mark.parametrize("masking", ["released", "paper"])
@pytest.mark.parametrize("normalisation", ["released", "paper"])
def test_terms_equal_plain_loops_over_examples(normalisation, masking):
    """The table of method section 3 written out; weights of `released` give q away, all tokens of an example alike."""
    batch, config = random_batch(), Refusion(normalisation=normalisation, masking=masking)
    inputs, released = (
        corrupted(batch, dataclasses.replace(config, normalisation=n)) for n in (normalisation, "released")
    )
    entropy = np.random.default_rng(1).exponential(size=inputs.tokens.shape).astype(np.float32)
    ar_sum = ar_count = mdm_sum = 0.0
    ar_means, mdm_means = [], []
    for r, e in zip(*np.nonzero(batch.lengths), strict=True):
        mine = np.asarray(inputs.context.segment_ids[r]) == e + 1
        masked = mine & (np.asarray(inputs.tokens[r]) == MODEL.mask_token_id)
        ar = mine & (np.asarray(inputs.terms["ar"].weights[r]) > 0)
        assert not (ar & masked).any()
        ar_sum, ar_count = ar_sum + entropy[r][ar].sum(dtype=np.float64), ar_count + ar.sum()
        response = batch.lengths[r, e] - batch.prompt_lengths[r, e]
        if masked.any():
            q = 1 / (np.asarray(released.terms["mdm"].weights[r])[masked] * response)
            assert np.ptp(q) < 1e-6 and 0 < q.min() < 1.0001
            mdm_sum += entropy[r][masked].sum(dtype=np.float64) / (q[0] * response)
        ar_means.append(entropy[r][ar].mean(dtype=np.float64) if ar.any() else 0.0)
        mdm_means.append(entropy[r][masked].mean(dtype=np.float64) if masked.any() else 0.0)
    assert 0 in ar_means and 0 in mdm_means  # examples without targets, without masks
    if normalisation == "released":
        expected = {"ar": ar_sum / ar_count, "mdm": mdm_sum / len(mdm_means)}
    else:
        expected = {"ar": np.mean(ar_means), "mdm": np.mean(mdm_means)}
    for name, term in inputs.terms.items():
        np.testing.assert_allclose(term.numerator(entropy) / term.denominator, expected[name], rtol=1e-5, err_msg=name)


def test_losses_and_gradients_equal_the_released_code(reference):
    """All recorded batches, given their corruption: both terms within 1e-5, the norm of the gradient within 1e-4."""
    folder = reference / "tiny"
    config = dataclasses.replace(load.load_model_config(folder / "model"), attention="xla")
    params = load.load_params(folder / "model", config, make_mesh(1, devices=jax.devices()[:1]), sharding.DECODE_RULES)
    data = np.load(folder / "losses.npz")
    length = max(data[f"batch{i}/tokens"].shape[1] for i in range(8))

    @jax.jit
    def evaluate(params, inputs: Inputs):
        def loss(params):
            found = token_losses(config, Refusion(), {"params": params}, inputs).loss
            means = {name: t.numerator(found) / jnp.maximum(t.denominator, 1) for name, t in inputs.terms.items()}
            return means["ar"] + means["mdm"], means

        (_, means), slopes = jax.value_and_grad(loss, has_aux=True)(params)
        return means, optax.tree.norm(slopes)

    for i in range(8):
        # Padding, which the shapes of all batches are brought to, must change nothing either.
        field = lambda name, fill=0: np.pad(
            data[f"batch{i}/{name}"], ((0, 0), (0, length - data[f"batch{i}/tokens"].shape[1])), constant_values=fill
        )
        labels, masked, segments = field("labels", -100), field("masked"), field("attention_mask").astype(np.int32)
        spread = lambda name: np.broadcast_to(data[f"batch{i}/{name}"][:, None], labels.shape)
        terms = Refusion().terms(
            ar=(labels >= 0) & ~masked,
            mdm=(labels >= 0) & masked,
            q=spread("mask_prob"),
            response_length=spread("response_length"),
            segment_ids=segments,
            examples=len(labels),
        )
        context = Packed(jnp.asarray(segments), implementation="xla")
        means, norm = evaluate(
            params, Inputs(field("corrupted"), field("positions"), context, np.maximum(labels, 0), terms)
        )
        for name in ("ar", "mdm"):
            np.testing.assert_allclose(
                means[name], data[f"batch{i}/{name}_loss"], rtol=1e-5, err_msg=f"batch{i} {name}"
            )
        np.testing.assert_allclose(norm, data[f"batch{i}/grad_norm"], rtol=1e-4, err_msg=f"batch{i}")


def test_sums_per_example_add_up_to_the_terms():
    """And each is the sum of its own example: the same example alone in a row gives the same."""
    batch, objective = random_batch(), Refusion()
    batch = batch.replace(tokens=batch.tokens % 40)
    params = nn.unbox(init_params(MODEL, jax.random.key(0)))
    inputs = corrupted(batch, objective)
    sums = jax.jit(functools.partial(sums_per_example, MODEL, objective, examples=8))(params, inputs)
    losses = token_losses(MODEL, objective, {"params": params}, inputs)
    for name, term in inputs.terms.items():
        assert sums[name].shape == batch.lengths.shape and (np.asarray(sums[name])[batch.lengths == 0] == 0).all()
        np.testing.assert_allclose(sums[name].sum(), term.numerator(losses.loss), rtol=1e-5)
    first = batch.lengths[0, 0]
    alone = PackedBatch(
        batch.tokens[:1],
        *(np.where(np.arange(8) == 0, x[:1], 0) for x in (batch.prompt_lengths, batch.lengths)),
        batch.example_ids[:1],
    )
    assert first > 0
    single = sums_per_example(MODEL, objective, params, corrupted(alone, objective), examples=8)
    for name in sums:
        np.testing.assert_allclose(single[name][0, 0], sums[name][0, 0], rtol=1e-5)
