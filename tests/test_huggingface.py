"""Hugging Face folders as parameters: the mapping, sharded reading, and everything that can be wrong with the files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from forward import forward, logits
from processes import finish, start

from refusion_jax.checkpoint import huggingface, load
from refusion_jax.checkpoint import safetensors as files
from refusion_jax.errors import UserError
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh


def stacked(folder) -> dict:
    """Parameters of a folder by the `safetensors` library and spelled-out reshapes, without the table under test."""
    c = json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    hidden, head = c["hidden_size"], c["head_dim"]
    layers = lambda name, f=lambda x: x: np.stack(
        [f(tensors[f"model.layers.{i}.{name}.weight"]) for i in range(c["num_hidden_layers"])]
    )
    project = lambda x: x.T.reshape(hidden, -1, head)
    params = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": layers("input_layernorm")},
            "mlp_norm": {"scale": layers("post_attention_layernorm")},
            "attention": {
                "query": layers("self_attn.q_proj", project),
                "key": layers("self_attn.k_proj", project),
                "value": layers("self_attn.v_proj", project),
                "output": layers("self_attn.o_proj", lambda x: x.T.reshape(-1, head, hidden)),
                "query_norm": layers("self_attn.q_norm"),
                "key_norm": layers("self_attn.k_norm"),
            },
            "mlp": {
                "gate": layers("mlp.gate_proj", np.transpose),
                "up": layers("mlp.up_proj", np.transpose),
                "down": layers("mlp.down_proj", np.transpose),
            },
        },
    }
    if not c["tie_word_embeddings"]:
        params["head"] = {"embedding": tensors["lm_head.weight"]}
    return params


def bytes_of_shards(params) -> int:
    """Bytes this process has to read: every distinct slice that lies on one of its devices, once."""
    total = 0
    for array in jax.tree.leaves(params):
        shards = {str(s.index): s.data.nbytes for s in array.addressable_shards}
        total += sum(shards.values())
    return total


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
@pytest.mark.parametrize("rules", [sharding.TRAIN_RULES, sharding.DECODE_RULES], ids=["train", "decode"])
def test_sharded_load_is_exact_and_reads_each_byte_once(reference, name, rules):
    folder = reference / name / "model"
    weights = huggingface.Weights(folder)
    mesh = make_mesh(2, 2, 2)
    params = huggingface.load_params(weights, weights.config, mesh, rules, "float32")
    jax.tree.map(np.testing.assert_array_equal, params, stacked(folder))
    jax.tree.map(
        lambda p, s: p.sharding == s or pytest.fail(str(p.sharding)),
        params,
        sharding.param_shardings(weights.config, mesh, rules),
    )
    assert (
        weights.bytes_read
        == bytes_of_shards(params)
        == sum(t.dtype.itemsize * np.prod(t.shape) for t in weights.tensors.values())
    )


TWO_PROCESSES = """
import pathlib, sys, jax, numpy as np
sys.path.insert(0, sys.argv[2])
from refusion_jax.checkpoint import huggingface
from refusion_jax.parallel import distributed, sharding
from refusion_jax.parallel.mesh import make_mesh
from test_huggingface import bytes_of_shards, stacked

