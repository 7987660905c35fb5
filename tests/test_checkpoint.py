"""Checkpoints: the same bits on any mesh, whole or not at all, and never those of another model."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import shutil
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from refusion_jax import step as steps_lib
from refusion_jax.checkpoint import load, metadata, orbax, stream
from refusion_jax.config import Config, DataConfig, LoraConfig
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=88,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    tie_embeddings=False,
    mask_token_id=80,
)
ON = {"4x2": (1, 4, 2), "2x4": (1, 2, 4), "1": (1, 1, 1)}


@functools.cache
def program(mesh):
    shape = ON[mesh]
    return steps_lib.build(
        Config(model=MODEL, data=DataConfig()), make_mesh(*shape, devices=jax.devices()[: np.prod(shape)]), 10
    )


def random_state(mesh, step):
    """A train state with something in every array, different for every step."""
    rng = np.random.default_rng(step)
    draw = lambda a: jax.device_put((100 * rng.normal(size=a.shape)).astype(a.dtype), a.sharding)
    return jax.tree.map(draw, program(mesh).abstract_state).replace(
        step=jax.device_put(jnp.int32(step), program(mesh).abstract_state.step.sharding)
    )


def meta(step, model=MODEL, config=None):
    return metadata.make_meta(model, step=step, tokenizer="bytes", config=config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 3 and 5, written on 4x2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = orbax.Checkpoints(folder, keep_last=3)
    for step in (3, 5):
        checkpoints.save(random_state("4x2", step), step * 16, meta(step))
    checkpoints.close()
    return folder


@pytest.mark.parametrize("mesh", ON)
def test_restored_on_any_mesh_bit_for_bit(mesh, saved):
    abstract = program(mesh).abstract_state
    state, next_row = orbax.Checkpoints(saved).restore(abstract, meta(0))
    chex.assert_trees_all_equal(state, random_state("4x2", 5))
    assert next_row == 80 and int(state.step) == 5
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)


def test_parameters_alone_in_another_type_from_a_given_step(saved):
    mesh = make_mesh(1, 2, 4)
    params = orbax.restore_params(saved, MODEL, mesh, sharding.DECODE_RULES, dtype="bfloat16", step=3)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_state("4x2", 3).params)
    chex.assert_trees_all_equal(params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == sharding.param_shardings(MODEL, mesh, sharding.DECODE_RULES)
    kept = orbax.restore_params(saved, MODEL, mesh, sharding.TRAIN_RULES)
    chex.assert_trees_all_equal(kept, random_state("4x2", 5).params)


def test_metadata_says_what_it_is(saved):
    assert orbax.steps_in(saved) == [3, 5]
    found = orbax.read_meta(saved)
    assert ModelConfig(**found["model"]) == MODEL
    assert (found["step"], found["tokenizer"], found["format"]) == (5, "bytes", metadata.FORMAT)
    assert found["versions"]["jax"] == jax.__version__
    assert orbax.read_meta(saved, 3)["step"] == 3


def test_last_and_best_are_kept(tmp_path):
    checkpoints = orbax.Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0, None], start=1):
        checkpoints.save(random_state("1", step), step, meta(step), loss)
    checkpoints.close()
    assert orbax.steps_in(tmp_path) == [2, 5, 6]
    reopened = orbax.Checkpoints(tmp_path, keep_last=2, keep_best=1)  # the best is still known
    reopened.save(random_state("1", 7), 7, meta(7), 1.5)
    reopened.close()
    assert orbax.steps_in(tmp_path) == [2, 6, 7]


# --- Interrupted writes.


def test_leftovers_of_a_killed_run_are_neither_seen_nor_kept(saved, tmp_path):
    """A save cut off before its end, and an old checkpoint cut off while it was being deleted."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    unfinished = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1234"
    shutil.copytree(tmp_path / "checkpoints" / "5", unfinished)
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "params")
    assert orbax.steps_in(tmp_path) == [5]
    checkpoints = orbax.Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest_step() == 5
    state, _ = checkpoints.restore(program("1").abstract_state, meta(0))
    chex.assert_trees_all_equal(state, random_state("4x2", 5))
    checkpoints.save(random_state("1", 7), 7, meta(7))
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk that is full as soon as a file grows past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for_writers(folder):
    """Returns when nothing has been written below a folder for a second."""
    listing = lambda: sorted((str(path), path.lstat().st_size) for path in folder.rglob("*") if path.exists())
    before = None
    while before != (before := listing()):
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of threads that were writing
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays_whole(tmp_path):
    checkpoints = orbax.Checkpoints(tmp_path)
    checkpoints.save(random_state("1", 1), 1, meta(1))
    checkpoints.close()
    checkpoints = orbax.Checkpoints(tmp_path)
    with (
        pytest.raises(
            UserError, match="could not be written.*The last complete checkpoint is step 1. Make room"
        ) as error,
        files_of_at_most(20_000),
    ):
        checkpoints.save(random_state("1", 2), 2, meta(2))
        checkpoints.close()
    assert "\n" not in str(error.value)
    assert orbax.steps_in(tmp_path) == [1]
    wait_for_writers(tmp_path)  # of the save that failed: in a run they end with the process
    again = orbax.Checkpoints(tmp_path)  # there is room again
    state, next_row = again.restore(program("1").abstract_state, meta(0))
    chex.assert_trees_all_equal(state, random_state("1", 1))
    assert next_row == 1
    again.save(random_state("1", 2), 2, meta(2))
    again.close()
    assert orbax.steps_in(tmp_path) == [1, 2]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write checkpoints to .*file/run: Not a directory"):
        orbax.Checkpoints(tmp_path / "file" / "run")


