"""The decoder against recorded logits of other code, and the properties that training and decoding stand on."""

import dataclasses
import functools
import json
import math
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from forward import forward, forward_window, logits
from oracle import numpy_qwen3

from refusion_jax.checkpoint import load
from refusion_jax.errors import UserError
from refusion_jax.model import layers
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig, from_huggingface, qwen3, to_huggingface
from refusion_jax.model.head import output_table
from refusion_jax.model.qwen3 import init_params, unstacked
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

TOLERANCE = 2e-4  # max abs difference of float32 logits
TINY = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)


@functools.cache
def read_model(folder):
    """(config, parameters) of a folder in Hugging Face layout."""
    config = dataclasses.replace(load.load_model_config(folder), attention="xla")
    return config, load.load_params(folder, config, make_mesh(1, devices=jax.devices()[:1]), sharding.DECODE_RULES)


@pytest.fixture(scope="module")
def params():
    """Random parameters of TINY, norm scales included: scales of 1 would hide a norm in the wrong place."""
    rng = np.random.default_rng(0)
    noisy = lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), jnp.float32)
    return jax.tree.map(noisy, jax.jit(lambda key: nn.unbox(init_params(TINY, key)))(jax.random.key(0)))


def random_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab_size, shape), jnp.int32)


def ascending(batch, length):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


# --- Other code's numbers.


