"""Adapters: what they add, what they train, what is kept of them, and what becomes of them on export."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from forward import logits as full_logits
from micro import get_config, read_checkpoint, write_examples

from refusion_jax import lora, train
from refusion_jax.checkpoint import convert, load, metadata, orbax, stream
from refusion_jax.config import LoraConfig, from_config_dict
from refusion_jax.errors import UserError
from refusion_jax.model import layers
from refusion_jax.model.attention import Packed
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

MODEL = from_config_dict(get_config()).model
ALL = LoraConfig(rank=3, alpha=6.0, base_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 262, (2, 24), np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))


@pytest.fixture(scope="module")
def base():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray((1 if a.ndim == 2 else 0) + 0.2 * rng.standard_normal(a.shape), jnp.float32)
    return jax.tree.map(draw, nn.unbox(sharding.abstract_params(MODEL)))


def trained(adapters):
    """Adapters as after some training: no part is zero."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)])


@jax.jit
def logits(params, adapters=None):
    variables = {"params": params} if adapters is None else {"params": params, "lora": adapters}
    hidden, _ = Qwen3(MODEL).apply(variables, TOKENS, POSITIONS, Packed(np.ones_like(TOKENS)))
    return full_logits(MODEL, params, hidden)


@pytest.mark.parametrize("targets", [ALL.targets, ("query", "output", "down")], ids=lambda t: "+".join(t))
def test_merged_equals_unmerged(base, targets):
    settings = dataclasses.replace(ALL, targets=targets)
    fresh = lora.init(jax.random.key(1), MODEL, settings)
    np.testing.assert_allclose(logits(base, lora.scaled(fresh, settings)), logits(base), atol=1e-5)
    adapters = trained(fresh)
    apart = logits(base, lora.scaled(adapters, settings))
    together = logits(lora.merge(base, adapters, settings))
    np.testing.assert_allclose(together[..., :262], apart[..., :262], atol=2e-5)
    assert np.abs(apart - logits(base))[..., :262].max() > 0.01


def test_only_the_targets_are_changed_by_merging(base):
    settings = dataclasses.replace(ALL, targets=("value", "up"))
    merged = lora.merge(base, trained(lora.init(jax.random.key(1), MODEL, settings)), settings)
    same = jax.tree_util.tree_map_with_path(lambda path, a, b: (path[-1].key, bool((a == b).all())), base, merged)
    changed = {name for name, equal in jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple)) if not equal}
    assert changed == {"value", "up"}


def test_small_updates_count_in_bfloat16():
    """An update below the resolution of bfloat16 weights still has its effect: it is not added to the weights."""
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(1024)
    x = jnp.asarray(direction + 0.1 * rng.standard_normal((32, 1024)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((1024, 64)) / 32, jnp.bfloat16)
    adapter = {
        "a": jnp.asarray(direction[:, None] / 1024, jnp.float32),
        "b": jnp.asarray(rng.choice([-0.05, 0.05], (1, 64)), jnp.float32),
    }
    assert np.mean((w + (adapter["a"] @ adapter["b"]).astype(w.dtype)) == w) > 0.5  # most of the sum is rounded away

    class Projection(nn.Module):
        config: object = MODEL

        @nn.compact
        def __call__(self, x):
            return layers.projected(self, "up", x, x @ layers.weight(self, "up", ("embed", "mlp"), (1024, 64), 1024))

    apply = lambda **variables: Projection().apply({"params": {"up": w}, **variables}, x).astype(jnp.float32)
    np.testing.assert_allclose((apply(lora={"up": adapter}) - apply()).mean(0), adapter["b"][0], rtol=0.1)


def test_adapters_lie_on_the_mesh_like_their_projections():
    mesh = make_mesh(2, 2, 2)
    places = lora.shardings(MODEL, ALL, mesh)
    shapes = jax.eval_shape(lambda key: lora.init(key, MODEL, ALL), jax.random.key(0))
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    up, output = places["layers"]["mlp"]["up"], places["layers"]["attention"]["output"]
    assert tuple(up["a"].spec) == (None, "fsdp", None) and tuple(up["b"].spec) == (None, None, "tensor")
    assert tuple(output["a"].spec) == (None, "tensor", None, None) and tuple(output["b"].spec) == (None, None, "fsdp")


def write(folder, step, params):
    """Makes `params` a step of a checkpoint folder."""
    streams = {
        path: stream.Stream(p.shape, p.dtype, lambda start, stop, p=np.asarray(p): p[start:stop])
        for path, p in traverse_util.flatten_dict(params, sep="/").items()
    }
    stream.save(folder / "checkpoints" / str(step), streams, metadata.make_meta(MODEL, step=step, tokenizer="bytes"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """A run with adapters on a converted base: (folder, its config, base folder)."""
    folder = tmp_path_factory.mktemp("lora")
    write_examples(folder / "data.json")
    write(folder / "base", 0, base)
    settings = get_config(f"data={folder / 'data.json'},steps=6")
    settings.init_from = str(folder / "base")
    settings.lora = dict(rank=3, alpha=6.0, targets=("query", "value", "output", "down"), base_dtype="bfloat16")
    settings.optimizer.lr = 0.03
    config = from_config_dict(settings)
    train.train(config, folder / "run")
    return folder / "run", config, folder / "base"


def place(tree):
    return load.load_params(tree, MODEL, make_mesh(1, 4, 2), sharding.TRAIN_RULES)


def test_checkpoint_holds_adapters_only(run):
    folder, config, _ = run
    abstract = jax.eval_shape(lambda key: lora.init(key, MODEL, config.lora), jax.random.key(0))
    adapters = orbax.restore_adapters(
        folder, MODEL, config.lora, make_mesh(1, 4, 2)
    )  # raises if there is anything else
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, abstract)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapters))  # b was zero
    stored = sum(p.stat().st_size for p in (folder / "checkpoints" / "6").rglob("*") if p.is_file())
    values = sum(x.size for x in jax.tree.leaves(abstract))
    assert 3 * values < MODEL.num_params() and stored < 4 * (3 * values) + 100_000


