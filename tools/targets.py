"""Compiling for devices that a machine need not have: TPU and GPU topologies by name."""

import importlib.util
import os
import re
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from refusion_jax.errors import UserError
from refusion_jax.metrics.flops import CHIPS, Chip

GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
# Read by libtpu when it is loaded: it is only to compile, beside others that do so, and not to look for TPUs.
TPU_ENVIRONMENT = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
# As text in protobuf's format. What is not in the table of chips has been the same for all GPUs since Ampere.
GPU_TARGET = """
gpu_device_info {{
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock} l2_cache_size: {cache}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} shared_memory_per_block: 49152
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 28 }} runtime_version {{ major: 13 }}
"""


def topology_devices(name: str, slices: int = 1) -> list:
    """Devices of a topology: TPU chips such as v5p:4x4x4, GPUs such as h100:8 or h100:2x8 (hosts), or "local" ones.

    Raises:
      UserError: no such topology, or no compiler for it on this machine.
    """
    if name == "local":
        return jax.devices()
    gpu = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", name)
    if gpu and gpu.group(1) in GPUS:
        if slices > 1:
            raise UserError(f"--slices {slices} is for TPUs; the hosts of GPUs are part of the name, such as h100:2x8.")
        return gpu_devices(GPUS[gpu.group(1)], hosts=int(gpu.group(2) or 1), per_host=int(gpu.group(3)))
    if not re.fullmatch(r"v[\w]+:\d+(x\d+){1,2}|tpu7x:\d+x\d+x\d+", name):
        raise UserError(
            f"Topology {name!r} is not of the form GENERATION:CHIPSxCHIPS, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or "
            f"tpu7x:4x4x4, nor GPU:NUMBER or GPU:HOSTSxNUMBER with one of {', '.join(GPUS)}, such as h100:8 or "
            "h100:2x8; or give local."
        )
    return tpu_devices(name, slices)


def tpu_devices(name: str, slices: int) -> list:
    one_host = {"v5e:1x1": (1, 1, 1), "v6e:1x1": (1, 1, 1)}.get(name)
    os.environ.update(TPU_ENVIRONMENT)
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


def gpu_devices(kind: str, hosts: int, per_host: int) -> list:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            "Compiling for NVIDIA GPUs needs XLA's compiler for them and the CUDA libraries, which are not installed "
            "here; pip install 'refusion_jax[cuda]' (Linux; 7 GB; no GPU and no driver are needed to compile)."
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check of versions needs a driver
    target, shape = gpu_target(kind, CHIPS[kind]), f"1x{hosts}x{per_host}"
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices


def gpu_target(kind: str, chip: Chip) -> str:
    """What XLA compiles for instead of asking a device."""
    gpu = chip.gpu
    return GPU_TARGET.format(
        kind=kind,
        bandwidth=int(chip.bandwidth),
        memory=int(chip.memory),
        cores=gpu.cores,
        lanes=gpu.lanes,
        clock=gpu.clock,
        cache=gpu.cache,
        shared=gpu.shared_memory,
        optin=gpu.shared_memory - 1024,
        major=gpu.capability[0],
        minor=gpu.capability[1],
    )


def compile_program(lowered: jax.stages.Lowered, where: str, mesh: Mesh) -> tuple[jax.stages.Compiled, float]:
    """The compiled program and the seconds that took.

    Raises:
      UserError: it does not fit the device's memory; the message says by how much.
    """
    kind = mesh.devices.flat[0].device_kind
    # Choosing among kernels by their times needs the device.
    absent = CHIPS.get(kind) and CHIPS[kind].gpu and jax.default_backend() != "gpu"
    options = {"xla_gpu_autotune_level": "0"} if absent else None
    start = time.perf_counter()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(str(error), where)) from error
    return compiled, time.perf_counter() - start


def out_of_memory(message: str, where: str) -> str:
    """One paragraph from the compiler's, with the bytes that are missing."""
    sizes = re.search(r"\(?([\d.]+)G\)? (?:exceeds available HBM \(|of )([\d.]+)G", message)
    fixes = (
        "Shard the parameters over more devices (config.mesh), raise config.accumulation, use config.model.remat = "
        "'full', or take a larger topology."
    )
    if not sizes:
        return f"The program does not fit the memory of a device of {where}: {message.splitlines()[0]} {fixes}"
    need, have = map(float, sizes.groups())
    return (
        f"The program needs at least {need:.2f} GiB on each device of {where}, which has {have:.2f} GiB: "
        f"{need - have:.2f} GiB are missing. {fixes}"
    )
