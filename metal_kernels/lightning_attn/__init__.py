"""Lightning attention: linear attention with one fixed decay a head; chooses the form, knows nothing of layers."""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.lightning_attn.chunk import chunk_lightning_attn
from metal_kernels.lightning_attn.naive import naive_lightning_attn

__all__ = ["chunk_lightning_attn", "lightning_attn", "naive_lightning_attn"]

CHUNK_SIZE = 64


def lightning_attn(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_lightning_attn`: one token goes through the recurrence, more through chunks."""
    if q.shape[1] == 1:
        return naive_lightning_attn(q, k, v, decay_rate, scale, state, mask)
    return chunk_lightning_attn(q, k, v, decay_rate, scale, state, mask, chunk_size)
