"""Compiles the real training step, or the decoding loop, for TPUs or GPUs on a machine without any, or for this one.

    python tools/compile_step.py --config configs/8b.py --topology v5p:4x4x4 --config.mesh.data=4
    python tools/compile_step.py --config configs/8b.py --topology v5p:4x4x4 --slices 2 --config.mesh.data=8
    python tools/compile_step.py --config configs/8b.py --topology v6e:2x4 --decode --config.mesh.tensor=8
    python tools/compile_step.py --config configs/8b.py --topology h100:2x8 --config.mesh.data=2
    python tools/compile_step.py --config configs/8b.py --topology h100:1 --decode --batch 1
    python tools/compile_step.py --config configs/8b.py --topology h100:1 --decode --method masked --cache dual

Prints the memory of one device against the chip's, the collectives by kind and mesh axis, what one forward pass (or
microbatch) launches, moves and copies, the work by formula, and a lower bound of the step's time with what limits it.
TPU topologies need libtpu: pip install 'refusion_jax[tpu]'. GPUs need XLA's compiler for them: 'refusion_jax[cuda]'.
Not seen without a device: what autotuning would choose, the scratch memory of libraries, times.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import roofline
from collectives import Collective, collective_list
from flax import linen as nn
from hlo import Instruction, Program
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from targets import compile_program, topology_devices

from refusion_jax import step as steps_lib
from refusion_jax.config import Config, add_config_arguments, parse_config
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.decoder import add_sampler_arguments, flags_given
from refusion_jax.errors import UserError, run_main
from refusion_jax.metrics import flops
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import unstacked
from refusion_jax.objective.common import PackedBatch
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import SamplerConfig, programs, sampler_config
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.methods import METHODS
from refusion_jax.train import with_tokenizer

LAYER = re.compile(r"/layers?(_\d+)?/")  # in the names of what a layer does
EXAMPLES_PER_ROW = 32  # where the config leaves it to the data


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of a program does on one device, by formula.

    Attributes:
      tokens: useful tokens of the whole program's call, all devices.
      model_flops: operations that the result needs, all devices.
      flops: operations of one device, recomputation included.
      bytes: that the memory of one device moves at least.
      layers: of the model.
      parts: microbatches of a training step, done one after the other; None: the program is a loop, and this one round.
      least: bytes of the smallest matrix, or of one layer's keys, that one device holds.
    """

    tokens: float
    model_flops: float
    flops: float
    bytes: float
    layers: int
    parts: int | None
    least: int


def train_program(config: Config, mesh: Mesh) -> tuple[jax.stages.Lowered, Work]:
    """The training step of `config` on `mesh`, and its work when every row is one full example."""
    if config.model.mask_token_id is None:
        config = with_tokenizer(config, load_tokenizer(config.data.tokenizer))
    program = steps_lib.build(config, mesh, steps=config.steps or 1000)
    rows, length = config.batch_size, config.data.max_length
    array = lambda shape, dtype: jax.ShapeDtypeStruct((rows, shape), dtype, sharding=program.batch_sharding)
    examples = config.data.max_examples_per_row or EXAMPLES_PER_ROW
    batch = PackedBatch(
        array(length, jnp.int32), array(examples, jnp.int32), array(examples, jnp.int32), array(examples, jnp.uint32)
    )
    done = flops.Work(*(rows * float(x) for x in config.objective.work(np.float32(length))))
    needed = flops.train_flops(config.model, done)
    again = flops.recomputed_flops(config.model, done)
    split, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    moved = roofline.train_bytes(config.model, done, split, config.accumulation, mesh.shape["fsdp"] * tensor, tensor)
    work = Work(
        rows * length,
        needed,
        (needed + again) / mesh.size,
        moved,
        config.model.num_layers,
        config.accumulation,
        smallest_matrix(config.model, mesh.shape["fsdp"] * tensor),
    )
    return program.train.lower(program.abstract_state, batch), work


