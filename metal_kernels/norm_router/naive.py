"""Residual, RMSNorm and the router's product in MLX operations."""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.packed import Packed


def naive_norm_router(
    x: mx.array, r: mx.array | None, weight: mx.array, router: Packed, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Add a layer's result to the residual stream, normalise, and score the experts.

    ::

        x_new = x + r
        normed = weight * x_new / sqrt(mean(x_new^2) + eps)
        logits = normed router^T

    Args:
        x: Residual stream [..., hidden], any float dtype.
        r: What is added [..., hidden], any float dtype, rounded to that of x first; None adds nothing.
        weight: Of the norm [hidden].
        router: [E, hidden], plain or quantized.
        eps: Added to the mean square.
        dtype: Of ``normed`` as returned; None leaves it as the norm returns it.

    Returns:
        x_new [..., hidden] in the dtype of x, rounded once (x itself without r); normed [..., hidden], which the norm
        rounds to the common dtype of x and weight, once before and once after the weight; logits [..., E] float32, of
        ``normed`` as the norm returns it, before ``dtype``, in float32.

    Source: arXiv 2510.19338, section 2 (router in float32).
    """
    x, normed = naive_add_norm(x, r, weight, eps)
    logits = normed.astype(mx.float32) @ router.dequantize().T
    return x, normed if dtype is None else normed.astype(dtype), logits


def naive_add_norm(
    x: mx.array, r: mx.array | None, weight: mx.array, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """``x_new`` and ``normed`` of `naive_norm_router`."""
    x = x if r is None else x + r.astype(x.dtype)
    normed = mx.fast.rms_norm(x, weight, eps)
    return x, normed if dtype is None else normed.astype(dtype)