# --- Other people's checkpoints.


def test_damaged_checkpoints_are_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    path = orbax.checkpoint_path(folder)
    checkpoints = orbax.Checkpoints(folder)
    for file in pathlib.Path(path, "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for read in (
        lambda: orbax.restore_params(folder, MODEL, make_mesh(), sharding.DECODE_RULES),
        lambda: checkpoints.restore(program("1").abstract_state, meta(0)),
    ):
        with pytest.raises(UserError, match=f"The checkpoint {path}.* cannot be read: .*use another step"):
            read()
    shutil.rmtree(path / "params")
    with pytest.raises(UserError, match=f"The checkpoint {path} cannot be read"):
        checkpoints.restore(program("1").abstract_state, meta(0))
    shutil.rmtree(path / "optimizer")
    with pytest.raises(UserError, match="holds weights alone.*Give them as config.init_from"):
        checkpoints.restore(program("1").abstract_state, meta(0))
    checkpoints.close()


def test_another_architecture_is_refused_field_by_field(saved):
    other = dataclasses.replace(MODEL, hidden_size=64, rope_theta=1e4, tie_embeddings=True)
    with pytest.raises(
        UserError,
        match="hidden_size is 32 in the checkpoint and 64 here; tie_embeddings is False .*; rope_theta is 1000000.0 in "
        "the checkpoint and 10000.0 here",
    ):
        orbax.Checkpoints(saved).restore(program("1").abstract_state, meta(0, other))
    with pytest.raises(UserError, match="head/embedding is unknown"):
        orbax.restore_params(saved, dataclasses.replace(MODEL, tie_embeddings=True), make_mesh(), sharding.DECODE_RULES)
    with pytest.raises(UserError, match=r"layers/mlp/down is \(2, 64, 32\), not \(2, 128, 32\)"):
        orbax.restore_params(
            saved, dataclasses.replace(MODEL, intermediate_size=128), make_mesh(), sharding.DECODE_RULES
        )


def test_how_a_model_is_computed_may_change(saved):
    faster = dataclasses.replace(MODEL, dtype="bfloat16", remat="full", scan_layers=False)
    state, _ = orbax.Checkpoints(saved).restore(program("1").abstract_state, meta(0, faster))
    assert int(state.step) == 5