@pytest.mark.parametrize("order", ["", "permuted_"])
@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
def test_logits_equal_the_reference(name, order, reference):
    config, params = read_model(reference / name / "model")
    data = np.load(reference / name / "logits.npz")
    hidden = forward(config, params, data["tokens"], data[f"{order}positions"])
    expected = data["logits_permuted" if order else "logits"]
    np.testing.assert_allclose(logits(config, params, hidden[:, data["rows"]]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
def test_logits_through_a_cache_filled_in_windows_equal_the_reference(name, reference):
    """640 tokens in permuted position order, 160 at a time, each window on top of the committed ones before."""
    config, params = read_model(reference / name / "model")
    data = np.load(reference / name / "logits.npz")
    cache, hidden = KVCache.empty(config, batch=2, cache_length=700), []
    for start in range(0, 640, 160):
        window = slice(start, start + 160)
        out, cache = forward_window(
            config, params, data["tokens"][:, window], data["permuted_positions"][:, window], cache
        )
        cache = cache.commit(jnp.full(2, 160))
        hidden.append(out)
    ours = logits(config, params, jnp.concatenate(hidden, axis=1)[:, data["rows"]])
    np.testing.assert_allclose(ours, data["logits_permuted"], rtol=0, atol=TOLERANCE)


def test_logits_of_corrupted_training_sequences_equal_the_reference(reference):
    config, params = read_model(reference / "tiny" / "model")
    data = np.load(reference / "tiny" / "losses.npz")
    names = [f"batch{i}" for i in range(8)]
    lengths = [data[f"{name}/logits_row0"].shape[0] for name in names]
    rows = lambda field: np.stack(
        [np.pad(data[f"{name}/{field}"][0], (0, max(lengths) - n)) for name, n in zip(names, lengths, strict=True)]
    )
    ours = logits(config, params, forward(config, params, rows("corrupted"), rows("positions"), rows("attention_mask")))
    for name, row in zip(names, ours, strict=True):
        real = data[f"{name}/attention_mask"][0].astype(bool)
        np.testing.assert_allclose(
            row[: len(real)][real], data[f"{name}/logits_row0"][real], rtol=0, atol=TOLERANCE, err_msg=name
        )


# --- What a token may see.


def test_a_token_influences_itself_and_later_ones_only(params):
    tokens = random_tokens(1, 24)
    changed = tokens.at[0, 10].set((tokens[0, 10] + 1) % TINY.vocab_size)
    before, after = (forward(TINY, params, t, ascending(1, 24)) for t in (tokens, changed))
    difference = np.abs(before - after).max(axis=-1)[0]
    assert (difference[:10] == 0).all() and (difference[10:] > 1e-4).all()


def test_causality_follows_the_buffer_and_rotation_the_positions(params):
    """The same tokens with other positions give other outputs; shifting all positions alike changes nothing."""
    tokens, permuted = random_tokens(1, 24), jnp.asarray(np.random.default_rng(1).permutation(24), jnp.int32)[None]
    natural, other, shifted = (forward(TINY, params, tokens, p) for p in (ascending(1, 24), permuted, permuted + 100))
    assert np.abs(natural - other).max() > 1e-2
    np.testing.assert_allclose(shifted, other, atol=1e-4)


def test_packed_segments_equal_separate_ones_and_padding_changes_nothing(params):
    lengths, total = (9, 14, 5), 40
    examples = [random_tokens(1, n, seed=n) for n in lengths]
    packed = lambda arrays, fill: jnp.concatenate(
        [*arrays, jnp.full((1, total - sum(lengths)), fill, jnp.int32)], axis=1
    )
    positions = packed([ascending(1, n) for n in lengths], 0)
    segments = packed([jnp.full((1, n), i + 1, jnp.int32) for i, n in enumerate(lengths)], 0)
    hidden, repadded = (forward(TINY, params, packed(examples, fill), positions, segments) for fill in (0, 7))
    assert np.isfinite(hidden).all()
    start = 0
    for tokens, n in zip(examples, lengths, strict=True):
        alone = forward(TINY, params, tokens, ascending(1, n))
        np.testing.assert_allclose(hidden[:, start : start + n], alone, atol=1e-5)
        start += n
    np.testing.assert_array_equal(hidden[:, :start], repadded[:, :start])


# --- The cache.


def committed(params, tokens, lengths, cache_length):
    """A cache that holds the first lengths[b] of tokens[b]."""
    cache = KVCache.empty(TINY, len(tokens), cache_length)
    _, cache = forward_window(TINY, params, tokens, ascending(*tokens.shape), cache)
    return cache.commit(jnp.asarray(lengths, jnp.int32))


def test_rows_of_a_cache_may_differ_in_length(params):
    tokens, window = random_tokens(2, 12), random_tokens(2, 5, seed=3)
    cache = committed(params, tokens, (12, 4), cache_length=20)
    positions = jnp.arange(5, dtype=jnp.int32) + jnp.array([[12], [4]])
    hidden, _ = forward_window(TINY, params, window, positions, cache)
    for row, n in enumerate((12, 4)):
        whole = jnp.concatenate([tokens[row, :n], window[row]])[None]
        np.testing.assert_allclose(hidden[row], forward(TINY, params, whole, ascending(1, n + 5))[0, n:], atol=1e-5)


def test_uncommitted_entries_are_never_seen(params):
    """A window that is forwarded and not committed leaves no trace in what comes after."""
    tokens, window = random_tokens(1, 8), random_tokens(1, 6, seed=5)
    cache = committed(params, tokens, (8,), cache_length=20)
    at = ascending(1, 6) + 8
    _, dirty = forward_window(TINY, params, random_tokens(1, 6, seed=6), at, cache)
    expected, actual = (forward_window(TINY, params, window[:, :3], at[:, :3], c)[0] for c in (cache, dirty))
    np.testing.assert_array_equal(actual, expected)


def test_window_mask_separates_slots(params):
    """Two slots in one window that do not see each other equal two windows of their own."""
    tokens, slots = random_tokens(1, 8), random_tokens(1, 8, seed=2)
    cache = committed(params, tokens, (8,), cache_length=24)
    positions = jnp.asarray([[16, 17, 18, 19, 8, 9, 10, 11]], jnp.int32)
    mask = jnp.asarray(np.kron(np.eye(2), np.tri(4)).astype(bool))[None]
    together, _ = forward_window(TINY, params, slots, positions, cache, mask)
    for part in (slice(0, 4), slice(4, 8)):
        alone, _ = forward_window(TINY, params, slots[:, part], positions[:, part], cache)
        np.testing.assert_allclose(together[:, part], alone, atol=1e-5)
    causal, _ = forward_window(TINY, params, slots, positions, cache)
    assert np.abs(causal[:, 4:] - together[:, 4:]).max() > 1e-3


def test_writes_past_the_end_of_the_cache_are_dropped(params):
    tokens, window = random_tokens(2, 12), random_tokens(2, 6, seed=4)
    cache = committed(params, tokens, (9, 2), cache_length=12)
    positions = ascending(2, 6) + cache.length[:, None]
    hidden, after = forward_window(TINY, params, window, positions, cache)
    for before, now in ((cache.k, after.k), (cache.v, after.v)):
        np.testing.assert_array_equal(now[:, 0, :, :9], before[:, 0, :, :9])
        np.testing.assert_array_equal(now[:, 1, :, :2], before[:, 1, :, :2])
        assert (np.abs(now[:, 0, :, 9:] - before[:, 0, :, 9:]).max(axis=(0, 1, 3)) > 0).all()
    np.testing.assert_array_equal(after.length, cache.length)
    roomy, _ = forward_window(TINY, params, window, positions, committed(params, tokens, (9, 2), cache_length=20))
    np.testing.assert_allclose(hidden[0, :3], roomy[0, :3], atol=1e-6)  # those that fitted
    np.testing.assert_allclose(hidden[1], roomy[1], atol=1e-6)


# --- How it is computed changes nothing.


@functools.cache
def gradients_of(change=()):
    """Value and gradients of a random functional of the hidden states, under `change`d settings."""
    config = dataclasses.replace(TINY, **dict(change))
    weights = jax.random.normal(jax.random.key(2), (2, 16, TINY.hidden_size))

    @jax.jit
    def gradients(key):
        params = nn.unbox(init_params(config, key))

        def functional(params):
            params = params if config.scan_layers else unstacked(params)
            return jnp.sum(weights * forward(config, params, random_tokens(2, 16), ascending(2, 16)))

        return jax.value_and_grad(functional)(params)

    return gradients(jax.random.key(3))


@pytest.mark.parametrize("change", [(("scan_layers", False),), (("remat", "minimal"),), (("remat", "full"),)], ids=str)
def test_unrolled_and_rematerialised_gradients_equal_the_plain_ones(change):
    (value, expected), (changed, actual) = gradients_of(), gradients_of(change)
    np.testing.assert_allclose(changed, value, rtol=1e-5)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_about_the_same(params):
    tokens, positions = random_tokens(2, 32), ascending(2, 32)
    exact = forward(TINY, params, tokens, positions)
    half = forward(dataclasses.replace(TINY, dtype="bfloat16"), params, tokens, positions)
    assert half.dtype == jnp.bfloat16
    error = jnp.linalg.norm(half.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.03  # not float32 in disguise, and not wrong


def test_logits_of_padding_rows_are_never_chosen(params):
    config = dataclasses.replace(TINY, logical_vocab_size=43)
    scores = logits(config, params, jnp.ones((1, 2, TINY.hidden_size)))[0]
    assert scores.dtype == jnp.float32 and np.isneginf(scores[:, 43:]).all() and np.isfinite(scores[:, :43]).all()
    np.testing.assert_allclose(jax.nn.softmax(scores)[:, :43].sum(axis=-1), 1, rtol=1e-6)


def test_rotary_embeddings_at_32000_positions_equal_float64():
    """Angles reach 32767 radians: bfloat16, or positions as float16, would turn them anywhere."""
    positions = jnp.array([[0, 1, 4095, 16384, 32767]])
    cos, sin = layers.rotary_angles(positions, head_dim=128, theta=1e6)
    angle = np.asarray(positions, np.float64)[..., None, None] * 1e6 ** (-np.arange(0, 128, 2) / 128)
    for ours, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, atol=4e-3)  # float32 holds 32767 radians to 2e-3
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 128)), jnp.float32)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    expected = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )
    np.testing.assert_allclose(layers.rotate(x, (cos, sin)), expected, atol=0.02)


