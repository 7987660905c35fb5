"""Gradients of the embedding and of the head in bfloat16: as large as in float32, and reduced once over the mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from test_losses import MODEL, VOCAB, WIDTH

from refusion_jax import step as steps_lib
from refusion_jax.config import Config, DataConfig
from refusion_jax.model import head, tables
from refusion_jax.objective.common import PackedBatch, cross_entropy
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

MESHES = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1)]


def on(mesh):
    return sharding.use(make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)]), sharding.TRAIN_RULES)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_row_that_30000_tokens_share_keeps_its_gradient(mesh):
    """In bfloat16 the sum of the mask token's row would stop growing; other rows are exact to bfloat16 as well."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((32, 1024)) < 0.92, MODEL.mask_token_id, rng.integers(0, VOCAB, (32, 1024)))
    slope = jnp.asarray(0.3 + rng.normal(size=(32, 1024, WIDTH)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)

    @jax.jit
    def gradient(table, tokens, slope):
        rows, pull = jax.vjp(lambda table: tables.look_up(table, tokens, "bfloat16"), table)
        return rows, pull(slope)[0]

    with on(mesh):
        rows, found = gradient(table, tokens, slope)
    np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[tokens])
    assert found.dtype == jnp.float32 and (tokens == MODEL.mask_token_id).sum() > 30000
    expected = np.zeros((VOCAB, WIDTH))
    np.add.at(expected, tokens, np.asarray(slope, np.float64))
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * np.abs(expected).max(axis=0).min() / 30)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_heads_gradient_over_many_chunks_is_rounded_once(monkeypatch, mesh):
    """256 chunks: each adds to a float32 sum. Summed in bfloat16 the error is several times larger."""
    monkeypatch.setattr(head, "LOGIT_BYTES", 8192 * VOCAB * 4 // np.prod(mesh) // 256)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(32, 256, WIDTH)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.bfloat16)
    targets = rng.integers(0, 43, (32, 256))

    @jax.jit
    def gradients(table, hidden):
        def total(table, hidden):
            found = head.over_vocabulary(MODEL, {"embed": {"embedding": table}}, hidden, cross_entropy, targets)
            return found.loss.sum()

        return jax.grad(total, argnums=(0, 1))(table, hidden)

    whole = gradients(*(x.astype(jnp.float32) for x in (table, hidden)))
    with on(mesh):
        found = gradients(table, hidden)
    for ours, exact in zip(found, whole, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.linalg.norm(ours.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert error < 0.004  # bfloat16 has 8 bits


# --- The training step.

VERY = dataclasses.replace(MODEL, vocab_size=1664, logical_vocab_size=1664, hidden_size=64, dtype="bfloat16")


def step_on(mesh, **changes):
    model = dataclasses.replace(VERY, **changes)
    config = Config(model=model, data=DataConfig(max_length=48), batch_size=64)
    return steps_lib.build(config, make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)]), 3)


def one_example_rows(rows=64, length=48):
    """Rows of one example each, prompts of 2 tokens."""
    one = np.full((rows, 1), length, np.int32)
    tokens = np.random.default_rng(0).integers(0, 40, (rows, length)).astype(np.int32)
    return PackedBatch(tokens, np.full_like(one, 2), one, np.arange(rows, dtype=np.uint32)[:, None])


def test_gradient_norms_of_a_step_agree_between_dtypes():
    """Where all targets are one token, the masks' gradients point one way and their row's sum is most of the norm."""
    norms, batch = {}, one_example_rows()
    batch = batch.replace(tokens=np.full_like(batch.tokens, 7))
    for dtype in ("float32", "bfloat16"):
        program = step_on((1, 1, 1), dtype=dtype)
        _, metrics = program.train(program.init(jax.random.key(0)), batch)
        norms[dtype] = float(metrics["grad_norm"])
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.01)


def products(jaxpr):
    """Operand dtypes of all matrix products in a jaxpr, inner ones included."""
    found = [tuple(v.aval.dtype.name for v in eqn.invars) for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    return found + [p for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params) for p in products(sub)]


def test_the_heads_products_take_the_compute_dtype_forward_and_backward():
    hidden, table = jnp.ones((2, 8, WIDTH), jnp.bfloat16), jnp.ones((VOCAB, WIDTH), jnp.bfloat16)
    targets = jnp.zeros((2, 8), jnp.int32)
    total = lambda table, hidden: head.over_vocabulary(
        MODEL, {"embed": {"embedding": table}}, hidden, cross_entropy, targets
    ).loss.sum()
    found = products(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(table, hidden).jaxpr)
    assert len(found) >= 3 and set(found) == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_table_gradients_are_scattered_in_the_compute_dtype(tie):
    """Over fsdp look-up and head each send their gradient once, a piece to each device, and never by an all-reduce."""
    program = step_on((1, 8, 1), tie_embeddings=tie)
    lowered = program.train.lower(program.abstract_state, jax.eval_shape(one_example_rows))
    whole = f"{VERY.vocab_size}x{VERY.hidden_size}"
    # The region of an operation ends with its type.
    scattered = re.findall(r"reduce_scatter.*?\}\) : \(tensor<([^>]*)>\)", lowered.as_text(), re.DOTALL)
    assert scattered == [f"{whole}xbf16"] * 2
    sums = [line for line in lowered.compile().as_text().splitlines() if " all-reduce(" in line]
    assert sums and not [line for line in sums if f"[{whole.replace('x', ',')}]" in line.split(" all-reduce(")[0]]
