"""Float rows to MLX's packed form, by rounding to nearest or by a search for better scales."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ring_mlx.convert.grids import pack
from ring_mlx.convert.recipes import Setting

FITS = ("search", "rtn")
# Starting ranges: each end of a group's range drawn in by these factors.
SHRINK = (1.0, 0.92, 0.84, 0.76)
ROUNDS = 2
TINY = 1e-20


def quantize(w: mx.array, setting: Setting, dtype: mx.Dtype, fit: str = "search") -> dict[str, mx.array]:
    """Quantize rows w [n, cols] to ``weight``, ``scales`` and for affine ``biases``, as ``mx.quantize`` gives them.

    Scales and biases are of ``dtype``, and fitted by "search" or "rtn". Other modes than affine are always rounded.
    """
    packed: Any = mx.quantize(w.astype(dtype), setting.group_size, setting.bits, setting.mode)
    if setting.mode != "affine":
        return dict(zip(("weight", "scales"), packed, strict=True))
    weight, scales, biases = packed
    if fit == "search":
        scales, biases, codes = search(w, scales, biases, setting)
        weight = pack(codes, setting.bits)
    return {"weight": weight, "scales": scales, "biases": biases}


def search(w: mx.array, scales: mx.array, biases: mx.array, setting: Setting) -> tuple[mx.array, mx.array, mx.array]:
    """The least squared error that alternating fits find, never more than that of the given scales.

    For every group, from several starting ranges,

    ::

        q = clip(round((w - b) / s), 0, 2^bits - 1),  (s, b) = argmin sum_i (w_i - s q_i - b)^2

    in turn, keeping the best (s, b) after rounding to the stored dtype. Takes w [n, cols] and the scales and biases [n,
    groups] to beat, in the stored dtype; returns such scales and biases, and codes [n, cols] uint32.

    Source: Lloyd's alternation on a uniform grid; half-quadratic quantization (HQQ, Badri and Shaji 2023) alternates
    likewise under another norm.
    """
    n, cols = w.shape
    x = w.astype(mx.float32).reshape(n, -1, setting.group_size)
    top, dtype = float((1 << setting.bits) - 1), scales.dtype
    s, b = (a.astype(mx.float32)[..., None] for a in (scales, biases))
    best = [_error(x, s, b, top), s, b]
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    starts = [(s, b)]
    starts += [(mx.maximum((q * high - p * low) / top, TINY), p * low) for p in SHRINK for q in SHRINK]
    for s, b in starts:
        for _ in range(ROUNDS):
            s, b = _least_squares(x, _codes(x, s, b, top), s, b)
            stored_s, stored_b = (v.astype(dtype).astype(mx.float32) for v in (s, b))
            found = [_error(x, stored_s, stored_b, top), stored_s, stored_b]
            better = found[0] < best[0]
            best = [mx.where(better, new, old) for new, old in zip(found, best, strict=True)]
        mx.eval(best)
    _, s, b = best
    codes = _codes(x, s, b, top).reshape(n, cols).astype(mx.uint32)
    return s[..., 0].astype(dtype), b[..., 0].astype(dtype), codes


def _codes(x: mx.array, s: mx.array, b: mx.array, top: float) -> mx.array:
    safe = mx.where(mx.abs(s) < TINY, 1.0, s)
    return mx.clip(mx.round((x - b) / safe), 0, top)


def _error(x: mx.array, s: mx.array, b: mx.array, top: float) -> mx.array:
    return mx.square(x - (s * _codes(x, s, b, top) + b)).sum(axis=-1, keepdims=True)


def _least_squares(x: mx.array, q: mx.array, s: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """The s and b that minimise sum (x - s q - b)^2; the old ones where q does not vary."""
    mean_q, mean_x = q.mean(axis=-1, keepdims=True), x.mean(axis=-1, keepdims=True)
    variance = mx.square(q - mean_q).mean(axis=-1, keepdims=True)
    covariance = ((q - mean_q) * (x - mean_x)).mean(axis=-1, keepdims=True)
    new_s = covariance / mx.where(variance < 1e-9, 1.0, variance)
    flat = (variance < 1e-9) | (mx.abs(new_s) < TINY)
    return mx.where(flat, s, new_s), mx.where(flat, b, mean_x - new_s * mean_q)