def test_adapters_and_whole_models_are_not_mixed_up(saved):
    adapters = meta(0, config={"lora": dataclasses.asdict(LoraConfig(rank=4))})
    with pytest.raises(UserError, match="lora is none in the checkpoint and .*'rank': 4"):
        orbax.Checkpoints(saved).restore(program("1").abstract_state, adapters)


def test_missing_and_foreign_checkpoints_are_named(saved, tmp_path):
    with pytest.raises(UserError, match=f"no complete checkpoint in {tmp_path}"):
        orbax.read_meta(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 4 .*; there are 3, 5"):
        orbax.read_meta(saved, 4)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        orbax.read_meta(tmp_path)
    for text in ("not JSON", "[]", '{"format": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match="not the metadata of a checkpoint"):
            orbax.read_meta(tmp_path)


@pytest.mark.parametrize(
    "group, settings",
    [
        ("model", {"number_of_experts": 8, "window": 1}),
        ("lora", {"rank": 4, "targets": ["up"], "dropout": 0.1, "number_of_experts": 8, "window": 1}),
    ],
)
def test_settings_of_a_later_version_are_named(group, settings, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    if group == "model":
        meta["model"] |= settings
    else:
        meta["config"] = {"lora": settings, "init_from": ""}
    file.write_text(json.dumps(meta))
    where = {"model": "model", "lora": "config.lora"}[group]
    message = rf"does not know: .*{where}.number_of_experts, {where}.window. Use the version that wrote it"
    for read in (load.load_model_config, functools.partial(load.stored, step=None), load.fingerprint):
        with pytest.raises(UserError, match=message):
            read(tmp_path)
    del meta["model"]["hidden_size"]
    for name in settings:
        meta["model"].pop(name, None)
    file.write_text(json.dumps({**meta, "config": None}))
    with pytest.raises(UserError, match="metadata: model lacks the setting hidden_size"):
        orbax.read_meta(tmp_path)


# --- What is read, or written, past Orbax's own interface.


def test_the_files_are_where_they_are_looked_for(saved):
    """Complete steps, metadata and slices of parameters are read, and parameters written, without Orbax."""
    step = saved / "checkpoints" / "5"
    assert (step / "_CHECKPOINT_METADATA").is_file()
    assert json.loads((step / "meta" / "metadata").read_text())["step"] == 5
    assert json.loads((step / "data" / "metadata").read_text()) == {"next_row": 80}
    reader, shapes = load.stored(saved, 5)
    tree = traverse_util.flatten_dict(jax.device_get(random_state("4x2", 5).params), sep="/")
    assert shapes == {path: value.shape for path, value in tree.items()}
    for path, value in tree.items():
        np.testing.assert_array_equal(reader.read(path, (slice(1, 2), *[slice(None)] * (value.ndim - 1))), value[1:2])


def test_parameters_written_piece_by_piece_are_read_by_orbax(saved, tmp_path):
    tree = traverse_util.flatten_dict(jax.device_get(random_state("4x2", 5).params), sep="/")
    streams = {
        path: stream.Stream(value.shape, value.dtype, lambda start, stop, value=value: value[start:stop])
        for path, value in tree.items()
    }
    stream.save(tmp_path / "checkpoints" / "0", streams, meta(0))
    assert orbax.steps_in(tmp_path) == [0] and orbax.read_meta(tmp_path)["step"] == 0
    found = orbax.restore_params(tmp_path, MODEL, make_mesh(1, 4, 2), sharding.TRAIN_RULES)
    chex.assert_trees_all_equal(found, random_state("4x2", 5).params)
    # The same weights in other pieces have the same fingerprint; other weights have another one.
    assert load.fingerprint(tmp_path) == load.fingerprint(saved, 5) != load.fingerprint(saved, 3)
