"""Int8 weights: what the converter makes of them, what the model does with them, and where they are refused."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from forward import forward, logits
from micro import write_examples
from test_compile import CONFIG, MODEL, compile_step, hlo, needs_cuda, needs_libtpu, targets
from test_convert import MICRO, micro, quiet

from refusion_jax.checkpoint import convert, huggingface, int8, load, stream
from refusion_jax.config import load_config
from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError
from refusion_jax.model.qwen3 import unstacked
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import PlanAndInfillConfig
from refusion_jax.train import train

TOKENS = np.random.default_rng(0).integers(0, 264, (2, 12))
POSITIONS = np.tile(np.arange(12), (2, 1))


def loaded(folder, dtype="float32", mesh=None, rules=sharding.DECODE_RULES):
    """(config, parameters) of a checkpoint."""
    config = dataclasses.replace(load.load_model_config(folder), dtype=dtype, attention="xla")
    return config, load.load_params(folder, config, mesh or make_mesh(devices=jax.devices()[:1]), rules, dtype)


def dequantised(config, params) -> dict:
    """Quantised parameters as those of an ordinary model in float32."""
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    table = huggingface.parameters(config)
    for path, parameter in table.items():
        if parameter.inputs:
            flat[path] = flat[path] * np.expand_dims(flat[f"{path}_scale"], parameter.inputs)
    return traverse_util.unflatten_dict({path: flat[path] for path in table}, sep="/")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape, inputs", [((3, 16, 4, 8), (1,)), ((3, 4, 8, 16), (1, 2)), ((264, 16), (1,))])
def test_values_are_within_half_a_scale(dtype, shape, inputs):
    """Of their channel's scale, which is its largest value / 127: channels of other sizes do not matter."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-4, 3, [1 if i in inputs else n for i, n in enumerate(shape)])
    x = (rng.standard_normal(shape) * size).astype(dtype)
    x[0] = 0  # all of a layer, or a row
    q, scale = int8.quantise(x, inputs, "x")
    assert (q.dtype, scale.dtype, q.shape) == (np.int8, np.float32, shape)
    x = x.astype(np.float32)
    scale = np.expand_dims(scale, inputs)
    top = np.abs(x).max(inputs, keepdims=True)
    np.testing.assert_allclose(scale[1:], top[1:] / 127, rtol=1e-6)
    assert (np.abs(q * scale - x) <= scale * 0.50001).all() and not q[0].any()
    assert (np.abs(q).max(inputs)[1:] == 127).all()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_model_is_that_of_the_dequantised_weights(tmp_path, monkeypatch, tie):
    """Converted in many pieces; layers stacked and apart; and the weights are the source's to half a scale."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(huggingface, "READ_BYTES", 1000)
    source = micro(tmp_path / "source", tie_embeddings=tie)
    convert.to_orbax(source, tmp_path / "int8", quantise="int8", say=quiet)
    config, params = loaded(tmp_path / "int8")
    assert config.quantise == "int8" and not loaded(source)[0].quantise
    plain = dequantised(config, params)
    expected = loaded(source)[1]
    for path, parameter in huggingface.parameters(config).items():
        found, x = (traverse_util.flatten_dict(tree, sep="/")[path] for tree in (plain, expected))
        half = np.abs(x).max(parameter.inputs, keepdims=True) / 254 if parameter.inputs else 0
        assert (np.abs(found - x) <= half * 1.0001).all(), path

    ordinary = dataclasses.replace(config, quantise="")
    wanted = logits(ordinary, plain, forward(ordinary, plain, TOKENS, POSITIONS))
    for model, tree in (config, params), (dataclasses.replace(config, scan_layers=False), unstacked(params)):
        found = logits(model, tree, forward(model, tree, TOKENS, POSITIONS))
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)
    source_model = loaded(source)
    real = logits(ordinary, source_model[1], forward(ordinary, source_model[1], TOKENS, POSITIONS))
    assert 1e-3 < np.abs(wanted - real).max() < 0.1 * np.abs(real).max()  # and it is another model, but a close one


def test_int8_stays_int8_whatever_the_dtype(tmp_path):
    """A byte for each value of a matrix, also in bfloat16; scales are never rounded."""
    convert.to_orbax(micro(tmp_path / "source"), tmp_path / "int8", dtype="bfloat16", quantise="int8", say=quiet)
    full, half = (loaded(tmp_path / "int8", dtype)[1] for dtype in ("float32", "bfloat16"))
    chex.assert_trees_all_equal(full, half)
    chex.assert_trees_all_equal_dtypes(full, half)
    kinds = {path: leaf.dtype.name for path, leaf in traverse_util.flatten_dict(half, sep="/").items()}
    assert {kind for path, kind in kinds.items() if path.endswith("_scale")} == {"float32"}
    assert {kind for path, kind in kinds.items() if f"{path}_scale" in kinds} == {"int8"}
    norms = {kind for path, kind in kinds.items() if path.endswith(("/scale", "_norm"))}
    assert norms == {"bfloat16"}
    config = load.load_model_config(tmp_path / "int8")
    assert sum(x.size for x in jax.tree.leaves(half) if x.dtype == jnp.int8) > 0.97 * config.num_params()


def test_decoding_on_a_mesh(tmp_path):
    """Scales lie where their channels are; the tokens are those of one device."""
    convert.to_orbax(micro(tmp_path / "source", tokenizer="bytes"), tmp_path / "int8", quantise="int8", say=quiet)
    options = dict(gen_length=16, slot_size=4, blocks=2, token_threshold=0.05, slot_threshold=0.05, batch_size=4)
    prompts = ["one", "two and two", "3 * 3 * 3", "four"]
    params = loaded(tmp_path / "int8", mesh=make_mesh(2, 2, 2))[1]
    layers = params["layers"]
    spec = lambda x: tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    for part, name in (("attention", "query"), ("attention", "key"), ("mlp", "gate"), ("mlp", "up")):
        matrix, scale = (spec(layers[part][f"{name}{end}"]) for end in ("", "_scale"))
        assert scale == (matrix[0], *matrix[2:]) and "tensor" in scale
    assert spec(layers["attention"]["output_scale"]) == spec(layers["mlp"]["down_scale"]) == (None, None)
    assert spec(params["embed"]["embedding_scale"]) == ("tensor",)
    one, spread = (Decoder.load(str(tmp_path / "int8"), dtype="float32", mesh=mesh) for mesh in ("1,1,1", "2,2,2"))
    wanted, found = ([a.generation.tokens for a in d.generate(prompts, **options)] for d in (one, spread))
    assert found == wanted and len({tuple(tokens) for tokens in wanted}) > 1


def test_checkpoints_from_before_are_not_quantised(tmp_path):
    convert.to_orbax(micro(tmp_path / "source"), tmp_path / "orbax", say=quiet)
    file = tmp_path / "orbax" / "checkpoints" / "0" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["model"]["quantise"]
    file.write_text(json.dumps(meta))
    assert load.load_model_config(tmp_path / "orbax") == load.load_model_config(tmp_path / "source")
    chex.assert_trees_all_equal(loaded(tmp_path / "orbax")[1], loaded(tmp_path / "source")[1])


def test_training_is_refused(repository, tmp_path):
    """Whether the config knows that the weights are int8 (it is made from the checkpoint) or not."""
    source = micro(tmp_path / "source", tokenizer="bytes")
    convert.to_orbax(source, tmp_path / "int8", quantise="int8", say=quiet)
    write_examples(tmp_path / "data.json")
    argument = f"{repository / 'configs' / 'finetune.py'}:data={tmp_path / 'data.json'},max_length=64,dtype=float32"
    settings = {"steps": "1", "batch_size": "8"}
    config = load_config(f"{argument},init_from={tmp_path / 'int8'}", settings)
    with pytest.raises(
        UserError, match="cannot be trained. Set config.init_from to the checkpoint that they were conv"
    ):
        train(config, tmp_path / "run")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantise=""))
    with pytest.raises(
        UserError, match="int8 weights, which are for decoding and cannot be trained. Use the checkpoint"
    ):
        train(config, tmp_path / "run")


def test_bad_input(tmp_path):
    source = micro(tmp_path / "source")
    convert.to_orbax(source, tmp_path / "int8", quantise="int8", say=quiet)
    with pytest.raises(UserError, match="holds int8 weights, which Hugging Face's layout has no place for. Export the"):
        convert.to_huggingface(tmp_path / "int8", tmp_path / "back", say=quiet)
    with pytest.raises(UserError, match="model.quantise is 'int4'; choose one of '', int8"):
        convert.to_orbax(source, tmp_path / "int4", quantise="int4", say=quiet)
    quantised = dataclasses.replace(MICRO, quantise="int8")
    with pytest.raises(UserError, match="is not quantised, but config.model.quantise is 'int8'. Convert it with"):
        load.load_params(source, quantised, make_mesh(), sharding.DECODE_RULES)

    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="layers/mlp/up in .*source has values that are not finite"):
        convert.to_orbax(source, tmp_path / "nan", quantise="int8", say=quiet)
    assert not list(tmp_path.glob("nan*")) and not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e:1x1", marks=needs_libtpu), pytest.param("h100:1", marks=needs_cuda)]
)
def test_no_matrix_is_written_in_a_wider_type(topology):
    """Neither in the compiled loop nor before it: int8 is what is read, and it is widened where it is multiplied."""
    mesh = make_mesh(1, 1, 1, devices=targets.topology_devices(topology))
    # No size of a matrix is a multiple of the window, 160, as those of partial sums are.
    model = dataclasses.replace(MODEL, hidden_size=1024, intermediate_size=768, dtype="bfloat16", quantise="int8")
    settings = PlanAndInfillConfig(gen_length=64, slot_size=8, blocks=4)
    lowered, work = compile_step.decode_program(dataclasses.replace(CONFIG, model=model), mesh, settings, 1, 512)
    program = hlo.Program(compile_step.compile_program(lowered, topology, mesh)[0].as_text())
    sizes = {math.prod(p.shape) for p in huggingface.parameters(model).values() if p.inputs}
    sizes |= {size // model.num_layers for size in sizes}
    found = {(kind, math.prod(dims)) for _, i, _ in program.kernels() for kind, dims, _ in i.shapes}
    assert {kind for kind, size in found if size in sizes} <= {"s8"}
    read = sum(program.moved(name, i) * runs for name, i, runs in program.kernels(program.outer_loop()))
    assert read > model.num_params() - model.vocab_size * model.hidden_size  # of the embedding, rows are looked up
