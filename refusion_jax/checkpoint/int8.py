"""Weights in int8, with a scale for every output channel."""

import numpy as np

from refusion_jax.errors import UserError


def quantise(x: np.ndarray, inputs: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 values q in [-127, 127] and float32 scales, such that q * scale is within scale / 2 of x.

    Args:
      x: weights.
      inputs: the axes that share a scale; the scales have the others.
      where: what x is called, in messages.

    Raises:
      UserError: values that are not finite.
    """
    x = x.astype(np.float32)  # a copy, which becomes q
    top = np.maximum(x.max(inputs, keepdims=True), -x.min(inputs, keepdims=True))
    scale = np.maximum(top / 127, np.finfo(np.float32).tiny)
    if not np.isfinite(scale).all():
        raise UserError(
            f"{where} has values that are not finite, which int8 cannot hold. Download or export the weights again."
        )
    x /= scale
    return np.rint(x, out=x).astype(np.int8), scale.squeeze(inputs)
