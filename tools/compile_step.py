"""Compiles the real training step, or a decoding step, for a TPU topology on a machine without one, or for the local devices.

    python tools/compile_step.py --config configs/8b.py --topology v5p:4x4x4 --config.mesh.data=4
    python tools/compile_step.py --config configs/8b.py --topology v6e:2x4 --decode --batch 32 --config.mesh.fsdp=1 --config.mesh.tensor=-1
    python tools/compile_step.py --config configs/8b.py --topology v5p:4x4x4 --slices 2 --config.mesh.data=8

Prints the memory of one device against the chip's, the collectives by kind and mesh axis, the work by formula, and a lower bound
of the step's time with what limits it. TPU topologies need libtpu: pip install 'refusion_jax[tpu]'.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
# Read by libtpu when it is loaded: it is only to compile, beside others that do so, and not to look for TPUs.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusion_jax import step as steps_lib
from refusion_jax.config import Config, add_config_arguments, parse_config
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError, run_main
from refusion_jax.metrics import flops, roofline
from refusion_jax.metrics.hlo import Collective, collective_list
from refusion_jax.model.cache import KVCache
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.slots import PackedBatch
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import batching
from refusion_jax.sampling.config import SamplerConfig, Settings
from refusion_jax.sampling.state import State
from refusion_jax.train import with_tokenizer

EXAMPLES_PER_ROW = 32  # where the config leaves it to the data


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of a program does on one device, by formula.

    Attributes:
      tokens: useful tokens of the whole program's call, all devices.
      model_flops: operations that the result needs, all devices.
      flops: operations of one device, recomputation included.
      bytes: that the memory of one device moves.
    """

    tokens: float
    model_flops: float
    flops: float
    bytes: float


def topology_devices(name: str, slices: int = 1) -> list:
    """Devices of a TPU topology such as v5p:4x4x4 (chips), or of this machine for "local".

    Raises:
      UserError: no such topology, or no compiler for it on this machine.
    """
    if name == "local":
        return jax.devices()
    if not re.fullmatch(r"v[\w]+:\d+(x\d+){1,2}|tpu7x:\d+x\d+x\d+", name):
        raise UserError(
            f"Topology {name!r} is not of the form GENERATION:CHIPSxCHIPS, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or "
            "tpu7x:4x4x4; or give local."
        )
    one_host = {"v5e:1x1": (1, 1, 1), "v6e:1x1": (1, 1, 1)}.get(name)
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        options |= {"chips_per_host_bounds": one_host} if one_host else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu has no types for these
        if "libtpu" in str(error) or isinstance(error, NotImplementedError):
            raise UserError(
                "Compiling for TPUs needs libtpu, which cannot be loaded here; pip install 'refusion_jax[tpu]' (on "
                "Linux)."
            ) from error
        raise UserError(
            f"There is no TPU topology {name!r} ({str(error).splitlines()[0]}). Examples: v5e:2x2 to v5e:16x16, "
            "v5p:2x2x1 to v5p:8x16x16, v6e:2x2 to v6e:16x16, tpu7x:4x4x4."
        ) from error


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
    tokens, pairs = rows * length, rows * length * (length + 1) / 2
    needed = flops.train_flops(config.model, tokens, pairs)
    again = flops.recomputed_flops(config.model, tokens, pairs)
    split, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    moved = roofline.train_bytes(config.model, tokens / split, config.accumulation, mesh.shape["fsdp"] * tensor, tensor)
    return program.train.lower(program.abstract_state, batch), Work(tokens, needed, (needed + again) / mesh.size, moved)


