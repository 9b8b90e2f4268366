"""Rows of an embedding, and the largest logits, in MLX operations: the definitions that the kernels are held to."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from metal_kernels.packed import Packed


def naive_embed(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> mx.array:
    """Rows ``tokens`` [...] of a matrix [N, K], plain or quantized, rounded once to ``dtype``: [..., K]."""
    if matrix.scales is None:
        return matrix.weight[tokens].astype(dtype)
    scales, biases = (None if a is None else a[tokens] for a in (matrix.scales, matrix.biases))
    return replace(matrix, weight=matrix.weight[tokens], scales=scales, biases=biases).dequantize().astype(dtype)


def naive_peak(x: mx.array) -> tuple[mx.array, mx.array]:
    """Where the largest number of each row [..., N] first stands, [...] uint32, and the number, [...] float32.

    NaN if there is one; the place then is that of a NaN.
    """
    return mx.argmax(x, axis=-1), mx.max(x, axis=-1).astype(mx.float32)
