"""Conversion both ways: exact, in pieces, all or nothing."""

import dataclasses
import fcntl
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from absl import logging
from flax import linen as nn
from forward import forward, logits

from refusion_jax import storage
from refusion_jax.checkpoint import convert, huggingface, load, metadata, stream
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig, to_huggingface
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

MICRO = ModelConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,
)


@pytest.fixture
def small_pieces(monkeypatch):
    """Every parameter is written and read in many pieces, of which the last is smaller."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(huggingface, "READ_BYTES", 5000)


def quiet(line: str) -> None:
    pass


def tensors_in(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the `safetensors` library."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_same_tensors(a, b) -> None:
    a, b = tensors_in(a), tensors_in(b)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def micro(folder, tokenizer=None, **changes):
    """A random model in Hugging Face layout."""
    config = dataclasses.replace(MICRO, logical_vocab_size=0, **changes)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(p.tensor_shape).astype(np.float32) for name, p in huggingface.in_file_order(config)
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_huggingface(config)))
    if tokenizer:
        load_tokenizer(tokenizer).save(folder)
    return folder


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_bit_exact(reference, tmp_path, small_pieces, name, dtype):
    source, back = tmp_path / "source", tmp_path / "back"
    shutil.copytree(reference / name / "model", source)
    for file in source.glob("*.safetensors"):
        safetensors.numpy.save_file(
            {n: t.astype(convert.DTYPES[dtype]) for n, t in safetensors.numpy.load_file(file).items()}, file
        )
    convert.to_orbax(source, tmp_path / "orbax", say=quiet)
    convert.to_huggingface(tmp_path / "orbax", back, shard_bytes=500_000, say=quiet)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same_tensors(source, back)
    assert load.load_model_config(back) == load.load_model_config(source)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_back_and_there_is_bit_exact(tmp_path, tie):
    """From a checkpoint that Orbax wrote from a mesh, as training does."""
    config, mesh = dataclasses.replace(MICRO, tie_embeddings=tie), make_mesh(2, 2, 2)
    rng = np.random.default_rng(0)
    draw = lambda abstract, place: jax.device_put(rng.standard_normal(abstract.shape).astype(np.float32), place)
    params = jax.tree.map(
        draw, nn.unbox(sharding.abstract_params(config)), sharding.param_shardings(config, mesh, sharding.TRAIN_RULES)
    )
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        meta = metadata.make_meta(config, step=7, tokenizer="")
        manager.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)))
    convert.to_huggingface(tmp_path / "run", tmp_path / "exported", say=quiet)
    convert.to_orbax(tmp_path / "exported", tmp_path / "again", say=quiet)
    again = load.load_params(tmp_path / "again", config, make_mesh(1, 4, 2), sharding.TRAIN_RULES)
    chex.assert_trees_all_equal(params, again)


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
def test_logits_through_orbax_on_a_mesh(reference, tmp_path, small_pieces, name):
    convert.to_orbax(reference / name / "model", tmp_path / "orbax", say=quiet)
    config, mesh = load.load_model_config(tmp_path / "orbax"), make_mesh(2, 2, 2)
    params = load.load_params(tmp_path / "orbax", config, mesh, sharding.TRAIN_RULES)
    expected = np.load(reference / name / "logits.npz")
    with sharding.use(mesh, sharding.TRAIN_RULES):
        hidden = forward(config, params, expected["tokens"], expected["permuted_positions"])
        found = logits(config, params, hidden)
    np.testing.assert_allclose(np.asarray(found)[:, expected["rows"]], expected["logits_permuted"], atol=2e-4)


def test_dtype_rounds_to_nearest(tmp_path):
    source = micro(tmp_path / "source")
    convert.to_orbax(source, tmp_path / "orbax", dtype="bfloat16", say=quiet)
    convert.to_huggingface(tmp_path / "orbax", tmp_path / "back", dtype="float32", say=quiet)
    want, found = tensors_in(source), tensors_in(tmp_path / "back")
    for name in want:
        np.testing.assert_array_equal(
            found[name], np.asarray(jax.numpy.asarray(want[name]).astype("bfloat16"), np.float32)
        )


def test_dry_run_writes_nothing(tmp_path):
    source, lines = micro(tmp_path / "source"), []
    convert.to_orbax(source, tmp_path / "orbax", dry_run=True, say=lines.append)
    assert not (tmp_path / "orbax").exists()
    assert sum(any(path in line for line in lines) for path in huggingface.parameters(MICRO)) == len(
        huggingface.parameters(MICRO)
    )
    convert.to_orbax(source, tmp_path / "orbax", say=quiet)
    before = sorted(tmp_path.rglob("*"))
    convert.to_huggingface(tmp_path / "orbax", tmp_path / "back", dry_run=True, say=quiet)
    assert sorted(tmp_path.rglob("*")) == before


def test_tied_head_that_is_stored_too(reference, tmp_path):
    """Some tied models are published with the head's copy: taken if it is one, refused if it is not."""
    shutil.copytree(reference / "qwen3_tied" / "model", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    convert.to_orbax(tmp_path / "source", tmp_path / "orbax", say=quiet)
    assert "head" not in load.load_params(
        tmp_path / "orbax", load.load_model_config(tmp_path / "orbax"), make_mesh(), sharding.TRAIN_RULES
    )
    safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="differs from the embedding.*tie_word_embeddings"):
        convert.to_orbax(tmp_path / "source", tmp_path / "other", say=quiet)


