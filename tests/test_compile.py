"""What the compiled programs hold, move and send: on CPU devices; for TPUs and GPUs where their compilers are."""

import collections
import dataclasses
import importlib.util
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import collectives
import compile_step
import hlo
import roofline
import targets

from refusion_jax import step as steps_lib
from refusion_jax.config import Config, DataConfig, load_config
from refusion_jax.errors import UserError
from refusion_jax.metrics.flops import CHIPS
from refusion_jax.model import cached_attention, head
from refusion_jax.model.config import ModelConfig, qwen3
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import sampler_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_libtpu = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu]'"
    ),
]

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="CUDA is not installed: pip install '.[cuda]'"
)

# Sizes that cannot be mistaken for one another in a program's text.
MODEL = ModelConfig(
    vocab_size=1664,
    logical_vocab_size=1600,
    hidden_size=256,
    intermediate_size=640,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    tie_embeddings=False,
    mask_token_id=1599,
    begin_token_id=1598,
    eos_token_id=1,
    pad_token_id=0,
    remat="minimal",
)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(max_length=384, max_examples_per_row=4),
    batch_size=8,
)


CHUNK = 96  # tokens of a device whose logits may exist at a time, with two shards of the vocabulary


@pytest.fixture(scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LOGIT_BYTES", CHUNK * MODEL.vocab_size // 2 * 4)
        yield


@pytest.fixture(scope="module")
def on_cpu(small_chunks):
    """The training step on eight CPU devices, every mesh axis in use."""
    mesh = make_mesh(2, 2, 2)
    lowered, _ = compile_step.train_program(CONFIG, mesh)
    return lowered.compile().as_text(), mesh


@pytest.fixture(scope="module")
def on_tpu(small_chunks):
    """The same for four TPU v5e in bfloat16, with splash attention."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    mesh = make_mesh(1, 2, 2, devices=targets.topology_devices("v5e:2x2"))
    lowered, work = compile_step.train_program(config, mesh)
    compiled, _ = targets.compile_program(lowered, "v5e:2x2", mesh)
    return compiled, mesh, work


def collective_list(text: str, mesh) -> list[collectives.Collective]:
    return collectives.collective_list(hlo.Program(text), mesh)


def tokens_with_logits(text: str) -> int:
    """Tokens of a device whose logits are held at a time: in arrays with the vocabulary, or a shard of it, last."""
    found = [math.prod(dims[:-1]) for _, dims in hlo.arrays(text) if len(dims) > 2 and dims[-1] in (1664, 832)]
    assert found  # the loss is in there
    return max(found)


def check_training_step(text: str, mesh) -> None:
    """No [batch, length, vocab], and no collective over logits, on a mesh with two shards of the vocabulary."""
    assert tokens_with_logits(text) <= CHUNK  # of the 768 or more that a device has
    for collective in collective_list(text, mesh):
        for _, dims in collective.shapes:
            sharded = 1664 in dims or 832 in dims
            assert not sharded or 256 in dims or 128 in dims, (
                collective
            )  # the tables themselves are gathered; logits are not


def test_logits_of_a_batch_never_exist_on_cpu(on_cpu):
    check_training_step(*on_cpu)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_parameters_and_optimizer_are_sharded_over_fsdp_and_tensor(shape):
    """One device of an 8B run holds 1 / (fsdp x tensor) of parameters and moments, within 5 %."""
    mesh = make_mesh(*shape)
    config = dataclasses.replace(CONFIG, model=qwen3("8b"), data=DataConfig())
    state = steps_lib.build(config, mesh, steps=10).abstract_state
    leaves = jax.tree.leaves(state)
    own = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    total = sum(a.size * a.dtype.itemsize for a in leaves)
    assert total == pytest.approx(12 * config.model.num_params(), rel=1e-3)
    assert own == pytest.approx(total / (shape[1] * shape[2]), rel=0.05)


@pytest.mark.parametrize("name", ["tiny", "0p6b", "8b"])
def test_shardings_are_the_reviewed_ones(name):
    """If meant: python tools/compile_step.py --config configs/NAME.py --shardings > tests/golden/NAME.txt"""
    config = load_config(str(ROOT / f"configs/{name}.py"))
    assert compile_step.shardings(config.model) == (ROOT / f"tests/golden/{name}.txt").read_text()


def collectives_of_a_gradient(mesh, *shape: int) -> list[collectives.Collective]:
    """Of a weight of that shape, sharded over fsdp, from rows sharded over data x fsdp; all in bfloat16."""
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    w, x = place(shape, "fsdp"), place((64, 128, shape[0]), ("data", "fsdp"))
    gradient = jax.jit(
        lambda x, w: jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)).astype(jnp.float32))(w), out_shardings=w.sharding
    )
    compiled, _ = targets.compile_program(gradient.lower(x, w), "the test's mesh", mesh)
    return collective_list(compiled.as_text(), mesh)


LOOP = """
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[2,16]{1,0} parameter(0)
  %ag = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=GATHER, dimensions={0}, metadata={op_name="gather"}
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%taken (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %cp = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p), channel_id=3, source_target_pairs={{0,2},{2,0}}
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %y = bf16[100]{0} parameter(0)
  %w = (s32[], f32[8,16]) while(%t), condition=%cond, body=%body
  %c = f32[4] conditional(%p, %x), branch_computations={%taken, %other}
  %ar = bf16[100]{0} all-reduce(%y), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,2},{1,3}}", ("fsdp",), 2),
        ("[2,4]<=[2,2,2]T(0,2,1)", ("fsdp", "tensor"), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "tensor"), 4),
        ("{}", ("data", "fsdp", "tensor"), 8),
    ],
)
def test_collectives_are_read_with_axes_bytes_and_loops(groups, axes, size):
    gather, reduce, permute = sorted(
        collective_list(LOOP.replace("GATHER", groups), make_mesh(2, 2, 2)), key=lambda c: c.kind
    )[::1]
    assert (gather.kind, gather.axes, gather.runs, gather.conditional) == ("all-gather", axes, 5, False)
    assert gather.bytes == 2 * 16 * 4 * (size - 1)
    assert (reduce.axes, reduce.runs, reduce.bytes) == (("tensor",), 1, 2 * 200 / 2)
    assert (permute.axes, permute.bytes, permute.conditional) == (("fsdp",), 16, True)