def test_run_with_adapters_loads_as_its_base_with_them_merged(run):
    """Loading, and exporting for PyTorch, give base (as rounded for training) + alpha / rank a b."""
    folder, config, base = run
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), place(base))
    adapters = orbax.restore_adapters(folder, MODEL, config.lora, make_mesh(1, 4, 2))
    merged = lora.merge(rounded, adapters, config.lora)
    loaded = place(folder)
    chex.assert_trees_all_close(loaded, merged, atol=1e-6)
    np.testing.assert_allclose(
        logits(loaded)[..., :262], logits(rounded, lora.scaled(adapters, config.lora))[..., :262], atol=2e-5
    )

    convert.to_huggingface(folder, folder.parent / "exported", say=lambda line: None)
    exported = place(folder.parent / "exported")
    touched = jax.tree_util.tree_map_with_path(lambda path, p: path[-1].key in config.lora.targets, merged)
    jax.tree.map(
        lambda a, b, was: np.testing.assert_allclose(a, b, atol=1e-6) if was else None, exported, merged, touched
    )


# --- The base: the step and the weights that the adapters were trained on, or none.


@pytest.fixture
def moved(run, tmp_path):
    """Copies of (run, config, base) that a test may change; the run's checkpoint names the copied base."""
    folder, config, base = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    rewrite(tmp_path / "run", lambda meta: meta["base"].update(source=str(tmp_path / "base")))
    return tmp_path / "run", dataclasses.replace(config, init_from=str(tmp_path / "base")), tmp_path / "base"


def rewrite(folder, change, step=6):
    """Changes the metadata of a checkpoint."""
    file = folder / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


def test_training_the_base_on_changes_nothing_of_its_adapters(moved, base, tmp_path):
    """Not what is loaded or exported, nor a run that goes on."""
    folder, config, base_folder = moved
    shutil.copytree(folder, tmp_path / "before")
    loaded = jax.device_get(place(folder))
    convert.to_huggingface(folder, tmp_path / "exported", say=lambda line: None)
    train.train(dataclasses.replace(config, steps=7), tmp_path / "before")

    write(base_folder, 1, jax.tree.map(lambda p: p + 1, base))
    assert orbax.read_meta(folder)["base"]["step"] == 0
    chex.assert_trees_all_equal(jax.device_get(place(folder)), loaded)
    convert.to_huggingface(folder, tmp_path / "exported again", say=lambda line: None)
    chex.assert_trees_all_equal(*(jax.device_get(place(tmp_path / name)) for name in ("exported", "exported again")))
    train.train(dataclasses.replace(config, steps=7), folder)
    chex.assert_trees_all_equal(read_checkpoint(folder, 7), read_checkpoint(tmp_path / "before", 7))