def decode_program(
    config: Config, mesh: Mesh, sampler_config: SamplerConfig, batch: int, prompt_length: int
) -> tuple[jax.stages.Lowered, Work]:
    """The decoding loop over `batch` rows with prompts of up to `prompt_length` tokens, and the work of one forward pass."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % shards:
        raise UserError(
            f"--batch {batch} does not split over the mesh's data x fsdp = {shards} devices. Set --config.mesh.fsdp=1 "
            "--config.mesh.tensor=-1, or take a multiple."
        )
    model = config.model
    with sharding.use(mesh, sharding.DECODE_RULES):
        sampler = batching.make_sampler(model, sampler_config, batch)
    cache_length = batching.bucket(prompt_length) + sampler_config.length + sampler.window
    place = lambda abstract, shard: jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=shard)
    weights = jax.tree.map(
        lambda p, shard: jax.ShapeDtypeStruct(p.shape, model.dtype, sharding=shard),
        nn.unbox(sharding.abstract_params(model)),
        sharding.param_shardings(model, mesh, sharding.DECODE_RULES),
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cache = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))
    state = jax.eval_shape(lambda: sampler.empty(batch, cache_length))
    state = State(
        cache=KVCache(
            k=place(state.cache.k, cache), v=place(state.cache.v, cache), length=place(state.cache.length, rows)
        ),
        rows=jax.tree.map(lambda a: place(a, rows), state.rows),
    )
    everywhere = sharding.replicated(mesh)
    settings = jax.tree.map(lambda a: place(a, everywhere), Settings.of(sampler_config))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    with sharding.use(mesh, sharding.DECODE_RULES):
        lowered = batching.run.lower(sampler, weights, state, settings, scalar, scalar)
    tokens = batch * sampler.window
    needed = (
        2 * flops.matmul_params(model) * tokens
        + 4 * model.num_layers * model.num_heads * model.head_dim * tokens * cache_length
    )
    return lowered, Work(
        tokens,
        needed,
        needed / mesh.size,
        roofline.decode_bytes(model, batch / shards, cache_length, mesh.shape["tensor"]),
    )


def compile_program(lowered: jax.stages.Lowered, where: str) -> tuple[jax.stages.Compiled, float]:
    """The compiled program and the seconds that took.

    Raises:
      UserError: it does not fit the device's memory; the message says by how much.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(str(error), where)) from error
    return compiled, time.perf_counter() - start


def out_of_memory(message: str, where: str) -> str:
    """One paragraph from the compiler's, with the bytes that are missing."""
    sizes = re.search(r"\(?([\d.]+)G\)? (?:exceeds available HBM \(|of )([\d.]+)G", message)
    fixes = "Shard the parameters over more devices (config.mesh), raise config.accumulation, use config.model.remat = 'full', lower config.objective.loss_chunk, or take a larger topology."
    if not sizes:
        return f"The program does not fit the memory of a device of {where}: {message.splitlines()[0]} {fixes}"
    need, have = map(float, sizes.groups())
    return f"The program needs at least {need:.2f} GiB on each device of {where}, which has {have:.2f} GiB: {need - have:.2f} GiB are missing. {fixes}"


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
    collectives = collective_list(compiled.as_text(), mesh)
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
        "seconds": seconds,
    }
    if seconds:
        result["tokens_per_second"] = work.tokens / seconds["step"]
        result["mfu_bound"] = work.model_flops / (seconds["step"] * chip.peak_flops * mesh.size)
    return result


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
    memory = f"arguments {gib(result['argument_bytes'])}, temporaries {gib(result['temporary_bytes'])}, peak {gib(result['peak_bytes'])}"
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
        "--topology", default="local", help="such as v5p:4x4x4 (chips), or local: this machine's devices"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, joined by the network")
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
    arguments, config = parse_config(parser)
    if arguments.shardings:
        sys.stdout.write(shardings(config.model))
        return

    if arguments.topology != "local":
        jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(arguments.topology, arguments.slices)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    where = arguments.topology if arguments.slices == 1 else f"{arguments.slices} slices of {arguments.topology}"
    if arguments.decode:
        sampler = SamplerConfig()
        lowered, work = decode_program(config, mesh, sampler, arguments.batch, arguments.prompt_length)
        settings = f"{arguments.batch} rows"
        program = f"decoding with {arguments.config} ({arguments.batch} rows, prompts of {arguments.prompt_length}, answers of {sampler.length})"
    else:
        lowered, work = train_program(config, mesh)
        settings = f"accumulation {config.accumulation}, remat {config.model.remat}"
        program = (
            f"training step of {arguments.config} ({config.batch_size} rows of {config.data.max_length}, {settings})"
        )
    compiled, seconds = compile_program(lowered, where)
    result = {
        "program": program,
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