def test_collectives_of_a_real_program_are_those_of_its_shardings():
    """A product over a sharded dimension is one all-reduce of the result, in a loop as often as that runs."""
    mesh = make_mesh(1, 4, 2)
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )

    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    text = (
        jax.jit(f, out_shardings=place((16, 64), None, "tensor").sharding)
        .lower(place((16, 64), None, "tensor"), place((64, 64), "tensor", None))
        .compile()
        .as_text()
    )
    found = [c for c in collective_list(text, mesh) if c.kind == "all-reduce"]
    assert sum(c.runs for c in found) == 7
    assert {c.axes for c in found} == {("tensor",)}


def test_the_estimate_names_the_largest_limit():
    mesh = make_mesh(1, 8, 1)
    chip = CHIPS["TPU v5 lite"]
    found = roofline.estimate(
        mesh, "TPU v5 lite", flops=2 * chip.peak_flops, memory_bytes=3 * chip.bandwidth, collectives=[]
    )
    assert found == {"compute": 2, "memory": 3, "interconnect": 0, "step": 3, "limit": "memory"}
    send = collectives.Collective(
        "all-reduce", ("data",), (), bytes=chip.network, runs=4, conditional=False, between_slices=True, source=""
    )
    found = roofline.estimate(
        mesh, "TPU v5 lite", flops=0, memory_bytes=0, collectives=[send, dataclasses.replace(send, conditional=True)]
    )
    assert (found["interconnect"], found["limit"]) == (4, "interconnect")
    assert roofline.estimate(mesh, "cpu", 1, 1, []) == {}


@pytest.mark.parametrize(
    "message, words",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (41.22G) "
            "exceeds available HBM (15.75G).",
            "25.47 GiB are missing",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm "
            "capacity by 4.35G.",
            "4.35 GiB are missing",
        ),
    ],
)
def test_out_of_memory_says_how_much_is_missing(message, words):
    assert words in targets.out_of_memory(message, "v5e:2x2")