def smallest_matrix(model: ModelConfig, shards: int) -> int:
    """Bytes in bfloat16 that one of so many devices holds of a layer's smallest matrix."""
    return 2 * model.hidden_size * model.num_kv_heads * model.head_dim // shards


def decode_program(
    config: Config, mesh: Mesh, sampler_config: SamplerConfig, batch: int, prompt_length: int
) -> tuple[jax.stages.Lowered, Work]:
    """The decoding loop over `batch` rows with prompts of up to `prompt_length` tokens, and the work of one pass."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % shards:
        raise UserError(
            f"--batch {batch} does not split over the mesh's data x fsdp = {shards} devices. Set --config.mesh.fsdp=1 "
            "--config.mesh.tensor=-1, or take a multiple."
        )
    sampler = programs.make_sampler(config.model, sampler_config, batch, mesh)
    model = sampler.model
    filled = prompt_length + sampler.length
    weights = decode_weights(model, mesh)
    settings = Settings.of(sampler_config, model.eos_token_id)
    state = decode_state(sampler, settings, mesh, batch, programs.cache_bucket(filled + sampler.window))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    lowered = programs.programs(sampler, mesh).run.lower(weights, state, scalar, scalar)
    tokens = batch * (filled if sampler.in_place else sampler.window)  # in place at most everything
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * tokens * filled
    needed = 2 * flops.matmul_params(model) * tokens + attention
    # Every matrix is read once, and what is filled of the cache; of an embedding that is no head, a few rows.
    read = device_bytes(weights) - (0 if model.tie_embeddings else device_bytes(weights["embed"]))
    keys = jax.tree.leaves(state.cache.k)
    read += 2 * device_bytes(keys) * filled / state.cache.cache_length
    layer = device_bytes(keys) // model.num_layers
    matrix = smallest_matrix(model, mesh.shape["tensor"]) // (2 if model.quantise else 1)
    return lowered, Work(tokens, needed, needed / mesh.size, read, model.num_layers, None, min(layer, matrix))


def device_bytes(tree) -> int:
    """Bytes of abstract arrays that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def decode_weights(model: ModelConfig, mesh: Mesh) -> dict:
    """Abstract parameters of a decoding model, in its compute dtype or quantised, as they lie on the mesh."""
    stacked = nn.unbox(sharding.abstract_params(model))
    specs = sharding.param_specs(model, sharding.DECODE_RULES)
    sharding.check_model(model, mesh, sharding.DECODE_RULES)
    dtype = lambda p: p.dtype if model.quantise else model.dtype
    place = lambda p, spec: jax.ShapeDtypeStruct(p.shape, dtype(p), sharding=NamedSharding(mesh, spec))
    if model.scan_layers:
        return jax.tree.map(place, stacked, specs)
    one = lambda spec: PartitionSpec(*spec[1:])
    layer = jax.tree.map(one, specs["layers"], is_leaf=lambda x: isinstance(x, PartitionSpec))
    each = jax.eval_shape(unstacked, stacked)
    return jax.tree.map(place, each, {name: specs.get(name, layer) for name in each})


def decode_state(sampler, settings: Settings, mesh: Mesh, batch: int, cache_length: int):
    """The abstract state of an empty batch, as it lies on the mesh."""
    with sharding.use(mesh, sharding.DECODE_RULES):
        state = jax.eval_shape(lambda: programs.empty(sampler, settings, batch, cache_length))
    rows = ("data", "fsdp")
    place = lambda x, *spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    entries = lambda x: place(x, *(None,) * (x.ndim - 4), rows, "tensor")
    k, v = jax.tree.map(entries, (state.cache.k, state.cache.v))
    cache = state.cache.replace(k=k, v=v, length=place(state.cache.length, rows))
    return state.replace(cache=cache, rows=jax.tree.map(lambda x: place(x, rows), state.rows))