@pytest.mark.parametrize(
    "theta, trained, lengths, factors",
    [
        (5e5, 4096, (4096, 8192, 16384, 24576, 32768), (1, 4, 14, 31, 55)),  # LLaDA 8B
        (5e5, 8192, (16384, 32768), (4, 13)),  # Llama 3 8B
        (1e6, 2048, (4096,), (5,)),  # Dream 7B
    ],
)
def test_factors_of_the_rotary_base_are_the_published_ones(theta, trained, lengths, factors):
    """Those of LongLLaDA's experiments; and each is the least with which what did not turn before does not turn now."""
    large = dataclasses.replace(TINY, head_dim=128, rope_theta=theta, original_max_position_embeddings=trained)
    found = [dataclasses.replace(large, max_position_embeddings=length).rope_factor for length in lengths]
    assert found == list(factors)
    period = lambda base: 2 * np.pi * base ** (np.arange(0, 128, 2) / 128)
    turned = np.sum(period(theta) <= trained)
    for length in lengths:
        assert next(k for k in range(1, 100) if period(k * theta)[turned] >= length) == factors[lengths.index(length)]


def test_a_model_for_longer_texts_is_the_one_with_a_larger_base(params):
    tokens, positions = random_tokens(1, 12), ascending(1, 12) * 20
    trained = dataclasses.replace(TINY, rope_theta=100.0, max_position_embeddings=64)
    same = dataclasses.replace(trained, original_max_position_embeddings=64)
    scaled = dataclasses.replace(same, max_position_embeddings=256)
    # Three of the four pairs of a head, of periods 6, 20, 63 and 199, turn in 64 tokens; twice the base gives 334.
    assert scaled.rope_factor == 2
    expected = numpy_qwen3(params, rope_theta=200.0)(tokens[0], positions[0], np.tri(12, dtype=bool))
    found = jax.nn.softmax(logits(scaled, params, forward(scaled, params, tokens, positions))[0])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    chex.assert_trees_all_equal(*(forward(config, params, tokens, positions) for config in (trained, same)))
    exported = from_huggingface(to_huggingface(scaled))  # Hugging Face has one base, the one in use
    assert (exported.rope_base, exported.max_position_embeddings) == (scaled.rope_base, 256)


