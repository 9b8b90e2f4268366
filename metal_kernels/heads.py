"""How a fused projection becomes heads: counts, norms and rotation, in the form that both paths use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Heads(NamedTuple):
    """Layout and per-head arithmetic of qkv [B, T, (num_heads + 2 num_kv_heads) * D], rows [Q | K | V].

    Attributes:
        num_heads: Of q.
        num_kv_heads: Of k and of v.
        q_weight: RMSNorm weight of q [D], or None without norms.
        k_weight: RMSNorm weight of k [D], or None.
        eps: Of both norms.
        inv_freq: Rotation a position of each pair [R/2] float32.
        rope_scale: Factor of the rotated dims.
        rope: The same rotation as MLX operations: x [B, heads, T, D] and the first position to x rotated.
    """

    num_heads: int
    num_kv_heads: int
    q_weight: mx.array | None
    k_weight: mx.array | None
    eps: float
    inv_freq: mx.array
    rope_scale: float
    rope: Callable[..., mx.array]

    def split(self, qkv: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q [B, num_heads, T, D], k and v [B, num_kv_heads, T, D], normed and rotated by MLX operations."""
        heads = mx.unflatten(qkv, -1, (self.num_heads + 2 * self.num_kv_heads, -1)).transpose(0, 2, 1, 3)
        qk, v = mx.split(heads, [self.num_heads + self.num_kv_heads], axis=1)
        if self.q_weight is not None and self.k_weight is not None:
            D = qkv.shape[-1] // (self.num_heads + 2 * self.num_kv_heads)
            q_weight = mx.broadcast_to(self.q_weight, (self.num_heads, 1, D))
            k_weight = mx.broadcast_to(self.k_weight, (self.num_kv_heads, 1, D))
            qk = mx.fast.rms_norm(qk, None, self.eps) * mx.concatenate([q_weight, k_weight])
        q, k = mx.split(self.rope(qk, offset=offset), [self.num_heads], axis=1)
        return q, k, v
