"""The linear gate in float32 MLX operations."""

from __future__ import annotations

import mlx.core as mx


def naive_linear_gate(x: mx.array, gate: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """Normalise each group of channels, scale and gate.

    ::

        y = weight * x / sqrt(mean_group(x^2) + eps) * sigmoid(gate)

    Args:
        x: Concatenated heads [..., D], any float dtype.
        gate: Gate logits [..., D]; its dtype is the result's.
        weight: Full-width weight [D].
        groups: Number of groups, a divisor of D (``group_norm_size`` of the config).
        eps: Added to the mean square.

    Returns:
        y [..., D], computed in float32 and rounded once.

    Raises:
        ValueError: If ``groups`` does not divide D.

    Source: arXiv 2510.19338, section 2 (group RMSNorm and output gate of the linear layers).
    """
    if x.shape[-1] % groups:
        raise ValueError(f"[linear_gate] groups must divide the width {x.shape[-1]} but got {groups}.")
    grouped = mx.unflatten(x.astype(mx.float32), -1, (groups, -1))
    normed = mx.fast.rms_norm(grouped, None, eps).flatten(-2)
    return (weight.astype(mx.float32) * normed * mx.sigmoid(gate.astype(mx.float32))).astype(gate.dtype)