# --- Vocabulary and tokenizer.


def exported_tables(tmp_path, **arguments) -> tuple[dict[str, np.ndarray], dict]:
    """Tables and config.json of tmp_path/source after a way there and back."""
    convert.to_orbax(tmp_path / "source", tmp_path / "orbax", say=quiet, **arguments)
    convert.to_huggingface(tmp_path / "orbax", tmp_path / "back", say=quiet)
    tensors = tensors_in(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    return {name: tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}, config


def test_tokenizer_names_the_special_ids(tmp_path):
    source = micro(tmp_path / "source", tokenizer="bytes")
    tables, config = exported_tables(tmp_path)
    np.testing.assert_array_equal(tables["lm_head.weight"], tensors_in(source)["lm_head.weight"])  # rows as they were
    assert [config[n] for n in ("vocab_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")] == [
        264,
        261,
        260,
        257,
        256,
    ]
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert [generation[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id")] == [260, 257, 256]
    assert load.load_model_config(tmp_path / "orbax").logical_vocab_size == 262
    assert (
        load.load_tokenizer_for(tmp_path / "back").vocab_size
        == load.load_tokenizer_for(tmp_path / "orbax").vocab_size
        == 262
    )


def test_new_tokens_get_the_mean_of_the_others(tmp_path, small_pieces):
    source = micro(tmp_path / "source", tokenizer="bytes")
    tables, _ = exported_tables(tmp_path, new_tokens="mean")
    for name, table in tables.items():
        before = tensors_in(source)[name]
        others = [i for i in range(264) if i not in (260, 261)]
        np.testing.assert_array_equal(table[others], before[others])
        np.testing.assert_allclose(table[[260, 261]], np.tile(before[:260].mean(0), (2, 1)), atol=1e-6)


def test_table_without_rows_for_the_new_tokens(tmp_path):
    source = micro(tmp_path / "source", tokenizer="bytes", vocab_size=260)
    with pytest.raises(UserError, match="260 rows.*262 ids.*--new-tokens mean"):
        convert.to_orbax(source, tmp_path / "orbax", say=quiet)
    tables, config = exported_tables(tmp_path, new_tokens="mean")
    before = tensors_in(source)
    for name, table in tables.items():
        np.testing.assert_array_equal(table[:260], before[name])
        np.testing.assert_allclose(table[260:], np.tile(before[name].mean(0), (2, 1)), atol=1e-6)
    assert config["vocab_size"] == 262


@pytest.mark.parametrize("rows", [262, 272], ids=["cut to the vocabulary", "padded for a mesh"])
def test_other_numbers_of_rows(tmp_path, small_pieces, rows):
    source = micro(tmp_path / "source", tokenizer="bytes")
    tables, config = exported_tables(tmp_path, vocab_rows=rows)
    assert config["vocab_size"] == rows
    for name, table in tables.items():
        assert table.shape == (rows, 16)
        np.testing.assert_array_equal(table[:264], tensors_in(source)[name][:rows])


def test_rows_are_never_cut_off_blindly(tmp_path):
    source = micro(tmp_path / "source")
    with pytest.raises(UserError, match="would cut rows off"):
        convert.to_orbax(source, tmp_path / "orbax", vocab_rows=262, say=quiet)
    with pytest.raises(UserError, match="260 rows.*262 ids"):
        convert.to_orbax(source, tmp_path / "orbax", tokenizer="bytes", vocab_rows=260, say=quiet)


@pytest.mark.parametrize("rows", [151936, 151671])
def test_real_vocabulary(test_data, tmp_path, rows):
    """Qwen3's table and the released ReFusion's, with the real tokenizer; the exported folder loads in transformers."""
    transformers = pytest.importorskip("transformers")
    micro(tmp_path / "source", vocab_size=rows, hidden_size=4, tokenizer=str(test_data / "tokenizers" / "qwen3"))
    tables, config = exported_tables(tmp_path)
    assert_same_tensors(tmp_path / "source", tmp_path / "back")
    assert (config["vocab_size"], config["mask_token_id"], config["bos_token_id"]) == (rows, 151670, 151669)
    assert load.load_model_config(tmp_path / "orbax").logical_vocab_size == 151671
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.convert_tokens_to_ids(["<|beginoftext|>", "<|mask|>"]) == [151669, 151670]


# --- All or nothing.


def test_destination_that_exists(tmp_path):
    source = micro(tmp_path / "source")
    (tmp_path / "orbax").mkdir()
    with pytest.raises(UserError, match="orbax exists already"):
        convert.to_orbax(source, tmp_path / "orbax", say=quiet)
    assert not list((tmp_path / "orbax").iterdir())


KILLED = """
import os, sys
from refusion_jax import storage
from refusion_jax.checkpoint import convert, huggingface, safetensors, stream
command, source, destination, where, count = *sys.argv[1:5], int(sys.argv[5])
calls = 0
def die_at_call(owner, name):
    original = getattr(owner, name)
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    setattr(owner, name, counted)
places = {"read": (huggingface.Weights, "read"), "write": (safetensors.Writer, "write"), "rename": (os, "rename")}
die_at_call(*places[where])
getattr(convert, command)(source, destination)
"""


@pytest.mark.parametrize(
    ("command", "where", "count"),
    [
        ("to_orbax", "read", 1),
        ("to_orbax", "read", 12),
        ("to_huggingface", "write", 20),
        ("to_huggingface", "rename", 1),
    ],
)
def test_killed_conversion_leaves_nothing_that_looks_complete(tmp_path, command, where, count):
    source = micro(tmp_path / "hf")
    if command == "to_huggingface":
        convert.to_orbax(source, tmp_path / "orbax", say=quiet)
        source = tmp_path / "orbax"
    result = tmp_path / "result"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, command, source, result, where, str(count)], capture_output=True, timeout=60
    )
    assert killed.returncode == -9, killed.stderr
    assert not result.exists() and (tmp_path / "result.incomplete").exists()
    lines = []
    getattr(convert, command)(source, result, say=lines.append)
    assert "removing" in lines[0] or any("an earlier conversion did not finish" in line for line in lines)
    assert result.exists() and not (tmp_path / "result.incomplete").exists()
    if command == "to_huggingface":
        assert_same_tensors(tmp_path / "hf", result)
    else:
        convert.to_huggingface(result, tmp_path / "back", say=quiet)
        assert_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_two_conversions_into_one_folder(tmp_path):
    source = micro(tmp_path / "source")
    (tmp_path / "orbax.incomplete").mkdir()
    handle = os.open(tmp_path / "orbax.incomplete", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="being written by another process"):
            convert.to_orbax(source, tmp_path / "orbax", say=quiet)
    finally:
        os.close(handle)


@pytest.mark.parametrize("command", ["to_orbax", "to_huggingface"])
def test_full_disk_part_way(reference, tmp_path, command):
    """A limit on the size of files makes the kernel refuse a write in the middle, as a full disk does."""
    source = reference / "qwen3_tied" / "model"
    if command == "to_huggingface":
        convert.to_orbax(source, tmp_path / "orbax", say=quiet)
        source = tmp_path / "orbax"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(UserError, match="disk is full.*nothing of it was kept"):
            getattr(convert, command)(source, tmp_path / "result", say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("result*"))


def test_disk_too_small_is_told_before_writing(tmp_path, monkeypatch):
    convert.to_orbax(micro(tmp_path / "source"), tmp_path / "orbax", say=quiet)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"needs 0\.\d\d MB, but the disk has 0.00 MB free"):
        convert.to_huggingface(tmp_path / "orbax", tmp_path / "back", say=quiet)
    assert not list(tmp_path.glob("back*"))


