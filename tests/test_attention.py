"""Every attention context and kernel against an einsum in float64 under masks written out here."""

import contextlib
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from forward import forward
from jax.extend.core import jaxprs_in_params

from refusion_jax.errors import UserError
from refusion_jax.model import attention, blockwise, cached_attention, flash
from refusion_jax.model.cache import KVCache
from refusion_jax.model.cached_attention import Cached
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import init_params, unstacked
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh


def reference_attention(q, k, v, mask):
    """[batch, length, heads, head_dim] under mask [batch, query, key]: keys repeated per query head, scores in full."""
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), where=mask[:, None])
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def in_float64(qkv, mask, g):
    """Output and gradients of the reference in float64."""
    with jax.enable_x64(True):
        q, k, v, g = (jnp.asarray(x, jnp.float64) for x in (*qkv, g))
        out, backward = jax.vjp(lambda q, k, v: reference_attention(q, k, v, mask), q, k, v)
        return jax.device_get([out, *backward(g)])


def causal_mask(segments):
    return (segments[:, :, None] == segments[:, None, :]) & np.tri(segments.shape[1], dtype=bool)


def packed(batch, length, heads, kv_heads, dim, seed=0):
    """Random q, k, v, rows of three ragged segments then padding, and an output gradient that ignores padding."""
    rng = np.random.default_rng(seed)
    q, k, v, g = (
        rng.normal(size=(batch, length, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for i, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            row[start:stop] = i + 1
    return (q, k, v), segments, g * (segments > 0)[..., None, None]


def outputs_and_gradients(attend, qkv, segments, g):
    """Of `attend(q, k, v, segments)`; outputs at padding, which mean nothing, are 0."""
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments), *qkv)
    return [out * (segments > 0)[..., None, None], *backward(jnp.asarray(g, out.dtype))]


def assert_close(found, expected, **tolerance):
    for what, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, err_msg=what, **tolerance)


# --- Contexts of training: what a token sees, written out here token by token.


def blocks_of(segments, size):
    """[batch, length] block of every token, counted from the start of its segment."""
    first = np.argmax(segments[:, :, None] == segments[:, None, :], axis=2)
    return ((np.arange(segments.shape[1]) - first) // size).astype(np.int32)


EXTRA = np.random.default_rng(5).random((1, 100, 100)) < 0.1
RULES = {  # of query i and key j in blocks b_i and b_j of one segment
    "causal": lambda i, j, b_i, b_j: j <= i,
    "all": lambda i, j, b_i, b_j: True,
    "block": lambda i, j, b_i, b_j: b_j <= b_i,
    "extra": lambda i, j, b_i, b_j: j <= i or EXTRA[0, i, j],
}


def context_of(rule, segments, blocks):
    length = segments.shape[1]
    blocks = jnp.asarray(blocks)
    return {
        "causal": lambda: attention.Packed(segments),
        "all": lambda: attention.Packed(segments, see="all"),
        "block": lambda: attention.Packed(segments, blocks, see="block"),
        "extra": lambda: attention.Packed(segments, extra=jnp.asarray(EXTRA[:, :length, :length])),
    }[rule]()


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [32, 100])  # one block of the computation, and several of which the last is ragged
def test_packed_rows_equal_the_reference(monkeypatch, rule, length, mesh):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    qkv, segments, g = packed(4, length, 4, 2, 8)
    blocks = blocks_of(segments, size=11)
    sees = np.vectorize(lambda i, j, b_i, b_j: RULES[rule](i, j, b_i, b_j))
    at = np.arange(length)
    mask = np.stack([sees(at[:, None], at[None, :], b[:, None], b[None, :]) for b in blocks])
    mask &= segments[:, :, None] == segments[:, None, :]
    attend = lambda q, k, v, s: context_of(rule, s, blocks).attend(q, k, v)[0]
    with sharding.use(make_mesh(*mesh), sharding.TRAIN_RULES) if mesh else contextlib.nullcontext():
        found = jax.jit(functools.partial(outputs_and_gradients, attend))(qkv, segments, g)
    expected = in_float64(qkv, mask, g)
    expected[0] = expected[0] * (segments > 0)[..., None, None]
    assert_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("see", ["causal", "all"])
def test_pairs_of_blocks_that_nobody_needs_are_skipped(monkeypatch, see):
    """Where a pair is computed, a value that is no number reaches every query of it, whatever its weight is."""
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    (q, k, v), _, _ = packed(1, 96, 2, 2, 8)
    segments = jnp.repeat(jnp.array([[1, 2]]), np.array([64, 32]), axis=1)
    v[:, :32] = np.nan
    out, _ = attention.Packed(segments, see=see, implementation="xla").attend(q, k, v)
    assert np.isnan(out[:, :64]).all() and np.isfinite(out[:, 64:]).all()