def shardings(config: ModelConfig) -> str:
    """A line for every parameter: path, shape, and the mesh axis of each dimension in training and in decoding."""
    shapes = jax.tree_util.tree_leaves_with_path(nn.unbox(sharding.abstract_params(config)))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    specs = [
        jax.tree.leaves(sharding.param_specs(config, rules), is_leaf=is_spec)
        for rules in (sharding.TRAIN_RULES, sharding.DECODE_RULES)
    ]
    show = lambda axes, rank: " x ".join(str(axis or ".") for axis in (*axes, *[None] * (rank - len(axes))))
    rows = [
        ["/".join(key.key for key in path), " x ".join(map(str, a.shape)), show(train, a.ndim), show(decode, a.ndim)]
        for (path, a), train, decode in zip(shapes, *specs, strict=True)
    ]
    rows.insert(0, ["parameter", "shape", "training", "decoding"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows) + "\n"


def report(compiled: jax.stages.Compiled, mesh: Mesh, work: Work) -> dict:
    """Everything there is to say about a compiled program, ready for JSON."""
    memory = compiled.memory_analysis()
    kind = mesh.devices.flat[0].device_kind
    chip = flops.CHIPS.get(kind)
    program = Program(compiled.as_text())
    collectives = collective_list(program, mesh)
    seconds = roofline.estimate(mesh, kind, work.flops, work.bytes, collectives)
    result = {
        "devices": mesh.size,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "chip_bytes": chip.memory if chip else None,
        "collectives": summary(collectives),
        "tokens": work.tokens,
        "model_flops": work.model_flops,
        "device_flops": work.flops,
        "device_bytes": work.bytes,
        **launched(program, work),
        "seconds": seconds,
    }
    if seconds:
        result["tokens_per_second"] = work.tokens / seconds["step"]
        result["mfu_bound"] = work.model_flops / (seconds["step"] * chip.peak_flops * mesh.size)
    return result


def launched(program: Program, work: Work) -> dict:
    """What one forward pass of decoding, or one microbatch of training, launches, moves and copies on a device."""
    computation = program.outer_loop() if work.parts is None else "ENTRY"
    found, parts = program.work(computation, work.least), work.parts or 1
    in_layers = sum(runs for _, kernel, runs in program.kernels(computation) if of_layer(program, kernel))
    return {
        "kernels": found.kernels / parts,
        "kernels_per_layer": in_layers / parts / work.layers,
        "dynamic_loops": found.dynamic_loops / parts,
        "conditionals": found.conditionals / parts,
        "copied_bytes": found.copied_bytes / parts,
        "moved_bytes": found.moved_bytes / parts,
        "moved_ratio": found.moved_bytes / work.bytes,
    }


def of_layer(program: Program, kernel: Instruction) -> bool:
    """Whether a kernel is part of a layer. Fusions without a name are: pieces that XLA splits products into."""
    sources = program.sources(kernel)
    return any(map(LAYER.search, sources)) or (not sources and kernel.opcode == "fusion")


def summary(collectives: list[Collective]) -> list[dict]:
    """Collectives by kind, mesh axes, network, and whether they may be skipped, the largest first."""
    groups: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for collective in collectives:
        groups[collective.kind, collective.axes, collective.between_slices, collective.conditional].append(collective)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "between_slices": between_slices,
            "conditional": conditional,
            "runs": sum(c.runs for c in group),
            "bytes": math.fsum(c.bytes * c.runs for c in group),
        }
        for (kind, axes, between_slices, conditional), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def describe(result: dict) -> str:
    """The report as text."""
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [f"{result['program']} on {result['topology']}: {result['devices']} x {result['device_kind']}, mesh {mesh}"]
    memory = ", ".join(
        f"{what} {gib(result[key])}"
        for what, key in (("arguments", "argument_bytes"), ("temporaries", "temporary_bytes"), ("peak", "peak_bytes"))
    )
    if result["chip_bytes"]:
        spare = result["chip_bytes"] - result["peak_bytes"]
        memory += f" of {gib(result['chip_bytes'])}: " + (
            f"fits, {gib(spare)} to spare" if spare >= 0 else f"does not fit, {gib(-spare)} are missing"
        )
    lines.append(f"memory per device: {memory}")
    lines.append("sent by each device" + (":" if result["collectives"] else ": nothing"))
    lines += [
        f"  {row['kind']:<20}{' x '.join(row['axes']):<18}{row['runs']:>7} runs {row['bytes'] / 1e9:>10.3f} "
        f"GB{' between slices' * row['between_slices']}{' (in a branch)' * row['conditional']}"
        for row in result["collectives"]
    ]
    lines.append(
        f"work: {result['model_flops']:.3g} FLOP for {result['tokens']:.0f} tokens; each device "
        f"{result['device_flops']:.3g} FLOP, {result['device_bytes'] / 1e9:.1f} GB of memory traffic (formula)"
    )
    lines.append(
        f"one {'forward pass' if result['decoding'] else 'microbatch'} on a device: {result['kernels']:.0f} kernels "
        f"({result['kernels_per_layer']:.1f} per layer), {result['dynamic_loops']:g} loops of unknown length, "
        f"{result['conditionals']:g} conditionals; moves {result['moved_bytes'] / 1e9:.1f} GB "
        f"({result['moved_ratio']:.2f} of the formula), copies {result['copied_bytes'] / 1e9:.2f} GB of its arguments"
    )
    if result["seconds"]:
        seconds = ", ".join(
            f"{name} {result['seconds'][name] * 1e3:.1f} ms" for name in ("compute", "memory", "interconnect")
        )
        lines.append(
            f"at least {result['seconds']['step'] * 1e3:.1f} ms, limited by {result['seconds']['limit']} ({seconds}); "
            f"at most {result['tokens_per_second']:.3g} tokens/s, MFU {result['mfu_bound']:.2f}"
        )
    lines.append(f"compiled in {result['compile_seconds']:.0f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--topology",
        default="local",
        help="v5p:4x4x4 (TPU chips), h100:8 (GPUs of one host), h100:2x8 (hosts x GPUs) and the like, or local: this "
        "machine's devices",
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of a TPU topology, joined by the network")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="the decoding loop instead of the training step (GSM8K settings); figures are per forward pass",
    )
    parser.add_argument("--batch", type=int, default=32, help="rows to decode")
    parser.add_argument("--prompt-length", type=int, default=512, help="longest prompt to decode")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="write the compiled program's text there")
    parser.add_argument("--shardings", action="store_true", help="only print every parameter's shape and sharding")
    add_sampler_arguments(parser)
    arguments, config = parse_config(parser)
    if arguments.shardings:
        sys.stdout.write(shardings(config.model))
        return

    if arguments.topology != "local":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # it cannot read back a program for an absent device
    devices = topology_devices(arguments.topology, arguments.slices)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    where = arguments.topology if arguments.slices == 1 else f"{arguments.slices} slices of {arguments.topology}"
    if arguments.decode:
        method = arguments.method or "plan_and_infill"
        given = flags_given(arguments, [field.name for field in dataclasses.fields(METHODS[method])])
        sampler = sampler_config(method, **given)
        lowered, work = decode_program(config, mesh, sampler, arguments.batch, arguments.prompt_length)
        settings = ", ".join([f"{arguments.batch} rows", method, *(f"{name} {given[name]}" for name in given)])
        program = (
            f"decoding with {arguments.config} ({settings}, prompts of {arguments.prompt_length}, answers of "
            f"{sampler.length})"
        )
    else:
        lowered, work = train_program(config, mesh)
        settings = f"accumulation {config.accumulation}, remat {config.model.remat}"
        program = (
            f"training step of {arguments.config} ({config.batch_size} rows of {config.data.max_length}, {settings})"
        )
    compiled, seconds = compile_program(lowered, where, mesh)
    result = {
        "program": program,
        "decoding": arguments.decode,
        "settings": settings,
        "topology": where,
        "compile_seconds": seconds,
        **report(compiled, mesh, work),
    }
    print(describe(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.hlo:
        arguments.hlo.write_text(compiled.as_text())


if __name__ == "__main__":
    run_main(main)