def test_a_base_that_is_gone_or_has_changed_is_refused(moved, base, tmp_path):
    folder, config, base_folder = moved
    uses = {
        "load": lambda: place(folder),
        "export": lambda: convert.to_huggingface(folder, tmp_path / "exported", say=lambda line: None),
        "resume": lambda: train.train(dataclasses.replace(config, steps=7), folder),
    }
    write(base_folder, 1, base)
    shutil.rmtree(base_folder / "checkpoints" / "0")
    for use in uses.values():
        with pytest.raises(UserError, match="trained on step 0 of .*no checkpoint of step 0 in .*; there are 1"):
            use()
    changed = jax.tree.map(lambda p: p, base)
    changed["final_norm"]["scale"] = base["final_norm"]["scale"] + 1e-3
    write(base_folder, 0, changed)
    for use in uses.values():
        with pytest.raises(UserError, match="trained on step 0 of .* Its weights are others now. Put the base"):
            use()
    shutil.rmtree(base_folder)
    for use in uses.values():
        with pytest.raises(UserError, match="There is no folder .*base"):
            use()
    assert not (tmp_path / "exported").exists() and orbax.steps_in(folder)[-1] == 6


def test_a_base_may_be_converted_again_or_exported(moved, base, tmp_path):
    """The values count, not the files that they are in."""
    folder, config, base_folder = moved
    loaded = jax.device_get(place(folder))
    convert.to_huggingface(base_folder, tmp_path / "exported", say=lambda line: None)
    shutil.rmtree(base_folder)
    write(base_folder, 0, base)
    chex.assert_trees_all_equal(jax.device_get(place(folder)), loaded)
    rewrite(folder, lambda meta: meta["base"].update(source=str(tmp_path / "exported")))
    chex.assert_trees_all_equal(jax.device_get(place(folder)), loaded)


def test_adapters_from_before_the_base_was_written_down(moved, base, capfd):
    folder, config, base_folder = moved
    loaded = jax.device_get(place(folder))
    rewrite(folder, lambda meta: (meta.pop("base"), meta["config"].update(init_from=str(base_folder))))
    chex.assert_trees_all_equal(jax.device_get(place(folder)), loaded)
    assert "the adapters do not say on which weights" in capfd.readouterr().err


def test_adapters_that_lead_back_to_themselves(moved, tmp_path):
    folder, _, _ = moved
    other = shutil.copytree(folder, tmp_path / "other")
    for here, there in ((folder, other), (other, folder)):
        rewrite(here, lambda meta: (meta.pop("base"), meta["config"].update(init_from=str(there))))
    uses = (place, lambda source: convert.to_huggingface(source, tmp_path / "exported", say=lambda line: None))
    for use in uses:
        with pytest.raises(UserError, match="in a circle, .*run/checkpoints/6 -> .*other/.* -> .*run/checkpoints/6"):
            use(folder)


def test_resumed_run_has_the_same_frozen_base_bit_for_bit(run):
    """The base is an argument of the step and comes out of it unchanged, on a mesh, after several steps."""
    from refusion_jax import step
    from refusion_jax.data import pipeline
    from refusion_jax.data.tokenizers import load_tokenizer

    folder, config, base = run
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2))
    mesh = make_mesh(2, 2, 2)
    program = step.build(config, mesh, 6)
    frozen = load.load_params(base, MODEL, mesh, sharding.TRAIN_RULES, "bfloat16")
    before = jax.tree.map(np.asarray, frozen)
    state = program.init(jax.random.key(0)).replace(frozen=frozen)
    assert {leaf.size for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu"))} <= {
        leaf.size for leaf in jax.tree.leaves(state.params)
    }
    rows = pipeline.load_rows(
        config.data.train,
        load_tokenizer("bytes"),
        max_length=64,
        max_examples_per_row=0,
        seed=0,
        cache_dir=folder.parent / "cache",
    )
    batches = pipeline.batches(rows, batch_size=8, local_rows=np.arange(8), start_row=0)
    for _ in range(3):
        state, _ = program.train(state, train.to_devices(next(batches), program.batch_sharding, 8))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint16), b.view(np.uint16)),
        state.frozen,
        before,
    )


def test_adapters_need_a_base(tmp_path):
    write_examples(tmp_path / "data.json")
    settings = get_config(f"data={tmp_path / 'data.json'}")
    settings.lora = dict(rank=2)
    with pytest.raises(UserError, match="init_from is empty: adapters need a base"):
        train.train(from_config_dict(settings), tmp_path / "run")


def test_bad_settings():
    with pytest.raises(UserError, match="lora.rank is -1"):
        LoraConfig(rank=-1)
    with pytest.raises(UserError, match="lora.targets.*choose from query"):
        LoraConfig(rank=2, targets=("attention",))
