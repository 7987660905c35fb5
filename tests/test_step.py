"""The training step: the same whatever the mesh and the accumulation, and what its optimizer and its program do."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from refusion_jax import keys
from refusion_jax import step as steps_lib
from refusion_jax.config import Config, DataConfig, LoraConfig, OptimizerConfig
from refusion_jax.errors import UserError
from refusion_jax.metrics import flops
from refusion_jax.model import head
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import init_params, unstacked
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.common import PackedBatch, token_losses
from refusion_jax.objective.methods import METHODS
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=88,
    logical_vocab_size=83,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    mask_token_id=80,
    attention="xla",
)
ROWS, LENGTH = 16, 48
CONFIG = Config(
    model=MODEL,
    data=DataConfig(max_length=LENGTH),
    objective=Refusion(slot_sizes=(4, 8), ar_weight=0.3, mdm_weight=0.7),
    # With Adam's own eps, rounding of a gradient that is nearly 0 becomes a part of a whole update.
    optimizer=OptimizerConfig(lr=1e-2, schedule="constant", clip_norm=1e9, eps=1e-6),
    batch_size=ROWS,
)


def uneven_batch(seed=0, rows=ROWS, length=LENGTH):
    """Row r holds up to 1 + r // 3 examples, row 0 none: devices and microbatches differ much in numbers of targets."""
    rng = np.random.default_rng(seed)
    lengths, prompts = np.zeros((rows, 6), np.int32), np.zeros((rows, 6), np.int32)
    for r in range(1, rows):
        for e in range(1 + r // 3):
            prompt, response = rng.integers(1, 4), rng.integers(1, 14)
            if lengths[r].sum() + prompt + response > length:
                break
            lengths[r, e], prompts[r, e] = prompt + response, prompt
    ids = rng.integers(0, 2**32, (rows, 6), dtype=np.uint32)
    return PackedBatch(rng.integers(0, 80, (rows, length)).astype(np.int32), prompts, lengths, ids)


def whole_rows(rows):
    """Rows of one example that fills them."""
    lengths, prompts = np.full((rows, 1), LENGTH, np.int32), np.full((rows, 1), 4, np.int32)
    tokens = np.random.default_rng(0).integers(0, 80, (rows, LENGTH)).astype(np.int32)
    return PackedBatch(tokens, prompts, lengths, np.arange(rows, dtype=np.uint32)[:, None])


def mesh_of(*shape):
    return make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


@functools.cache
def program_of(shape=(1, 1, 1), **changes):
    return steps_lib.build(dataclasses.replace(CONFIG, **changes), mesh_of(*shape), 3)


@functools.cache
def run(shape=(1, 1, 1), **changes):
    """Three steps on a mesh.

    Returns:
      Parameters before; Adam's first moments after one step (a tenth of the gradient); parameters after; metrics.
    """
    program = program_of(shape, **changes)
    state = program.init(jax.random.key(1))
    before, moments, metrics = jax.device_get(state.params), None, []
    for step in range(3):
        state, values = program.train(state, uneven_batch(step))
        moments = moments or jax.device_get(optax.tree.get(state.opt_state, "mu"))
        metrics.append({name: float(x) for name, x in values.items()})
    return before, moments, jax.device_get(state.params), metrics


@pytest.mark.parametrize("method", ["llada", "bd3", "sedd"])
def test_adapters_in_bfloat16_learn_every_kind_of_objective(method):
    """They start at the loss of their base in float32, and leave the base as it is."""
    objective, batch = METHODS[method], uneven_batch()
    program = program_of(
        objective=objective, lora=LoraConfig(rank=2), model=dataclasses.replace(MODEL, dtype="bfloat16")
    )
    base = nn.unbox(init_params(MODEL, jax.random.key(1)))
    frozen = jax.tree.map(lambda x, like: x.astype(like.dtype), base, program.abstract_state.frozen)
    state, losses = program.init(jax.random.key(2)).replace(frozen=frozen), []
    for _ in range(3):  # the same examples under the same corruption
        state, metrics = program.train(state, batch)
        assert np.isfinite(list(metrics.values())).all()
        losses.append(float(metrics["loss"]))

    @jax.jit
    def loss(params):
        inputs = objective.corrupt(keys.domain_key(CONFIG.seed, "corruption"), batch, MODEL, 0)
        found = token_losses(MODEL, objective, {"params": params}, inputs).loss
        return sum(term.scale * term.numerator(found) / term.denominator for term in inputs.terms.values())

    np.testing.assert_allclose(losses[0], loss(base), rtol=1e-2)
    assert losses[2] < losses[1] < losses[0]
    chex.assert_trees_all_equal(state.frozen, jax.tree.map(lambda x: x.astype(LoraConfig().base_dtype), base))


# --- One answer on any mesh.

SPLITS = {
    "2x2x2": ((2, 2, 2), {}),
    "2x1x1, accumulation 4": ((2, 1, 1), {"accumulation": 4}),
    "autoregressive, 2x2x2, accumulation 2": ((2, 2, 2), {"accumulation": 2, "objective": Autoregressive()}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_mesh_and_accumulation_change_nothing(split):
    shape, changes = SPLITS[split]
    whole = {"objective": changes["objective"]} if "objective" in changes else {}
    start, gradient, end, expected = run(**whole)
    split_start, split_gradient, split_end, actual = run(shape, **changes)
    chex.assert_trees_all_equal(split_start, start)  # the same random parameters
    chex.assert_trees_all_close(split_gradient, gradient, rtol=1e-4, atol=1e-7)
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.keys() == e.keys()
        for name in e:
            np.testing.assert_allclose(
                a[name], e[name], rtol=1e-5 if name != "grad_norm" else 1e-4, err_msg=f"step {step} {name}"
            )
    # Adam divides small gradients by themselves, so parameters are compared to the size of an update, 1e-2 here.
    chex.assert_trees_all_close(split_end, end, atol=2e-4)


@pytest.mark.parametrize("method", ["refusion", "autoregressive", "llada", "d3pm", "sedd", "bd3", "dllm"])
def test_work_is_counted_as_it_is_done(method):
    """The tokens and the visible pairs that an objective makes of a batch; and XLA's operations for whole rows."""
    objective = METHODS[method]
    batch = uneven_batch(rows=8)
    work = jax.tree.map(np.sum, objective.work(batch.lengths.astype(np.float32)))
    corrupt = jax.jit(lambda batch: objective.corrupt(jax.random.key(0), batch, MODEL, 0))
    inputs = corrupt(batch)
    real, everywhere = inputs.context.segment_ids > 0, np.arange(inputs.tokens.shape[1])
    seen = inputs.context.visible(everywhere, everywhere) & real[:, :, None] & real[:, None]
    assert work == (real.sum(), real[:, : inputs.targets.shape[1]].sum(), seen.sum())

    batch = whole_rows(2)
    model = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=512, head_dim=64, scan_layers=False)
    inputs = jax.eval_shape(corrupt, batch)
    params = jax.eval_shape(lambda key: unstacked(nn.unbox(init_params(model, key))), jax.random.key(0))

    def loss(params, inputs):
        losses = token_losses(model, objective, {"params": params}, inputs)
        return sum(term.numerator(losses.loss) for term in inputs.terms.values())

    counted = jax.jit(jax.grad(loss)).lower(params, inputs).cost_analysis()["flops"]
    work = jax.tree.map(np.sum, objective.work(batch.lengths.astype(np.float32)))
    work = work._replace(token_pairs=inputs.tokens.shape[0] * inputs.tokens.shape[1] ** 2)  # masked ones too
    expected = flops.train_flops(model, work) + flops.recomputed_flops(model, work)
    np.testing.assert_allclose(counted, expected, rtol=0.01)


def test_metrics_are_those_of_the_batch():
    batch, (before, _, after, metrics) = uneven_batch(), run()
    first = metrics[0]
    assert first["tokens"] == batch.lengths.sum() and first["examples"] == (batch.lengths > 0).sum()
    pairs = (batch.lengths.astype(float) * (batch.lengths + 1) / 2).sum()
    needed = flops.train_flops(MODEL, flops.Work(first["tokens"], first["tokens"], pairs))
    np.testing.assert_allclose(first["flops"], needed, rtol=1e-6)
    assert 0 < first["ar_tokens"] and 0 < first["mdm_tokens"]
    assert first["ar_tokens"] + first["mdm_tokens"] < (batch.lengths - batch.prompt_lengths).sum()
    np.testing.assert_allclose(first["ar_loss"], np.log(83), rtol=0.1)  # random parameters know nothing
    np.testing.assert_allclose(metrics[-1]["param_norm"], optax.tree.norm(after), rtol=1e-5)
    assert metrics[0]["param_norm"] != pytest.approx(float(optax.tree.norm(before)), rel=1e-6)


def test_terms_are_weighted():
    """0.3 L_AR + 0.7 L_MDM is what CONFIG asks for."""
    for values in run()[3]:
        np.testing.assert_allclose(values["loss"], 0.3 * values["ar_loss"] + 0.7 * values["mdm_loss"], rtol=1e-5)


def test_terms_without_targets_are_zero_and_gradients_finite():
    """No example at all; responses of one token, so no autoregressive targets; examples that happen to get no mask."""
    program, batch = program_of(), uneven_batch()
    empty = batch.replace(lengths=np.zeros_like(batch.lengths), prompt_lengths=np.zeros_like(batch.lengths))
    one_token = batch.replace(lengths=np.where(batch.lengths > 0, batch.prompt_lengths + 1, 0).astype(np.int32))
    one_each = lambda length: np.tile(np.where(np.arange(6) == 0, length, 0).astype(np.int32), (ROWS, 1))
    single = batch.replace(lengths=one_each(9), prompt_lengths=one_each(2))
    key = keys.domain_key(CONFIG.seed, "corruption")
    inputs = jax.jit(lambda batch: CONFIG.objective.corrupt(key, batch, MODEL, 0))(single)
    clean = (np.asarray(inputs.terms["mdm"].weights) == 0).all(axis=1, keepdims=True)
    no_mask = single.replace(lengths=single.lengths * clean, prompt_lengths=single.prompt_lengths * clean)
    assert 0 < clean.sum() < ROWS
    for nothing, absent in ((empty, {"ar", "mdm"}), (one_token, {"ar"}), (no_mask, {"mdm"})):
        state = program.init(jax.random.key(1))
        before = jax.device_get(state.params)
        state, values = program.train(state, nothing)
        for name in ("ar", "mdm"):
            assert (values[f"{name}_tokens"] == 0) == (values[f"{name}_loss"] == 0) == (name in absent)
        assert np.isfinite(values["grad_norm"]) and (values["grad_norm"] == 0) == (len(absent) == 2)
        if len(absent) == 2:
            chex.assert_trees_all_equal(jax.device_get(state.params), before)


def test_evaluation_sums_give_the_loss_of_the_whole_batch():
    """Corruption differs from training's and is the same every time; parts of a batch add up to it."""
    program = program_of()
    params, batch = program.init(jax.random.key(1)).params, uneven_batch()
    whole, again = (jax.device_get(program.evaluate(params, {}, batch)) for _ in range(2))
    chex.assert_trees_all_equal(whole, again)
    front = (np.arange(ROWS) < ROWS // 2)[:, None].astype(np.uint8)
    halves = [
        jax.device_get(program.evaluate(params, {}, jax.tree.map(lambda x: x * keep, batch)))
        for keep in (front, 1 - front)
    ]
    chex.assert_trees_all_close(jax.tree.map(np.add, *halves), whole, rtol=1e-5)
    assert 0 < whole["mdm"]["tokens"] and 0 <= whole["mdm"]["correct"] <= whole["mdm"]["tokens"]


def test_microbatches_share_what_is_the_same_for_all_rows():
    """Rows are dealt out with all that belongs to them; scalars and arrays with a first axis of 1 go to each whole."""
    inputs = CONFIG.objective.corrupt(jax.random.key(0), uneven_batch(), MODEL, 0)
    extra = jax.random.bernoulli(jax.random.key(1), shape=(1, LENGTH, LENGTH))
    inputs = inputs.replace(context=inputs.context.replace(extra=extra))
    micros = jax.tree.map(lambda x: steps_lib._microbatches(x, 4), inputs)
    assert sorted(map(tuple, micros.tokens.reshape(ROWS, LENGTH).tolist())) == sorted(
        map(tuple, inputs.tokens.tolist())
    )
    for i in range(4):
        micro = jax.tree.map(lambda x: x[i], micros)
        rows = [np.flatnonzero((inputs.tokens == tokens).all(axis=1))[0] for tokens in micro.tokens]
        chex.assert_trees_all_equal(micro.context.segment_ids, inputs.context.segment_ids[np.array(rows)])
        chex.assert_trees_all_equal(micro.context.extra, extra)
        assert micro.terms["ar"].denominator == inputs.terms["ar"].denominator


def test_no_two_purposes_share_a_random_key():
    """The root of a purpose is no other's, nor that of a training example (which is folded into its root)."""
    seeds, domains = range(4), ("init", "lora", "corruption", "evaluation")
    roots = [keys.domain_key(seed, domain) for seed in seeds for domain in domains]
    examples = [jax.random.fold_in(keys.domain_key(seed, "corruption"), i) for seed in seeds for i in range(4)]
    plain = [jax.random.fold_in(jax.random.key(seed), i) for seed in seeds for i in range(4)]
    words = {tuple(jax.random.key_data(key).tolist()) for key in (*roots, *examples, *plain)}
    assert len(words) == len(roots) + len(examples) + len(plain)


# --- The program.


def widest(program_text, vocab):
    """Elements of the largest array with a vocabulary axis in an HLO program's text."""
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", program_text)]
    return max(int(np.prod(shape)) for shape in shapes if vocab in shape)


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    """The largest array with the vocabulary's size, which nothing else has, is a chunk of logits; memory follows it."""
    rows, length, vocab, chunk = 4, 96, 1013, 8

    def compiled(chunk):
        monkeypatch.setattr(head, "LOGIT_BYTES", 4 * vocab * rows * chunk)
        model = dataclasses.replace(MODEL, vocab_size=vocab, logical_vocab_size=vocab, num_layers=1)
        config = dataclasses.replace(CONFIG, model=model, batch_size=rows)
        program = steps_lib.build(config, mesh_of(1, 1, 1), 3)
        return program.train.lower(
            program.abstract_state, jax.eval_shape(lambda: uneven_batch(rows=rows, length=length))
        ).compile()

    chunked, whole = compiled(chunk), compiled(length)
    assert widest(whole.as_text(), vocab) >= rows * length * vocab  # so it would be seen
    assert widest(chunked.as_text(), vocab) <= vocab * max(rows * chunk, MODEL.hidden_size)
    saved = whole.memory_analysis().temp_size_in_bytes - chunked.memory_analysis().temp_size_in_bytes
    assert saved > 4 * vocab * (rows * length - 2 * rows * chunk)


def test_state_is_donated():
    """The old state's memory is taken over by the new one."""
    program = program_of((2, 2, 2))
    state = program.init(jax.random.key(1))
    after, _ = program.train(state, uneven_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, program.abstract_state)


def test_optimizer_state_is_sharded_like_the_parameters():
    program = program_of((2, 2, 2))
    state = program.init(jax.random.key(1))
    query = state.params["layers"]["attention"]["query"]  # [L, D, N, H]: D over fsdp, N over tensor
    assert query.sharding.shard_shape(query.shape) == (2, 16, 2, 8)
    same_shape = [x for x in jax.tree.leaves(state.opt_state) if x.shape == query.shape]
    assert same_shape and all(x.sharding == query.sharding for x in same_shape)


# --- The optimizer.


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("cosine", 0, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("cosine", 20, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
        ("constant", 0, {0: 1.0, 50: 1.0, 100: 1.0}),
        ("constant", 20, {0: 0.0, 10: 0.5, 20: 1.0, 100: 1.0}),
    ],
)
def test_learning_rate(schedule, warmup, expected):
    rate = steps_lib.learning_rate(OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=warmup), 100)
    assert {step: float(rate(step)) / 2.0 for step in expected} == pytest.approx(expected, abs=1e-6)


def optimizer_step(config, params, grads):
    optimizer = steps_lib.make_optimizer(config, 100)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


NORMS = {
    "final_norm/scale",
    "layers/attention/key_norm",
    "layers/attention/query_norm",
    "layers/attention_norm/scale",
    "layers/mlp_norm/scale",
}


def named(params):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.fixture(scope="module")
def untied_params():
    model = dataclasses.replace(MODEL, tie_embeddings=False)
    return jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))