# --- Parameters and sizes.

CHANGES_TREE = {
    "vocab_size": 52,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "tie_embeddings": False,
    "quantise": "int8",
}
CHANGES_LOGITS = {
    "logical_vocab_size": 49,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 2048,
    "rms_norm_eps": 1e-2,
    "dtype": "bfloat16",
}
CHANGES_NEITHER = {
    "max_position_embeddings": 64,
    "mask_token_id": 1,
    "begin_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 4,
    "attention": "xla",
    "remat": "full",
    "scan_layers": False,
}


def test_every_field_of_a_model_has_an_effect_or_none_on_purpose(params):
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == {*CHANGES_TREE, *CHANGES_LOGITS, *CHANGES_NEITHER}

    def shapes(config):
        return jax.tree.map(lambda x: x.shape, nn.unbox(sharding.abstract_params(config)))

    for name, value in CHANGES_TREE.items():
        assert shapes(dataclasses.replace(TINY, **{name: value})) != shapes(TINY), name
    tokens, positions = random_tokens(1, 12), ascending(1, 12)
    logits_of = lambda config, params: np.asarray(logits(config, params, forward(config, params, tokens, positions)))
    plain = logits_of(TINY, params)
    for name, value in CHANGES_LOGITS.items():
        changed = logits_of(dataclasses.replace(TINY, **{name: value}), params)
        assert np.abs(np.nan_to_num(changed - plain)).max() > 1e-4, name
    unchanged = dataclasses.replace(TINY, **CHANGES_NEITHER)
    assert shapes(unchanged) == shapes(TINY)
    np.testing.assert_allclose(logits_of(unchanged, unstacked(params)), plain, atol=1e-5)


def test_parameter_names_and_shapes_are_the_checkpoint_format():
    def listed(config):
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(sharding.abstract_params(config)))
        assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    tied = {
        "embed/embedding": (50, 32),
        "final_norm/scale": (32,),
        "layers/attention/key": (2, 32, 2, 8),
        "layers/attention/key_norm": (2, 8),
        "layers/attention/output": (2, 4, 8, 32),
        "layers/attention/query": (2, 32, 4, 8),
        "layers/attention/query_norm": (2, 8),
        "layers/attention/value": (2, 32, 2, 8),
        "layers/attention_norm/scale": (2, 32),
        "layers/mlp/down": (2, 64, 32),
        "layers/mlp/gate": (2, 32, 64),
        "layers/mlp/up": (2, 32, 64),
        "layers/mlp_norm/scale": (2, 32),
    }
    assert listed(TINY) == tied
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    assert listed(untied) == {**tied, "head/embedding": (50, 32)}
    assert listed(dataclasses.replace(untied, scan_layers=False)) == listed(untied)


def test_the_head_is_the_embedding_only_when_tied(params):
    assert output_table(params) is params["embed"]["embedding"]
    untied = nn.unbox(sharding.abstract_params(dataclasses.replace(TINY, tie_embeddings=False)))
    assert output_table(untied) is untied["head"]["embedding"]


