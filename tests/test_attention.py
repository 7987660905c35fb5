"""Every attention implementation against a float32 einsum written out here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from refusion_jax.errors import UserError
from refusion_jax.model import attention, flash
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import Qwen3, init_params
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh


def reference_attention(q, k, v, segment_ids):
    """[batch, length, heads, head_dim]: keys repeated per query head, scores in full, float32."""
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tril(np.ones((length, length), bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)), v)


def packed(batch, length, heads, kv_heads, dim, seed=0):
    """Random q, k, v, rows of three segments of ragged lengths then padding, and an output gradient that ignores padding."""
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
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments), *qkv)
    return [out * (segments > 0)[..., None, None], *backward(jnp.asarray(g, out.dtype))]


IMPLEMENTATIONS = {
    "xla": (attention.segment_attention, (2, 1100, 4, 2, 16)),  # more than one chunk of queries, the last one ragged
    "xla-short": (attention.segment_attention, (2, 37, 6, 2, 8)),
    "splash": (functools.partial(flash.splash, interpret=True), (2, 384, 4, 2, 128)),
    "splash-one-kv-head": (functools.partial(flash.splash, interpret=True), (1, 256, 3, 1, 128)),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_and_gradients_equal_the_reference(name):
    attend, shape = IMPLEMENTATIONS[name]
    qkv, segments, g = packed(*shape)
    expected = jax.jit(functools.partial(outputs_and_gradients, reference_attention))(qkv, segments, g)
    found = jax.jit(functools.partial(outputs_and_gradients, attend))(qkv, segments, g)
    for what, a, b in zip(("output", "dq", "dk", "dv"), expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3 if name.startswith("splash") else 1e-5, err_msg=what)


@pytest.mark.gpu
def test_cudnn_equals_the_reference():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    qkv, segments, g = packed(2, 1024, 8, 2, 128)
    expected = outputs_and_gradients(reference_attention, qkv, segments, g)
    found = outputs_and_gradients(flash.cudnn, tuple(x.astype(jnp.bfloat16) for x in qkv), segments, g)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.asarray(b, np.float32), a, atol=0.03, rtol=0.03)


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
    expected = outputs_and_gradients(reference_attention, qkv, segments, g)
    with sharding.use(make_mesh(*mesh), sharding.TRAIN_RULES):
        found = jax.jit(functools.partial(outputs_and_gradients, attend))(qkv, segments, g)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3)


@pytest.mark.parametrize("chunk", [7, 16, 64])
@pytest.mark.parametrize("window", [1, 20])
def test_attention_on_a_cache_equals_the_reference(monkeypatch, window, chunk):
    """Rows of ragged length, an empty one among them, in a cache of several chunks or one; old entries do not matter."""
    monkeypatch.setattr(attention, "KEY_CHUNK", chunk)
    rng = np.random.default_rng(0)
    lengths, capacity, layers = [0, 5, 16, 29], 50, 2
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    k, v = draw(2, layers, 4, 2, capacity, 8)
    q, new_k, new_v = draw(4, window, 6, 8), *draw(2, 4, window, 2, 8)
    mask = (rng.random((4, window, window)) < 0.5) | np.eye(window, dtype=bool)
    context = attention.CachedAttention.start(
        KVCache(*map(jnp.array, (k, v, lengths))), jnp.array(mask), window
    ).replace(layer=jnp.int32(1))
    out, context = context.attend(q, new_k, new_v)
    for row, length in enumerate(lengths):
        keys, values = (
            np.concatenate([old[1, row, :, :length].swapaxes(0, 1), new[row]])[None]
            for old, new in ((k, new_k), (v, new_v))
        )
        visible = np.concatenate([np.ones((window, length), bool), mask[row]], axis=1)
        keys, values = (np.repeat(x, 3, axis=2) for x in (keys, values))  # each for three query heads
        scores = jnp.einsum("btnh,bsnh->bnts", q[row : row + 1], keys) / np.sqrt(8)
        expected = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), values)
        np.testing.assert_allclose(out[row : row + 1], expected, atol=1e-5)
        np.testing.assert_array_equal(context.k[1, row, :, length : length + window].swapaxes(0, 1), new_k[row])
    np.testing.assert_array_equal(context.k[0], k[0])


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
        return jnp.sum(weight * Qwen3(config).apply({"params": params}, tokens, positions, segments))

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
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-3, rtol=1e-4), plain, found)


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
        loss = lambda p, config=config: jnp.sum(Qwen3(config).apply({"params": p}, tokens, tokens))
        counts[remat] = kernel_calls(jax.make_jaxpr(jax.grad(loss))(small_params).jaxpr)
    assert counts == {"none": 3, "minimal": 3, "full": 4}


def test_auto_follows_the_device_and_the_shapes_and_says_so_once(capsys):
    flash.choose.cache_clear()
    cases = {
        ("tpu", 4096, 128, "bfloat16"): "splash",
        ("tpu", 4000, 128, "bfloat16"): "xla",
        ("tpu", 4096, 64, "float32"): "xla",
        ("gpu", 4096, 128, "bfloat16"): "cudnn",
        ("cuda", 4096, 128, "bfloat16"): "cudnn",
        ("gpu", 4096, 128, "float32"): "xla",
        ("gpu", 512, 128, "bfloat16"): "xla",
        ("cpu", 4096, 128, "bfloat16"): "xla",
    }
    for (platform, length, dim, dtype), expected in cases.items():
        for _ in range(2):
            assert flash.choose("auto", platform, "some chip", length, dim, dtype) == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(cases)
    assert said[0] == "attention: splash (auto; some chip, length 4096, head_dim 128, bfloat16)"


@pytest.mark.parametrize(
    "name, platform, length, dtype, words",
    [
        ("splash", "tpu", 1000, "bfloat16", "multiples of 128"),
        ("splash", "gpu", 1024, "bfloat16", "needs a TPU"),
        ("cudnn", "tpu", 1024, "bfloat16", "needs an NVIDIA GPU"),
        ("cudnn", "gpu", 1024, "float32", "needs bfloat16"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name, platform, length, dtype, words):
    with pytest.raises(UserError, match=words):
        flash.choose(name, platform, "some chip", length, 128, dtype)