def test_weight_decay_spares_the_norms_and_nothing_else(untied_params):
    config = OptimizerConfig(lr=0.1, schedule="constant", weight_decay=0.5)
    before = named(untied_params)
    after = named(optimizer_step(config, untied_params, jax.tree.map(jnp.zeros_like, untied_params)))
    assert NORMS < before.keys() and len(before) == len(NORMS) + 9
    chex.assert_trees_all_equal({n: after[n] for n in NORMS}, {n: before[n] for n in NORMS})
    decayed = before.keys() - NORMS
    chex.assert_trees_all_close(
        {n: after[n] for n in decayed}, {n: before[n] * (1 - 0.1 * 0.5) for n in decayed}, rtol=1e-6
    )


def test_all_but_the_norms_are_computed_with_in_the_compute_dtype(untied_params):
    found = named(steps_lib.compute_params(untied_params, "bfloat16"))
    assert {name for name, x in found.items() if x.dtype == jnp.float32} == NORMS
    assert {x.dtype.name for x in found.values()} == {"float32", "bfloat16"}


def test_update_n_uses_the_schedule_of_n_minus_1():
    """Adam's step under a gradient that stays the same is the learning rate: here 0, then a quarter more each time."""
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="constant", clip_norm=1e9)
    optimizer = steps_lib.make_optimizer(config, 100)
    params, steps = {"w": jnp.zeros(())}, []
    state = optimizer.init(params)
    for _ in range(6):
        updates, state = optimizer.update({"w": jnp.float32(3.0)}, state, params)
        steps.append(-float(updates["w"]))
    np.testing.assert_allclose(steps, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    """With eps as large as the gradient an Adam step shows the gradient's size: lr g / (|g| + eps)."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}  # norm 5
    config = OptimizerConfig(lr=1.0, schedule="constant", eps=1.0, clip_norm=1.0)
    after = optimizer_step(config, params, grads)
    np.testing.assert_allclose(after["a"][0], -0.6 / 1.6, rtol=1e-5)
    np.testing.assert_allclose(after["b"][1], -0.8 / 1.8, rtol=1e-5)
    small = optimizer_step(config, params, jax.tree.map(lambda g: g / 10, grads))  # below the bound: as it is
    np.testing.assert_allclose(small["a"][0], -0.3 / 1.3, rtol=1e-5)


# --- Impossible programs.


@pytest.mark.parametrize(
    "shape, change, message",
    [
        ((1, 1, 8), {}, "tensor = 8 does not divide model.num_heads = 4"),
        ((1, 1, 4), {}, "tensor = 4 does not divide model.num_kv_heads = 2"),
        ((1, 3, 1), {"batch_size": 3}, "fsdp = 3 does not divide model.hidden_size = 32"),
        ((8, 1, 1), {"batch_size": 12}, "batch_size = 12 .* multiple of 8"),
        ((2, 2, 1), {"accumulation": 8}, "microbatches of 2 rows.* multiple of 32"),
        ((1, 1, 1), {"model": dataclasses.replace(MODEL, mask_token_id=None)}, "mask_token_id"),
    ],
    ids=str,
)
def test_programs_that_do_not_fit_are_refused(shape, change, message):
    with pytest.raises(UserError, match=message):
        steps_lib.build(dataclasses.replace(CONFIG, **change), mesh_of(*shape), 3)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 1, 1), "does not fit 8 devices"),
        ((-1, 3, 1), "does not fit 8 devices"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 8), "positive"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*shape)
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