@pytest.mark.parametrize(
    "size, count",
    [
        ("0.6b", 596_049_920),
        ("1.7b", 1_720_574_976),
        ("4b", 4_022_468_096),
        ("8b", 8_190_735_360),
        ("14b", 14_768_307_200),
        ("32b", 32_762_123_264),
    ],
)
def test_presets_have_the_published_parameter_counts(size, count):
    config = qwen3(size)
    assert config.num_params() == count
    assert sum(p.size for p in jax.tree.leaves(nn.unbox(sharding.abstract_params(config)))) == count
    assert (config.mask_token_id, config.begin_token_id, config.logical_vocab_size, config.vocab_size) == (
        151670,
        151669,
        151671,
        151936,
    )


@pytest.mark.parametrize(
    "place",
    [{"rope_theta": 5e6}, {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}],
    ids=["top", "nested"],
)
def test_rope_theta_is_read_from_both_places(place, reference, tmp_path):
    fields = json.loads((reference / "qwen3_untied" / "model" / "config.json").read_text())
    del fields["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(fields | place))
    config = from_huggingface(tmp_path / "config.json")
    assert config.rope_theta == 5e6
    assert from_huggingface(to_huggingface(config)) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),  # its base depends on the text's length
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": "yarn"}, "yarn"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": "320"}, r"vocab_size is '320' \(str\); expected int"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings is 'false' \(str\); expected bool"),
        ({"rope_theta": "abc"}, r"rope_theta is 'abc' \(str\); expected float"),
        ({"rope_theta": math.inf}, "model.rope_theta is inf"),
        ({"rms_norm_eps": None}, "lacks the setting rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "model.rms_norm_eps is nan"),
        ({"eos_token_id": "x"}, r"eos_token_id is 'x' \(str\); expected int"),
        ({"eos_token_id": ["x"]}, r"eos_token_id is 'x' \(str\); expected int"),
        ({"num_key_value_heads": 4}, "num_kv_heads = 4"),
        ({"mask_token_id": 768}, "mask_token_id = 768"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_foreign_configs_are_refused_by_field(change, message, reference):
    fields = json.loads((reference / "qwen3_untied" / "model" / "config.json").read_text()) | change
    with pytest.raises(UserError, match=message):
        from_huggingface(fields)
    with pytest.raises(UserError, match=message):  # what is null may as well not be there
        from_huggingface({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": None, "use_sliding_window": None, "sliding_window": 8},
        {"rope_theta": 5000000},
        {"eos_token_id": []},
    ],
    ids=str,
)
def test_the_same_config_may_be_written_otherwise(change, reference):
    fields = json.loads((reference / "qwen3_untied" / "model" / "config.json").read_text())
    assert from_huggingface(fields | change) == from_huggingface(fields)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"model_type":\n nonsense', r"config.json is not valid JSON \(line 2"),
        (b'["qwen3"]', "config.json holds a JSON list, not an object"),
        (b'{"model_type": "\xff"}', "config.json is not valid JSON .*codec"),
    ],
    ids=["malformed", "list", "bytes"],
)
def test_unreadable_config_files_are_named(content, message, repository, tmp_path):
    """By what makes a model of them, and by the tool that looks into any folder."""
    with pytest.raises(UserError, match="absent.json"):
        from_huggingface(tmp_path / "absent.json")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        from_huggingface(tmp_path / "config.json")
    tool = runpy.run_path(str(repository / "tools" / "inspect_checkpoint.py"))
    with pytest.raises(UserError, match=message):
        tool["inspect_huggingface"](tmp_path, whole_config=False)


def test_sizes_that_are_not_published_are_named():
    with pytest.raises(UserError, match="'9b'.*0.6b"):
        qwen3("9b")


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3},
        {"head_dim": 7},
        {"num_layers": 0},
        {"hidden_size": -1},
        {"logical_vocab_size": 51},
        {"rope_theta": 1.0},
        {"rope_theta": math.nan},
        {"rms_norm_eps": math.inf},
        {"original_max_position_embeddings": 40961},
        {"original_max_position_embeddings": -1},
        {"original_max_position_embeddings": 6},  # no angle turns in that
        {"max_position_embeddings": 10**9, "original_max_position_embeddings": 7},
        {"dtype": "float16"},
        {"attention": "flash"},
        {"remat": "some"},
        {"mask_token_id": 50},
        {"eos_token_id": -1},
    ],
    ids=str,
)
def test_impossible_models_are_refused_by_field(change):
    field = next(iter(change))
    with pytest.raises(UserError, match=rf"model\.{field}"):
        dataclasses.replace(TINY, **change)
