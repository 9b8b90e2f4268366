"""An independent float64 NumPy implementation of the pieces, written from the equations and not from the product."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def lightning_attn(
    q: Array, k: Array, v: Array, rate: Array, scale: float, state: Array | None, mask: npt.NDArray[np.bool_] | None
) -> tuple[Array, Array]:
    """The recurrence on [B, T, H, K], [B, T, H, K], [B, T, H, V]."""
    B, T, H, K = q.shape
    S = np.zeros((B, H, K, v.shape[-1])) if state is None else state.copy()
    o = np.zeros(v.shape)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                if mask is None or mask[b, t]:
                    S[b, h] = math.exp(-rate[h]) * S[b, h] + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = scale * q[b, t, h] @ S[b, h]
    return o, S


def route(
    logits: Array, bias: Array, top_k: int, n_group: int, topk_group: int, factor: float
) -> tuple[list[int], Array]:
    """One token: chosen experts by falling biased score, ties to the lower index, and their weights."""
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + bias
    size = len(logits) // n_group
    groups = [biased[g * size : (g + 1) * size] for g in range(n_group)]
    best = [sum(sorted(g)[-2:]) for g in groups]
    kept = sorted(range(n_group), key=lambda g: (-best[g], g))[:topk_group]
    candidates = [e for e in range(len(logits)) if e // size in kept]
    chosen = sorted(candidates, key=lambda e: (-biased[e], e))[:top_k]
    weights = scores[chosen] / (scores[chosen].sum() + 1e-20) * factor
    return chosen, weights


def slopes(H: int) -> list[float]:
    """ALiBi slopes by their published recursive definition."""
    if math.log2(H).is_integer():
        start = 2 ** (-(2 ** -(math.log2(H) - 3)))
        return [start * start**i for i in range(H)]
    lower = 2 ** math.floor(math.log2(H))
    return slopes(lower) + slopes(2 * lower)[0::2][: H - lower]


def rope(x: Array, dims: int, theta: float, offset: int) -> Array:
    """NeoX half-split rotation of the first ``dims`` of x [..., T, D]."""
    T = x.shape[-2]
    freq = theta ** (-np.arange(0, dims, 2) / dims)
    angle = (np.arange(T) + offset)[:, None] * freq
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., : dims // 2], x[..., dims // 2 : dims]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., dims:]], axis=-1)
