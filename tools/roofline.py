"""A lower bound of a step's time: compute, device memory and interconnect, at data-sheet rates and fully overlapped."""

import functools
import math

import numpy as np
from collectives import Collective
from jax.sharding import Mesh

from refusion_jax.metrics.flops import CHIPS, Chip, Work
from refusion_jax.model.config import ModelConfig


def train_bytes(config: ModelConfig, work: Work, split: int, microbatches: int, shards: int, tensor: int) -> float:
    """Bytes that one device's memory moves in a training step, by formula.

    Args:
      config: the model; bfloat16 compute over float32 parameters and AdamW state.
      work: of the step on all devices.
      split: parts that its rows are in.
      microbatches: times the weights are gathered anew.
      shards: devices that share the parameters (fsdp x tensor).
      tensor: devices that share one matrix product.
    """
    c, d, h = config, config.hidden_size, config.head_dim
    optimizer = 34 * c.num_params() / shards  # read p, m, v, g; write p, m, v, g in float32, and p in bfloat16
    # Gathered, read, again for the backward pass, read twice; gradients written.
    weights = 2 * 7 * c.num_params() / tensor
    # Inputs and outputs of a layer's products.
    layer = 6 * d + (4 * c.num_heads * h + 6 * c.num_kv_heads * h + 6 * c.intermediate_size) / tensor
    passes = 3 if c.remat == "none" else 4  # forward, again, and two products per product backward
    logits = 4 * 6 * c.vocab_size / tensor
    tokens = work.tokens * 2 * passes * c.num_layers * layer + work.head_tokens * logits
    return optimizer + microbatches * weights + tokens / split


def axis_bandwidth(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> float:
    """Bytes per second that a device sends in a collective over mesh axes, inside a slice where there are several.

    On a TPU the group lies along some dimensions of the torus; each gives a link, and another one where it wraps around
    (dimensions of 16 in two-dimensional tori, multiples of 4 in three-dimensional ones).
    """
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = mesh.devices[index].reshape(-1)
    if getattr(group[0], "platform", "") != "tpu":
        return chip.link if len({d.process_index for d in group}) == 1 else chip.network
    everywhere = np.array([d.coords for d in mesh.devices.reshape(-1)])
    whole = everywhere.max(axis=0) - everywhere.min(axis=0) + 1
    own = np.array([d.coords for d in group])  # the same in every slice
    flat = sum(size > 1 for size in whole) <= 2 and "lite" in group[0].device_kind
    links = 0
    for size, extent in zip(whole, own.max(axis=0) - own.min(axis=0) + 1, strict=True):
        wraps = extent == size and (size == 16 if flat else size % 4 == 0)
        links += 0 if extent == 1 else 2 if wraps else 1
    return chip.link * max(links, 1)  # the two devices of one chip talk faster than over a link


def estimate(
    mesh: Mesh, kind: str, flops: float, memory_bytes: float, collectives: list[Collective]
) -> dict[str, object]:
    """Seconds of each limit, and the largest of them with its name.

    Args:
      mesh: where the program runs.
      kind: jax.Device.device_kind.
      flops: operations of one device.
      memory_bytes: bytes one device's memory moves.
      collectives: of the compiled program; those in branches are left out.

    Returns:
      {"compute", "memory", "interconnect", "step": seconds, "limit": name}; empty for an unknown chip.
    """
    chip = CHIPS.get(kind)
    if chip is None:
        return {}
    rate = functools.cache(
        lambda axes, between_slices: chip.network if between_slices else axis_bandwidth(mesh, axes, chip)
    )
    seconds = {
        "compute": flops / chip.peak_flops,
        "memory": memory_bytes / chip.bandwidth,
        "interconnect": math.fsum(
            c.bytes * c.runs / rate(c.axes, c.between_slices) for c in collectives if not c.conditional
        ),
    }
    limit = max(seconds, key=seconds.get)
    return {**seconds, "step": seconds[limit], "limit": limit}