def run_tool(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_step.py", "--config", str(ROOT / "configs/tiny.py"), *arguments])
    compile_step.main()


def test_the_tool_reports_on_local_devices(monkeypatch, tmp_path, capsys):
    run_tool(
        monkeypatch, "--config.model.num_layers=1", "--config.data.max_length=32", "--json", str(tmp_path / "f.json")
    )
    said = capsys.readouterr().out
    assert "memory per device: arguments" in said and "sent by each device" in said
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["devices"] == 8 and any(row["axes"] == ["fsdp"] for row in result["collectives"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--topology", "v5p-64"], "'v5p-64' is not of the form"),
        (["--topology", "h999:8"], "'h999:8' is not of the form"),
        (["--topology", "h100:8", "--slices", "2"], "--slices 2 is for TPUs"),
        (["--config.mesh.fsdp=3"], "does not fit 8 devices"),
        (["--config.mesh.fsdp=2", "--config.mesh.tensor=4"], "tensor = 4 does not divide model.num_kv_heads = 2"),
        (["--decode", "--batch", "3"], "--batch 3 does not split"),
    ],
)
def test_bad_arguments_are_refused(monkeypatch, arguments, words):
    with pytest.raises(UserError, match=words):
        run_tool(monkeypatch, *arguments)


def test_without_a_compiler_for_gpus_one_paragraph_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed here; pip install 'refusion_jax\[cuda\]'"):
        run_tool(monkeypatch, "--topology", "h100:2x8")


SAMPLERS = {
    "plan_and_infill": {"slot_size": 8, "blocks": 4},
    "autoregressive": {},
    "speculative": {},
    "block": {"block_size": 8},
    "masked": {"block_length": 16},
}


class TestTpuCompiler:
    pytestmark = needs_libtpu

    def test_logits_of_a_batch_never_exist(self, on_tpu):
        compiled, mesh, _ = on_tpu
        check_training_step(compiled.as_text(), mesh)

    def test_arguments_are_a_share_of_the_state(self, on_tpu):
        compiled, _, _ = on_tpu
        assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(12 * MODEL.num_params() / 4, rel=0.05)

    def test_attention_is_splash_and_runs_forward_once(self, on_tpu):
        """Of each kernel one in the loops over layers: minimal remat keeps what the backward kernels need."""
        text = on_tpu[0].as_text()
        calls = [line for line in text.splitlines() if "custom-call(" in line and "splash_mha" in line]
        for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
            assert sum(kernel in line for line in calls) == 1, kernel

    @pytest.mark.parametrize(
        "shape, batch, method",
        [((1, 2, 2), 16, "plan_and_infill"), ((2, 2, 1), 256, "plan_and_infill"), ((1, 2, 2), 16, "block")],
    )
    def test_decoding_copies_no_cache_and_gathers_no_weights(self, shape, batch, method, monkeypatch):
        """With few rows and one key head on a device, and with many and several, which XLA lays out differently."""
        monkeypatch.setattr(cached_attention, "SCORE_BYTES", 2**20)
        model = dataclasses.replace(MODEL, dtype="bfloat16")
        mesh = make_mesh(*shape, devices=targets.topology_devices("v5e:2x2"))
        sampler = sampler_config(method, gen_length=64, **SAMPLERS[method])
        temporaries = []
        for prompt_length in (2048, 16384):
            lowered, _ = compile_step.decode_program(
                dataclasses.replace(CONFIG, model=model), mesh, sampler, batch=batch, prompt_length=prompt_length
            )
            compiled, _ = targets.compile_program(lowered, "v5e:2x2", mesh)
            keys = batch * (prompt_length + 64) * 2 * 128 * 2 / 4  # bytes of a layer's keys on one device, at least
            memory = compiled.memory_analysis()
            assert memory.alias_size_in_bytes > 3 * 2 * keys  # updated in place
            temporaries.append(memory.temp_size_in_bytes)
        assert max(temporaries) - min(temporaries) < keys / 10  # masks may grow with the cache
        weight = 256 * 2 * 128 * 2  # bytes of a layer's smallest matrix
        for c in collective_list(compiled.as_text(), mesh):
            assert c.kind not in ("all-gather", "all-to-all") or c.bytes < weight, (
                c
            )  # logits are not gathered, even to sample

    def test_gradients_are_reduce_scattered_where_data_splits_a_slice(self):
        """With fsdp over a part of a slice; over the whole of it XLA may sum all of every gradient on every device."""
        mesh = make_mesh(2, 4, 1, devices=targets.topology_devices("v5e:2x4"))
        found = {(c.kind, c.axes): c.bytes for c in collectives_of_a_gradient(mesh, 512, 1024)}
        size = 512 * 1024 * 2
        assert found == {
            ("all-gather", ("fsdp",)): size * 3 / 4,
            ("reduce-scatter", ("fsdp",)): size * 3 / 4,
            ("all-reduce", ("data",)): size / 4,
        }

    def test_only_the_data_axis_crosses_slices(self):
        """Weights are gathered inside a slice; between slices only one device's shard of their gradient is summed."""
        mesh = make_mesh(2, 4, 1, devices=targets.topology_devices("v5e:2x2", slices=2))
        found = collectives_of_a_gradient(mesh, 512, 1024)
        assert {c.axes for c in found if c.kind in ("all-gather", "reduce-scatter")} == {("fsdp",)}
        (between,) = [c for c in found if "data" in c.axes]
        assert (between.kind, between.bytes, between.between_slices) == ("all-reduce", 512 * 1024 * 2 / 4, True)
        assert all(not c.between_slices for c in found if c != between)

    def test_a_topology_that_is_too_small_says_by_how_much(self):
        mesh = make_mesh(1, 4, 1, devices=targets.topology_devices("v5e:2x2"))
        large = jax.ShapeDtypeStruct((4, 2**32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
        lowered = jax.jit(lambda x: x + 1).lower(large)
        with pytest.raises(
            UserError,
            match=r"needs at least [\d.]+ GiB on each device of v5e:2x2, which has 15.75 GiB: [\d.]+ GiB are missing",
        ):
            targets.compile_program(lowered, "v5e:2x2", mesh)

    def test_an_unknown_topology_is_refused(self):
        with pytest.raises(UserError, match="There is no TPU topology 'v9:2x2'"):
            targets.topology_devices("v9:2x2")


@pytest.fixture(scope="module", params=SAMPLERS)
def decoding_on_gpu(request):
    """The decoding loop on one H100, taken apart: a sampler's program, mesh, report."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    mesh = make_mesh(1, 1, 1, devices=targets.topology_devices("h100:1"))
    sampler = sampler_config(request.param, gen_length=64, **SAMPLERS[request.param])
    lowered, work = compile_step.decode_program(
        dataclasses.replace(CONFIG, model=model), mesh, sampler, batch=2, prompt_length=512
    )
    compiled, _ = targets.compile_program(lowered, "h100:1", mesh)
    return hlo.Program(compiled.as_text()), compile_step.report(compiled, mesh, work)


@needs_cuda
class TestGpuCompiler:
    def test_decoding_copies_neither_weights_nor_cache_and_never_waits(self, decoding_on_gpu):
        _, found = decoding_on_gpu
        assert (found["copied_bytes"], found["dynamic_loops"]) == (0, 0)
        assert found["kernels"] > found["kernels_per_layer"] * 3 > 0

    @pytest.mark.parametrize("name, size", [("head", 1664 * 256), ("mlp", 256 * 640)])
    def test_a_forward_multiplies_every_matrix_once(self, decoding_on_gpu, name, size):
        program, _ = decoding_on_gpu
        products = [
            operand
            for where, kernel, _ in program.kernels(program.outer_loop())
            for operand in kernel.operands
            if "dot_general" in kernel.text and program.held(where, operand) is True
            if program.computations[where][operand].elements == size
        ]
        assert len(products) == (1 if name == "head" else 3 * 3)  # gate, up and down of three layers

    def test_stacked_weights_would_be_copied(self):
        """What the count of copies is for: a scan over layers copies each one's slice, every time."""
        mesh = make_mesh(1, 1, 1, devices=targets.topology_devices("h100:1"))
        place = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))

        def forwards(w, x):
            layers = lambda x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, layers, x)

        lowered = jax.jit(forwards).lower(place(6, 1024, 1024), place(16, 1024))
        compiled, _ = targets.compile_program(lowered, "h100:1", mesh)
        program = hlo.Program(compiled.as_text())
        matrix = 1024 * 1024 * 2
        work = program.work(program.outer_loop(), least=matrix)
        assert work.copied_bytes == 6 * matrix
        assert 3 * 6 * matrix < work.moved_bytes < 4 * 6 * matrix

    def test_asynchronous_collectives_are_counted_once(self):
        """Gathered and reduced in pieces of the whole, on two hosts of two GPUs with copies of the weights."""
        mesh = make_mesh(2, 2, 1, devices=targets.topology_devices("h100:2x2"))
        size = 512 * 1024 * 2
        sent = collections.Counter()
        for c in collectives_of_a_gradient(mesh, 512, 1024):
            sent[c.kind, c.axes] += c.bytes * c.runs
        assert sent == {
            ("all-gather", ("fsdp",)): size / 2,
            ("reduce-scatter", ("fsdp",)): size / 2,
            ("all-reduce", ("data",)): size / 2,
        }

    @pytest.mark.parametrize("name", ["a100:1", "h200:2", "b200:2x4"])
    def test_every_chip_in_the_table_is_compiled_for(self, name):
        devices = targets.topology_devices(name)
        assert len(devices) == {"a100:1": 1, "h200:2": 2, "b200:2x4": 8}[name]
        mesh = make_mesh(1, -1, 1, devices=devices)
        x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
        compiled, _ = targets.compile_program(jax.jit(lambda x: jnp.tanh(x @ x)).lower(x), name, mesh)
        assert hlo.Program(compiled.as_text()).work().kernels > 0
        assert CHIPS[devices[0].device_kind].gpu
