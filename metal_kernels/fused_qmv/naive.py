"""Products with what stands before and after them, in MLX operations: the definition that the kernel is held to."""

from __future__ import annotations

from operator import itemgetter

import mlx.core as mx
from mlx.core import array

from metal_kernels.linear_gate.naive import naive_linear_gate
from metal_kernels.packed import Matrices, Packed

ROWS = 8192  # that are unpacked at once


def naive_norm_qmv(
    x: array, weight: array, eps: float, matrices: Matrices, dtype: mx.Dtype | None = None
) -> tuple[array, ...]:
    """Normalise and multiply by one or two matrices.

    ::

        normed = weight * x / sqrt(mean(x^2) + eps)
        y_i = normed matrix_i^T

    Args:
        x: [..., K], any float dtype.
        weight: Of the norm [K].
        eps: Added to the mean square.
        matrices: One or two, [N_i, K].
        dtype: What ``normed`` is rounded to before the products; None leaves it as the norm returns it.

    Returns:
        y_i [..., N_i] in the dtype of ``normed``: a float32 product of the dequantized weights, rounded once. ``normed``
        itself rounds as MLX's norm does, to the common dtype of x and weight, before and after the weight.

    Source: arXiv 2510.19338, section 2.
    """
    normed = mx.fast.rms_norm(x, weight, eps)
    normed = normed if dtype is None else normed.astype(dtype)
    return tuple(_product(normed, w).astype(normed.dtype) for w in matrices.all)


def naive_gate_qmv(
    x: array, gate: array, weight: array, groups: int, eps: float, matrices: Matrices, residual: array | None = None
) -> array:
    """The linear gate, a product, and what it is added to.

    ::

        y = residual + linear_gate(x, gate) matrix^T

    Args:
        x: Concatenated heads [..., K], any float dtype.
        gate: Gate logits [..., K]; the gated x is rounded to their dtype.
        weight: Of the grouped norm [K].
        groups: Number of groups, a divisor of K.
        eps: Added to the mean square.
        matrices: One, [N, K].
        residual: [..., N]; None is zero.

    Returns:
        y [..., N] in the dtype of ``residual``, or of ``gate`` without one, rounded once after the addition.

    Source: arXiv 2510.19338, section 2 (group RMSNorm and output gate of the linear layers).
    """
    return naive_add_qmv(naive_linear_gate(x, gate, weight, groups, eps), matrices, residual)


def naive_add_qmv(x: array, matrices: Matrices, residual: array | None = None) -> array:
    """``residual + x matrix^T``, rounded as in `naive_gate_qmv`; without a residual to the dtype of x."""
    y = _product(x, matrices.first)
    return y.astype(x.dtype) if residual is None else (residual.astype(mx.float32) + y).astype(residual.dtype)


def naive_head(x: array, weight: array, eps: float, matrices: Matrices) -> array:
    """The last norm and the head: `naive_norm_qmv` of one matrix [N, K], whose rows are very many."""
    return naive_norm_qmv(x, weight, eps, matrices)[0]


def _product(x: array, w: Packed) -> array:
    return mx.concatenate([x.astype(mx.float32) @ part.dequantize().T for part in _parts(w)], axis=-1)


def _parts(w: Packed) -> list[Packed]:
    """Some rows each: a whole head, unpacked, would be gigabytes."""
    return [w.map(itemgetter(slice(start, start + ROWS))) for start in range(0, w.shape[0], ROWS)]
