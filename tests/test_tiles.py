"""Matrices in tiles, as one CPU decodes with them: the same products, the same answers, and nothing is copied."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, expected, oracle_forward, random_params, random_prompts

from refusion_jax.model import tiles
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import AutoregressiveConfig, PlanAndInfillConfig, generate
from refusion_jax.sampling import programs as programs_lib
from refusion_jax.sampling.config import Settings

is_tiles = lambda x: isinstance(x, tiles.Tiles)
CONFIG = PlanAndInfillConfig(gen_length=16, slot_size=4, blocks=2, slot_threshold=0.4, token_threshold=0.1)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Where tiles pay with every JAX."""
    monkeypatch.setattr(tiles.os, "cpu_count", lambda: 2)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 columns, two of them in an array: the tiny model has several arrays of each matrix."""
    monkeypatch.setattr(tiles, "COLUMNS", 4)
    monkeypatch.setattr(tiles, "TILES", 2)


@pytest.mark.parametrize(("shape", "inputs"), [((96, 2560), 1), ((96, 3, 128), 1), ((3, 32, 192), 2)])
@pytest.mark.parametrize("tokens", [1, 2, 7, tiles.MOST_TOKENS])
def test_product_equals_that_of_the_matrix(shape, inputs, tokens):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in (shape, (tokens, 96)))
    tiled = tiles.Tiles.of(jnp.asarray(w), inputs)
    assert all(len(a) <= tiles.TILES and a.shape[1:] == (96, 64) for a in tiled.arrays)
    exact = (x.astype(np.float64) @ w.reshape(96, -1)).reshape(tokens, *shape[inputs:])
    np.testing.assert_allclose(tiled.product(x), exact, atol=2e-4)
    half = jnp.asarray(x, jnp.bfloat16)
    assert tiled.product(half).dtype == jnp.bfloat16 and tiled.product(half, jnp.float32).dtype == jnp.float32


def test_columns_that_make_no_whole_tiles_stay_a_matrix():
    w = jnp.ones((8, 100))
    assert tiles.Tiles.of(w) is w
    params = {"embed": {"embedding": jnp.ones((100, 64))}, "layer_0": {"mlp": {"gate": w, "down": jnp.ones((100, 64))}}}
    found = tiles.tiled(params)
    assert "head" not in found and found["layer_0"]["mlp"]["gate"] is w
    assert isinstance(found["layer_0"]["mlp"]["down"], tiles.Tiles)


@pytest.mark.parametrize("tied", [True, False])
def test_answers_are_the_oracles(small_tiles, tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    params, prompts = random_params(3, 1.2), random_prompts(5, 6)
    reference = oracle_forward(params)
    if not tied:
        params["head"] = {"embedding": params["embed"]["embedding"]}
    held = programs_lib.decode_params(params)["tiles"]
    assert len(held["layer_0"]["mlp"]["gate"].arrays) == 4 and len(held["head"]["embedding"].arrays) == 2
    for answer in generate(params, model, CONFIG, prompts, batch_size=2):
        assert answer.tokens == expected(reference, prompts[answer.index], CONFIG).tokens


def test_bfloat16_logits_are_not_rounded(small_tiles):
    """As without tiles: what the vocabulary is reduced over is float32 whatever the weights are."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(3, 1.2))
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    plain = programs_lib.over_vocabulary
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, MODEL.hidden_size)), jnp.bfloat16)
    logits = [plain(model, held, hidden, lambda x: x) for held in (params, tiles.tiled(programs_lib.unstacked(params)))]
    assert logits[1].dtype == jnp.float32
    np.testing.assert_allclose(*logits, rtol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, AutoregressiveConfig(gen_length=8)], ids=lambda c: c.method)
def test_the_loop_reads_tiles_where_they_lie(config):
    """No instruction of the compiled loop makes another array as large as one of tiles, and tokens come first in every
    product, as the kernels for few of them want it.
    """
    model = dataclasses.replace(
        MODEL, hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=4, head_dim=32, vocab_size=512
    )
    params = programs_lib.decode_params(random_params(0, 1.0, model))
    sizes = {a.size for x in jax.tree.leaves(params["tiles"], is_leaf=is_tiles) if is_tiles(x) for a in x.arrays}
    sampler = programs_lib.make_sampler(programs_lib.decode_model(model), config, 1)
    state = jax.eval_shape(lambda: programs_lib.empty(sampler, Settings.of(config, 1), 1, 128))
    program = programs_lib.programs(sampler, None).run.lower(params, state, np.int32(1), np.int32(1)).compile()
    made = [
        (name, tuple(map(int, shape.split(","))))
        for shape, name in re.findall(r"= f32\[([0-9,]+)\]\S* ([\w-]+)\(", program.as_text())
        if name not in ("parameter", "get-tuple-element")
    ]
    assert max(np.prod(shape) for _, shape in made) < min(sizes)
    products = [shape[1:] for name, shape in made if name == "dot" and 64 in shape[1:]]
    assert products and {shape[1] for shape in products} == {64}


def test_forwards_of_many_tokens_take_the_matrices_themselves(monkeypatch):
    """Of a loop with forwards on both sides of the limit, those above it multiply as without tiles."""
    model = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=256, num_layers=1)
    params = programs_lib.decode_params(random_params(0, 1.0, model))

    def tokens(most):
        monkeypatch.setattr(tiles, "MOST_TOKENS", most)
        seen = set()
        monkeypatch.setattr(tiles.Tiles, "product", recorded(seen, tiles.Tiles.product))
        sampler = programs_lib.make_sampler(programs_lib.decode_model(model), CONFIG, 3)
        state = programs_lib.empty(sampler, Settings.of(CONFIG, 1), 3, 128)
        jax.eval_shape(lambda: programs_lib.forward(sampler, params, state))
        return seen

    assert tokens(18) == {12} and tokens(24) == {12, 24} and tokens(11) == set()


def recorded(seen, product):
    def record(self, x, *options):
        seen.add(len(x))
        return product(self, x, *options)

    return record


def test_a_second_copy_is_made_where_it_pays(monkeypatch):
    """On one CPU, in float32, and where memory has room for it."""
    params = random_params(0, 1.0)
    assert "tiles" in programs_lib.decode_params(params)
    assert "tiles" not in programs_lib.decode_params(params, make_mesh(tensor=2))
    assert "tiles" not in programs_lib.decode_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    monkeypatch.setattr(tiles, "MEMORY", 0)
    assert "tiles" not in programs_lib.decode_params(params)
