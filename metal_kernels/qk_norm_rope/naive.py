"""QK-norm, rotary embedding and split in float32 MLX operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx


class Projection(NamedTuple):
    """A fused projection, and how its heads are normed and rotated.

    Attributes:
        qkv: [B, T, (num_heads + 2 num_kv_heads) * D], rows [Q | K | V], any float dtype.
        q_weight: Norm weight of q [D]; None leaves q and k as they are.
        k_weight: Norm weight of k [D], or None together with ``q_weight``.
        inv_freq: Rotation per position of each pair [R/2] float32, R <= D.
        rope_scale: Factor of the rotated dims; 1 but for scaled contexts.
        offset: Position of the first token, one for all rows or [B] int32.
        eps: Added to the mean square.
        num_heads: Heads of q.
        num_kv_heads: Heads of k and of v.
    """

    qkv: mx.array
    q_weight: mx.array | None
    k_weight: mx.array | None
    inv_freq: mx.array
    rope_scale: float
    offset: int | mx.array
    eps: float
    num_heads: int
    num_kv_heads: int


def naive_qk_norm_rope(*arguments: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Split the fused projection into heads, normalise q and k per head and rotate their first R dims.

    With p the position of a token, for each head x of q and k::

        y = x / sqrt(mean(x^2) + eps) * weight
        a, b = y[:R/2], y[R/2:R],  angle = p * inv_freq
        y[:R] = rope_scale * [a cos(angle) - b sin(angle), b cos(angle) + a sin(angle)]

    Args:
        arguments: The fields of `Projection`.

    Returns:
        q [B, num_heads, T, D], k and v [B, num_kv_heads, T, D], in the dtype of ``qkv``, rounded once.

    Source: arXiv 2510.19338, section 2; rotation as in arXiv 2104.09864, halves paired as in GPT-NeoX.
    """
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, eps, num_heads, num_kv_heads = Projection(*arguments)
    B, T, _ = qkv.shape
    x = qkv.astype(mx.float32).reshape(B, T, num_heads + 2 * num_kv_heads, -1).transpose(0, 2, 1, 3)
    q, k, v = mx.split(x, [num_heads, num_heads + num_kv_heads], axis=1)
    if q_weight is not None and k_weight is not None:
        q, k = (mx.fast.rms_norm(y, w.astype(mx.float32), eps) for y, w in ((q, q_weight), (k, k_weight)))
    start = mx.array(offset).reshape(-1, 1, 1, 1)
    angle = (start + mx.arange(T)[:, None]).astype(mx.float32) * inv_freq
    q, k = (_rotate(y, mx.cos(angle), mx.sin(angle), rope_scale) for y in (q, k))
    return q.astype(qkv.dtype), k.astype(qkv.dtype), v.astype(qkv.dtype)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array, rope_scale: float) -> mx.array:
    half = cos.shape[-1]
    a, b, rest = mx.split(x, [half, 2 * half], axis=-1)
    return mx.concatenate([rope_scale * (a * cos - b * sin), rope_scale * (b * cos + a * sin), rest], axis=-1)
