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
    top = np.maximum(x.max(inputs, keepdims=True), -x.min(inputs, keepdims=True)).astype(np.float32)
    scale = np.maximum(top / 127, np.finfo(np.float32).tiny)
    if not np.isfinite(scale).all():
        raise UserError(
            f"{where} has values that are not finite, which int8 cannot hold. Download or export the weights again."
        )
    q = np.divide(x, scale, dtype=np.float32)
    return np.rint(q, out=q).astype(np.int8), scale.squeeze(inputs)