def test_damaged_checkpoint(tmp_path):
    convert.to_orbax(micro(tmp_path / "source"), tmp_path / "orbax", say=quiet)
    shutil.rmtree(tmp_path / "orbax" / "checkpoints" / "0" / "params" / "ocdbt.process_0")
    with pytest.raises(UserError, match="cannot be read, 14 problems"):
        convert.to_huggingface(tmp_path / "orbax", tmp_path / "back", say=quiet)
    assert not list(tmp_path.glob("back*"))


# --- In buckets.


def test_there_and_back_in_a_bucket(bucket, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "READ_BYTES", 10_000)  # of a table
    source = micro(tmp_path / "source", tokenizer="bytes")
    storage.copy_folder(source, storage.as_path(f"{bucket}/convert/source"))
    far = {name: f"{bucket}/convert/{name}" for name in ("source", "orbax", "back")}
    convert.to_orbax(far["source"], far["orbax"], say=quiet)
    convert.to_huggingface(far["orbax"], far["back"], shard_bytes=20_000, say=quiet)
    storage.copy_folder(far["back"], tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_tensors(source, tmp_path / "back")
    config, mesh = load.load_model_config(source), make_mesh(2, 2, 2)
    near = load.load_params(source, config, mesh, sharding.TRAIN_RULES)
    for place in far.values():
        assert load.load_model_config(place) == config
        assert load.load_tokenizer_for(place).fingerprint == "bytes-1"
        assert load.fingerprint(place) == load.fingerprint(source)
    for place in (far["source"], far["orbax"]):  # what `init_from` and `--checkpoint` do
        chex.assert_trees_all_equal(load.load_params(place, config, mesh, sharding.TRAIN_RULES), near)
    tool = runpy.run_path(str(repository / "tools" / "inspect_checkpoint.py"))
    tool["inspect_huggingface"](load.locate(far["back"]), whole_config=False)
    assert "model.layers.{}.mlp.gate_proj.weight" in capsys.readouterr().out
    with pytest.raises(UserError, match="gs://bucket/convert/back exists already"):
        convert.to_huggingface(far["orbax"], far["back"], say=quiet)


@pytest.mark.parametrize("command", ["to_orbax", "to_huggingface"])
def test_conversion_that_fails_in_a_bucket_leaves_no_checkpoint(command, bucket, tmp_path, monkeypatch):
    source, result = micro(tmp_path / "source", tokenizer="bytes"), f"{bucket}/failed/{command}"
    if command == "to_huggingface":
        convert.to_orbax(source, tmp_path / "orbax", say=quiet)
        source = tmp_path / "orbax"
    seen = []

    def fail(*_):
        seen.append(storage.as_path(result).exists() and load.is_orbax(storage.as_path(result)))
        raise OSError("the network is gone")

    where = (huggingface.Weights, "read") if command == "to_orbax" else (storage, "upload")
    monkeypatch.setattr(*where, fail)
    with pytest.raises(UserError, match="the network is gone"):
        getattr(convert, command)(source, result, say=quiet)
    assert seen and not storage.as_path(result).exists()


@pytest.mark.parametrize(
    "destination, message",
    [
        ("gs://nobody/model", "Cannot write to gs://nobody/model"),
        ("s3://bucket/model", r"s3://bucket/model cannot hold checkpoints: .*only those of Google's storage \(gs://\)"),
    ],
)
def test_destination_that_cannot_be_is_named_before_anything_is_read(
    bucket, tmp_path, monkeypatch, destination, message
):
    source = micro(tmp_path / "source")
    monkeypatch.setattr(huggingface.Weights, "read", None)
    with pytest.raises(UserError, match=message):
        convert.to_orbax(source, destination, say=quiet)


def test_commands(repository, tmp_path, monkeypatch, capsys):
    """The command line: convert, look, convert back, and a mistake as one paragraph."""
    micro(tmp_path / "hf", tokenizer="bytes")
    verbosity = logging.get_verbosity()

    def run(tool, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        try:
            runpy.run_path(str(repository / "tools" / tool))["main"]()
        finally:
            logging.set_verbosity(verbosity)
        return capsys.readouterr().out

    assert "100%" in run("convert_qwen3.py", "to-orbax", tmp_path / "hf", tmp_path / "orbax", "--dtype", "bfloat16")
    shown = run("inspect_checkpoint.py", tmp_path / "orbax")
    assert "layers/mlp/gate" in shown and "3x16x32  bfloat16" in shown and "mask_token_id 261" in shown
    run("convert_qwen3.py", "to-hf", tmp_path / "orbax", tmp_path / "back", "--shard-gb", "1e-5")
    shown = run("inspect_checkpoint.py", tmp_path / "back")
    assert "model.layers.{}.mlp.gate_proj.weight" in shown and "32x16 x 3" in shown
    for size in ("nan", "inf", "0"):
        with pytest.raises(UserError, match=f"--shard-gb is {float(size)}; it must be greater than 0, and finite"):
            run("convert_qwen3.py", "to-hf", tmp_path / "orbax", tmp_path / "other", "--shard-gb", size)
    words = [sys.executable, "tools/convert_qwen3.py", "to-hf", tmp_path / "orbax", tmp_path / "back"]
    again = subprocess.run([*map(str, words)], cwd=repository, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
