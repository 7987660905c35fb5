"""Floating-point operations of a step by formula, and what chips can do.

A formula, because XLA's own count sees the body of a scan over layers once.
"""

import dataclasses

from refusion_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of one JAX device.

    Attributes:
      peak_flops: dense bfloat16 matrix operations per second.
      memory: bytes of device memory.
      bandwidth: bytes per second of device memory.
    """

    peak_flops: float
    memory: float
    bandwidth: float


# By jax.Device.device_kind. A TPU7x chip is two devices.
CHIPS = {
    "TPU v4": Chip(275e12, 32e9, 1.2e12),
    "TPU v5 lite": Chip(197e12, 16e9, 0.82e12),
    "TPU v5": Chip(459e12, 95e9, 2.77e12),
    "TPU v6 lite": Chip(918e12, 32e9, 1.64e12),
    "TPU7x": Chip(1153.5e12, 96e9, 3.69e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.04e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
}


def matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all but the norms and the embedding look-up, the head included."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    layer = 2 * d * config.num_heads * h + 2 * d * config.num_kv_heads * h + 3 * d * f
    return config.num_layers * layer + config.vocab_size * d


def train_flops(config: ModelConfig, tokens: float, token_pairs: float) -> float:
    """Operations of one training step: 6 per matrix parameter and token, and 12 per attended pair, head and head_dim.

    Args:
      config: the model.
      tokens: tokens that count (no padding).
      token_pairs: (query, key) pairs that attend: the sum over examples of n (n + 1) / 2.
    """
    return 6 * matmul_params(config) * tokens + 12 * config.num_layers * config.num_heads * config.head_dim * token_pairs