@pytest.mark.parametrize("length", [16, 60])
def test_two_streams_equal_their_rule(monkeypatch, length):
    """Noisy tokens see noisy ones of their block, clean ones of earlier blocks; clean tokens clean ones up to it."""
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    (q, k, v), segments, _ = packed(2, 2 * length, 4, 2, 8)
    segments = np.where(np.arange(length) < length // 3, 1, np.where(np.arange(length) < length - 3, 2, 0))
    segments = np.stack([segments, np.ones(length, int)]).astype(np.int32)
    blocks = blocks_of(segments, size=7)
    mask = np.zeros((2, 2 * length, 2 * length), bool)
    for row in range(2):
        for i in range(length):
            b, same = blocks[row, i], segments[row, i] == segments[row]
            mask[row, i, :length] = same & (blocks[row] == b)
            mask[row, i, length:] = same & (blocks[row] < b)
            mask[row, length + i, length:] = same & (blocks[row] <= b)
    g = np.random.default_rng(3).normal(size=q.shape).astype(np.float32)
    g *= (np.tile(segments, 2) > 0)[..., None, None]
    twice = np.tile(segments, 2)
    context = attention.TwoStream(*map(jnp.asarray, (twice, np.tile(blocks, 2), np.arange(2 * length) >= length)))
    context = context.replace(clean=jnp.broadcast_to(context.clean, twice.shape))
    attend = lambda q, k, v, s: context.attend(q, k, v)[0]
    found = jax.jit(functools.partial(outputs_and_gradients, attend))((q, k, v), twice, g)
    expected = in_float64((q, k, v), mask, g)
    expected[0] = expected[0] * (twice > 0)[..., None, None]
    assert_close(found, expected, atol=1e-5)


# --- Kernels.

KERNELS = {
    "splash": (True, (2, 384, 4, 2, 128)),
    "splash-all": (False, (2, 384, 4, 2, 128)),
    "splash-one-kv-head": (True, (1, 256, 3, 1, 128)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_splash_equals_the_reference(name):
    causal, shape = KERNELS[name]
    qkv, segments, g = packed(*shape)
    mask = causal_mask(segments) if causal else segments[:, :, None] == segments[:, None, :]
    expected = in_float64(qkv, mask, g)
    expected[0] = expected[0] * (segments > 0)[..., None, None]
    attend = functools.partial(flash.splash, causal=causal, interpret=True)
    assert_close(jax.jit(functools.partial(outputs_and_gradients, attend))(qkv, segments, g), expected, atol=1e-3)


@pytest.mark.gpu
def test_cudnn_equals_the_reference():
    qkv, segments, g = packed(2, 1024, 8, 2, 128)
    expected = in_float64(qkv, causal_mask(segments), g)
    expected[0] = expected[0] * (segments > 0)[..., None, None]
    found = outputs_and_gradients(flash.cudnn, tuple(x.astype(jnp.bfloat16) for x in qkv), segments, g)
    assert_close(found, expected, atol=0.03, rtol=0.03)


def test_cudnn_lowers_to_its_flash_kernels(monkeypatch):
    """Without a GPU: the dtype and shape rules hold and the forward and backward custom calls are emitted."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    qkv, segments, g = packed(2, 128, 8, 2, 128)
    arguments = tuple(x.astype(jnp.bfloat16) for x in qkv), segments, g
    text = (
        jax.jit(functools.partial(outputs_and_gradients, flash.cudnn))
        .trace(*arguments)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "fmhaScaleBiasSoftmax(" in text and "fmhaScaleBiasSoftmaxBackward(" in text


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_splash_on_a_mesh_equals_one_device(mesh):
    """Rows over data x fsdp and heads over tensor, each device on its own part."""
    qkv, segments, g = packed(8, 128, 4, 2, 128)
    attend = functools.partial(flash.per_device, functools.partial(flash.splash, interpret=True))
    expected = in_float64(qkv, causal_mask(segments), g)
    expected[0] = expected[0] * (segments > 0)[..., None, None]
    with sharding.use(make_mesh(*mesh), sharding.TRAIN_RULES):
        found = jax.jit(functools.partial(outputs_and_gradients, attend))(qkv, segments, g)
    assert_close(found, expected, atol=1e-3)


# --- Contexts of decoding.

CAPACITY, LAYERS, LENGTHS = 50, 2, np.array([0, 5, 16, 29])


def random_cache(rng, per_layer):
    """(cache, k, v): rows of ragged length, one of them empty, with old entries everywhere behind."""
    k, v = rng.normal(size=(2, LAYERS, 4, 2, CAPACITY, 8)).astype(np.float32)
    stored = (lambda x: tuple(jnp.asarray(layer) for layer in x)) if per_layer else jnp.asarray
    return KVCache(stored(k), stored(v), jnp.asarray(LENGTHS, jnp.int32)), k, v


def layer_of(x, layer):
    return np.asarray(x[layer])


@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per layer"])
@pytest.mark.parametrize("score_bytes", [1500, 2**28], ids=["in parts", "at once"])
@pytest.mark.parametrize("window", [1, 20])
def test_a_window_behind_a_cache_equals_the_reference(monkeypatch, window, score_bytes, per_layer):
    """It sees the committed entries and, in itself, what the mask says; old entries behind do not matter."""
    monkeypatch.setattr(cached_attention, "SCORE_BYTES", score_bytes)
    rng = np.random.default_rng(0)
    cache, k, v = random_cache(rng, per_layer)
    q = rng.normal(size=(4, window, 6, 8)).astype(np.float32)
    new_k, new_v = rng.normal(size=(2, 4, window, 2, 8)).astype(np.float32)
    mask = (rng.random((4, window, window)) < 0.5) | np.eye(window, dtype=bool)
    out, context = Cached.appended(cache, jnp.array(mask)).replace(layer=1).attend(q, new_k, new_v)
    for row, length in enumerate(LENGTHS):
        keys, values = (
            np.concatenate([old[1, row, :, :length].swapaxes(0, 1), new[row]])[None]
            for old, new in ((k, new_k), (v, new_v))
        )
        visible = np.concatenate([np.ones((window, length), bool), mask[row]], axis=1)[None]
        np.testing.assert_allclose(
            out[row : row + 1], reference_attention(q[row : row + 1], keys, values, visible), atol=1e-5
        )
        written = layer_of(context.cache.k, 1)[row, :, length : length + window]
        np.testing.assert_array_equal(written.swapaxes(0, 1), new_k[row])
    np.testing.assert_array_equal(layer_of(context.cache.k, 0), k[0])
    np.testing.assert_array_equal(context.cache.length, LENGTHS)
    assert context.layer == 2


@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per layer"])
@pytest.mark.parametrize("score_bytes", [1500, 2**28], ids=["in parts", "at once"])
def test_a_window_in_place_equals_the_reference(monkeypatch, score_bytes, per_layer):
    """Its keys stand at their positions before queries see the first `length` entries, stale ones included.

    Padding of the window, past the end of the cache, is written nowhere.
    """
    monkeypatch.setattr(cached_attention, "SCORE_BYTES", score_bytes)
    rng = np.random.default_rng(1)
    cache, k, v = random_cache(rng, per_layer)
    window = 6
    q = rng.normal(size=(4, window, 6, 8)).astype(np.float32)
    new_k, new_v = rng.normal(size=(2, 4, window, 2, 8)).astype(np.float32)
    positions = np.stack([rng.choice(CAPACITY, window, replace=False) for _ in range(4)])
    positions[:, 4:] = CAPACITY + np.arange(2)
    out, context = Cached.in_place(cache, jnp.asarray(positions)).replace(layer=1).attend(q, new_k, new_v)
    for row, length in enumerate(LENGTHS):
        stored = [x[1, row].swapaxes(0, 1).copy() for x in (k, v)]  # [entry, head, head_dim]
        for x, new in zip(stored, (new_k, new_v), strict=True):
            x[positions[row, :4]] = new[row, :4]
        visible = np.broadcast_to(np.arange(CAPACITY) < length, (1, window, CAPACITY))
        expected = reference_attention(q[row : row + 1], *(x[None] for x in stored), visible)
        if length:
            np.testing.assert_allclose(out[row : row + 1], expected, atol=1e-5)
        else:
            assert np.isfinite(out[row]).all(), "a query that sees nothing gets finite values"
        np.testing.assert_array_equal(layer_of(context.cache.v, 1)[row].swapaxes(0, 1), stored[1])
    np.testing.assert_array_equal(layer_of(context.cache.v, 0), v[0])


SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    tie_embeddings=True,
    attention="xla",
)


@pytest.fixture(scope="module")
def small_params():
    return jax.jit(lambda key: nn.unbox(init_params(SMALL, key)))(jax.random.key(0))


def loss_and_gradients(config: ModelConfig, params):
    """Of a packed batch through the whole model."""
    _, segments, _ = packed(2, 128, 1, 1, 2)
    tokens = jax.random.randint(jax.random.key(1), segments.shape, 0, 64)
    positions = jnp.broadcast_to(jnp.arange(128), segments.shape)
    weight = jax.random.normal(jax.random.key(2), (2, 128, 64)) * (segments > 0)[..., None]

    def loss(params):
        params = params if config.scan_layers else unstacked(params)
        return jnp.sum(weight * forward(config, params, tokens, positions, segments))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain(small_params):
    return loss_and_gradients(SMALL, small_params)


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "full"},
        {"remat": "minimal"},
        {"scan_layers": False},
        {"attention": "splash"},
        {"attention": "splash", "remat": "minimal"},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_how_the_model_is_computed(small_params, plain, change):
    found = loss_and_gradients(dataclasses.replace(SMALL, **change), small_params)
    chex.assert_trees_all_close(found, plain, atol=2e-3, rtol=1e-4)


def kernel_calls(jaxpr) -> int:
    """Pallas kernels in a jaxpr, those inside inner jaxprs included, and dead calls (without outputs) not."""
    live = [eqn for eqn in jaxpr.eqns if eqn.outvars]
    inner = (sub for eqn in live for sub in jaxprs_in_params(eqn.params))
    return sum(eqn.primitive.name == "pallas_call" for eqn in live) + sum(map(kernel_calls, inner))


def test_minimal_remat_does_not_run_the_kernel_again(small_params):
    """Full remat runs the forward kernel twice, minimal remat once, beside the two kernels of the backward pass."""
    counts = {}
    for remat in ("none", "minimal", "full"):
        config = dataclasses.replace(SMALL, remat=remat, attention="splash")
        tokens = jnp.ones((1, 128), jnp.int32)
        loss = lambda params, config=config: jnp.sum(forward(config, params, tokens, tokens))
        counts[remat] = kernel_calls(jax.make_jaxpr(jax.grad(loss))(small_params).jaxpr)
    assert counts == {"none": 3, "minimal": 3, "full": 4}


def test_auto_follows_the_device_and_the_shapes_and_says_so_once(capsys):
    flash.choose.cache_clear()
    cases = {
        ("tpu", "TPU v5p", 4096, 128, "bfloat16"): "splash",
        ("tpu", "TPU v5p", 4000, 128, "bfloat16"): "xla",
        ("tpu", "TPU v5p", 4096, 64, "float32"): "xla",
        ("gpu", "NVIDIA H100 80GB HBM3", 4096, 128, "bfloat16"): "cudnn",
        ("cuda", "NVIDIA A100-SXM4-80GB", 4096, 128, "bfloat16"): "cudnn",
        ("gpu", "NVIDIA H100 80GB HBM3", 4097, 128, "bfloat16"): "xla",
        ("gpu", "NVIDIA H100 80GB HBM3", 4096, 128, "float32"): "xla",
        ("gpu", "NVIDIA H100 80GB HBM3", 512, 128, "bfloat16"): "xla",
        ("gpu", "Tesla V100-SXM2-16GB", 4096, 128, "bfloat16"): "xla",
        ("rocm", "AMD Instinct MI300X", 4096, 128, "bfloat16"): "xla",
        ("gpu", "AMD Instinct MI300X", 4096, 128, "bfloat16"): "xla",
        ("cpu", "cpu", 4096, 128, "bfloat16"): "xla",
    }
    for (platform, kind, length, dim, dtype), expected in cases.items():
        for _ in range(2):
            assert flash.choose("auto", platform, kind, length, dim, dtype) == expected
        decoding = "cudnn" if kind.startswith("NVIDIA") and dtype == "bfloat16" else "xla"
        assert flash.choose_decoding("auto", platform, kind, dim, dtype) == decoding
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(cases)
    assert said[0] == "attention: splash (auto; TPU v5p, length 4096, head_dim 128, bfloat16)"


@pytest.mark.parametrize(
    "name, platform, length, dtype, words",
    [
        ("splash", "tpu", 1000, "bfloat16", "multiples of 128"),
        ("splash", "gpu", 1024, "bfloat16", "needs a TPU"),
        ("cudnn", "tpu", 1024, "bfloat16", "needs an NVIDIA GPU"),
        ("cudnn", "gpu", 1024, "float32", "needs an NVIDIA GPU, bfloat16"),
        ("cudnn", "gpu", 1025, "bfloat16", "an even length"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name, platform, length, dtype, words):
    with pytest.raises(UserError, match=words):
        flash.choose(name, platform, "NVIDIA H100 80GB HBM3", length, 128, dtype)