distributed.initialize()
folder = pathlib.Path(sys.argv[1])
weights = huggingface.Weights(folder)
params = huggingface.load_params(weights, weights.config, make_mesh(1, 4, 2), sharding.TRAIN_RULES, "float32")
for array, whole in zip(jax.tree.leaves(params), jax.tree.leaves(stacked(folder)), strict=True):
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
assert weights.bytes_read == bytes_of_shards(params)
print("read", weights.bytes_read, "of", sum(a.nbytes for a in jax.tree.leaves(params)), flush=True)
"""


def test_two_processes_read_their_own_halves(reference, repository, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(TWO_PROCESSES)
    codes, logs = finish(
        start(
            [str(script), str(reference / "qwen3_untied" / "model"), str(repository / "tests")],
            folder=tmp_path,
            processes=2,
        ),
        tmp_path,
    )
    assert codes == [0, 0], logs
    for log in logs:
        read, total = (int(word) for word in log.split("read ")[1].split()[:3:2])
        assert 0.5 * total <= read < 0.51 * total  # only the norms are read by both


def test_logits_from_a_folder_on_a_mesh(reference):
    """The reference logits, natural and permuted order, from weights that went straight to a 2x2x2 mesh."""
    folder = reference / "qwen3_untied"
    config, mesh = load.load_model_config(folder / "model"), make_mesh(2, 2, 2)
    params = load.load_params(folder / "model", config, mesh, sharding.TRAIN_RULES)
    expected = np.load(folder / "logits.npz")
    with sharding.use(mesh, sharding.TRAIN_RULES):
        for positions, name in (("positions", "logits"), ("permuted_positions", "logits_permuted")):
            found = logits(config, params, forward(config, params, expected["tokens"], expected[positions]))
            np.testing.assert_allclose(np.asarray(found)[:, expected["rows"]], expected[name], atol=2e-4)


def test_table_is_a_bijection(reference):
    """Every tensor belongs to one parameter and comes back from it bit for bit."""
    for name in ("qwen3_tied", "qwen3_untied"):
        weights = huggingface.Weights(reference / name / "model")
        names = [n for p in weights.parameters.values() for n in p.names]
        assert (
            sorted(names) == sorted(weights.tensors) == sorted(n for n, _ in huggingface.in_file_order(weights.config))
        )
        for parameter in weights.parameters.values():
            for n in parameter.names:
                tensor = np.array(weights.tensors[n].open())
                np.testing.assert_array_equal(parameter.to_tensor(parameter.from_tensor(tensor)), tensor)


def test_half_precision_is_read_and_cast(reference, tmp_path):
    source = reference / "qwen3_tied" / "model"
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    for kind in (np.float16, ml_dtypes.bfloat16):
        safetensors.numpy.save_file({n: t.astype(kind) for n, t in tensors.items()}, tmp_path / "model.safetensors")
        weights = huggingface.Weights(tmp_path)
        assert weights.dtype("layers/mlp/up") == kind
        params = huggingface.load_params(weights, weights.config, make_mesh(1, 4, 2), sharding.TRAIN_RULES, "float32")
        jax.tree.map(lambda p, s: np.testing.assert_array_equal(p, s.astype(np.float32)), params, stacked(tmp_path))
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def edit(folder, change) -> None:
    """Applies `change` to the tensors of a single-file folder and writes them back."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def tied(reference, tmp_path):
    shutil.copytree(reference / "qwen3_tied" / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(reference, tmp_path):
    shutil.copytree(reference / "qwen3_untied" / "model", tmp_path / "model")
    return tmp_path / "model"


def test_all_faults_are_listed_at_once(tied):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(3, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.copy()
        del tensors["model.norm.weight"]

    edit(tied, change)
    with pytest.raises(UserError, match="3 problems") as error:
        huggingface.Weights(tied)
    for part in (
        "unknown tensor model.layers.0.mlp.up_proj.bias",
        "model.layers.1.mlp.up_proj.weight is [128, 384], config.json makes it [384, 128]",
        "missing tensor model.norm.weight",
    ):
        assert part in str(error.value)


def test_tensor_in_two_shards(sharded):
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    extra = safetensors.numpy.load_file(second)
    extra["model.embed_tokens.weight"] = safetensors.numpy.load_file(first)["model.embed_tokens.weight"]
    safetensors.numpy.save_file(extra, second)
    with pytest.raises(UserError, match=f"model.embed_tokens.weight is in {first.name} and again in {second.name}"):
        huggingface.Weights(sharded)


def test_missing_shard(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(
        UserError, match=f"1 problem: .*{victim.name} is missing"
    ):  # and not one more for each of its tensors
        huggingface.Weights(sharded)


def test_index_that_names_a_tensor_that_is_not_there(sharded):
    index = json.loads((sharded / files.INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    (sharded / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(
        UserError,
        match="says that model.layers.9.mlp.up_proj.weight is in model-00001-of-00003.safetensors, but it is not there",
    ):
        huggingface.Weights(sharded)


def test_malformed_index(sharded):
    (sharded / files.INDEX).write_text('{"weight_map": ')
    with pytest.raises(UserError, match="index.json is malformed"):
        huggingface.Weights(sharded)


@pytest.mark.parametrize(
    "kept", [0, 5, 100, 3000, -4], ids=["empty", "no length", "half a header", "little data", "last bytes gone"]
)
def test_truncated_file(tied, kept):
    file = tied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated|corrupt"):
        huggingface.Weights(tied)


def test_corrupt_header(tied):
    file = tied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:24] = b"\xff\xfe\x00{"
    file.write_bytes(data)
    with pytest.raises(UserError, match="no safetensors file, or a corrupt one"):
        huggingface.Weights(tied)


def test_other_formats_are_named(tied):
    (tied / "model.safetensors").rename(tied / "pytorch_model.bin")
    with pytest.raises(UserError, match="it has pytorch_model.bin.*safetensors files only"):
        huggingface.Weights(tied)


def test_other_architectures_are_named(tied):
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(
        json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(UserError, match="type 'llama'.*LlamaForCausalLM"):
        load.load_model_config(tied)


def test_other_sizes_are_named(tied):
    config = dataclasses.replace(load.load_model_config(tied), num_layers=5, rope_theta=5e6)
    with pytest.raises(
        UserError, match="num_layers is 3, config.model has 5; rope_theta is 1000000.0, config.model has 5000000.0"
    ):
        load.load_params(tied, config, make_mesh(), sharding.TRAIN_RULES)


def test_vocabulary_smaller_than_the_tokenizer(tied):
    from refusion_jax.data.tokenizers import load_tokenizer

    load_tokenizer("bytes").save(tied)
    assert load.load_model_config(tied).logical_vocab_size == 262  # 512 rows are enough

    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(UserError, match="256 rows.* 262 ids"):
        load.load_model_config(tied)


def test_neither_folder_nor_name(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no folder"):
        load.load_model_config(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no checkpoint.*found notes.txt"):
        load.load_model_config(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hugging Face hub it could not be downloaded"):
        load.load_model_config("nobody/nothing")


@pytest.mark.parametrize("shard_bytes", [10**9, 300], ids=["one file", "shards"])
def test_written_files_are_read_by_the_library(tmp_path, shard_bytes):
    rng = np.random.default_rng(0)
    kinds = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
    tensors = {f"t{i}": rng.standard_normal((5, 3 + i)).astype(kind) for i, kind in enumerate(kinds * 3)}
    writer = files.Writer(tmp_path, [(name, t.dtype, t.shape) for name, t in tensors.items()], shard_bytes)
    for name in reversed(tensors):
        writer.write(name, tensors[name][2:], row=2)
        writer.write(name, tensors[name][:2])
    writer.close()
    found = {}
    for file in writer.files:
        found |= safetensors.numpy.load_file(tmp_path / file)
    assert (len(writer.files) > 1) == (shard_bytes == 300)
    assert set(found) == set(tensors)
    for name in tensors:
        assert found[name].dtype == tensors[name].dtype
        np.testing.assert_array_equal(found[name], tensors[name])
    ours, problems = files.read_folder(tmp_path)
    assert not problems and set(ours) == set(tensors)
