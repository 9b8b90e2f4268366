"""Norm and product with very many rows in MLX operations: the definition that the kernel is held to."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from mlx.core import array

from metal_kernels.packed import Matrices, Packed

ROWS = 8192  # that are unpacked at once


def naive_head(x: array, weight: array, eps: float, matrices: Matrices) -> array:
    """Normalise and multiply by one matrix of very many rows.

    ::

        y = (weight * x / sqrt(mean(x^2) + eps)) matrix^T

    Args:
        x: [..., K], any float dtype.
        weight: Of the norm [K].
        eps: Added to the mean square.
        matrices: One, [N, K].

    Returns:
        y [..., N] in the common dtype of x and weight, to which the norm rounds before and after its weight: a float32 product of
        the dequantized weights, rounded once.

    Source: arXiv 2510.19338, section 2.
    """
    normed = mx.fast.rms_norm(x, weight, eps)
    wide = normed.astype(mx.float32)
    parts = [wide @ part.dequantize().T for part in _cut(matrices.first)]
    return mx.concatenate(parts, axis=-1).astype(normed.dtype)


def _cut(w: Packed) -> list[Packed]:
    """The rows a few at a time: whole heads would be gigabytes."""
    parts = []
    for start in range(0, w.shape[0], ROWS):
        weight, scales, biases = (
            None if a is None else a[start : start + ROWS] for a in (w.weight, w.scales, w.biases)
        )
        assert weight is not None
        parts.append(replace(w, weight=weight, scales=scales, biases=biases))
    return parts
