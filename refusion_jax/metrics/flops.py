"""Floating-point operations of a step by formula, and what chips can do.

A formula, because XLA's own count sees the body of a scan over layers once.
"""

import dataclasses
from typing import NamedTuple

from refusion_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler wants to know of an NVIDIA GPU besides. Sizes are in bytes.

    Attributes:
      cores: multiprocessors.
      lanes: float32 units of a multiprocessor.
      clock: GHz.
      cache: L2.
      shared_memory: of a multiprocessor; a block of threads may use all but 1 KiB.
      capability: the compute capability, (major, minor).
    """

    cores: int
    lanes: int
    clock: float
    cache: int
    shared_memory: int
    capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of one JAX device.

    Attributes:
      peak_flops: dense bfloat16 matrix operations per second.
      memory: bytes of device memory that a program may use (TPU: what the compiler allows).
      bandwidth: bytes per second of device memory.
      link: bytes per second and direction of one link to a neighbour (TPU), or of all links inside a machine (GPU).
      network: bytes per second to devices of other slices or machines.
      gpu: of a GPU.
    """

    peak_flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    gpu: Gpu | None = None


HOPPER = Gpu(132, 128, 1.98, 50 * 2**20, 228 * 2**10, (9, 0))
# By jax.Device.device_kind. A TPU7x chip is two devices, which share its links.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * 2**30, 1.2e12, 45e9, 3.1e9),
    "TPU v5 lite": Chip(197e12, 15.75 * 2**30, 0.82e12, 45e9, 3.1e9),
    "TPU v5": Chip(459e12, 95.74 * 2**30, 2.77e12, 90e9, 6.2e9),
    "TPU v6 lite": Chip(918e12, 31.25 * 2**30, 1.64e12, 90e9, 12.5e9),
    "TPU7x": Chip(1153.5e12, 94.75 * 2**30, 3.69e12, 50e9, 6.2e9),
    "NVIDIA A100-SXM4-80GB": Chip(
        312e12, 80e9, 2.04e12, 300e9, 25e9, Gpu(108, 64, 1.41, 40 * 2**20, 164 * 2**10, (8, 0))
    ),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12, 450e9, 50e9, HOPPER),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9, 50e9, HOPPER),
    "NVIDIA B200": Chip(2250e12, 180e9, 8e12, 900e9, 50e9, Gpu(148, 128, 1.965, 126 * 2**20, 228 * 2**10, (10, 0))),
}


def matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all but the norms and the embedding look-up, the head included."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    layer = 2 * d * config.num_heads * h + 2 * d * config.num_kv_heads * h + 3 * d * f
    return config.num_layers * layer + config.vocab_size * d


class Work(NamedTuple):
    """What a training step puts through the model; numbers, or arrays of one shape.

    Attributes:
      tokens: through the layers; no padding.
      head_tokens: through the head.
      token_pairs: (query, key) pairs that attend.
    """

    tokens: float
    head_tokens: float
    token_pairs: float


def train_flops(config: ModelConfig, work: Work) -> float:
    """Operations of a training step: 6 per matrix parameter and token, and 12 per attended pair, head and head_dim."""
    head = config.vocab_size * config.hidden_size
    layers = float(matmul_params(config) - head)
    pairs = 12.0 * config.num_layers * config.num_heads * config.head_dim * work.token_pairs
    return 6.0 * layers * work.tokens + 6.0 * head * work.head_tokens + pairs


def recomputed_flops(config: ModelConfig, work: Work) -> float:
    """Operations that a training step does a second time: the loss's logits, and what `config.remat` does not keep."""
    d, f, n, h = config.hidden_size, config.intermediate_size, config.num_heads, config.head_dim
    head = 2 * config.vocab_size * d * work.head_tokens
    attention = 4 * config.num_layers * n * h * work.token_pairs
    layers = 2 * (matmul_params(config) - config.vocab_size * d) * work.tokens
    down = 2 * config.num_layers * d * f * work.tokens  # a layer's last matrix: its product is nobody's input again
    projections = 2 * config.num_layers * (d * n * h + 2 * d * config.num_kv_heads * h) * work.tokens
    return head + {"none": 0, "minimal": layers - down - projections, "full": layers - down + attention}[config.remat]
