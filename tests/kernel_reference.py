"""What the tests of the attention kernels hold results to: float64 NumPy, and how much error is too much."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from metal_kernels.lightning_attn.naive import Recurrence
from metal_kernels.qk_norm_rope.naive import Projection
from tests import reference
from tests.compare import relative_rms, to_numpy

Array = npt.NDArray[np.float64]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Half a unit in the last place of float32: no result in float32 can be asked to be better.
FLOAT32_ROUNDING = 2.0**-24


def assert_as_exact(actual: mx.array, naive: mx.array, exact: Array) -> None:
    """Same shape and dtype as the naive form, finite, and at most twice its error against float64."""
    assert actual.shape == naive.shape == exact.shape
    assert actual.dtype == naive.dtype
    assert np.isfinite(to_numpy(actual)).all()
    error, allowed = relative_rms(actual, exact), 2 * relative_rms(naive, exact) + FLOAT32_ROUNDING
    assert error <= allowed, f"relative RMS {error:.3g} exceeds {allowed:.3g}"


def rope_frequencies(R: int, theta: float = 1e6) -> mx.array:
    """[R/2] float32, rotation per position."""
    return theta ** (-mx.arange(0, R, 2) / R)


def qk_norm_rope(*arguments: Any) -> tuple[Array, Array, Array]:
    """The contract of `naive_qk_norm_rope` in float64."""
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, eps, num_heads, num_kv_heads = Projection(*arguments)
    B, T, _ = qkv.shape
    heads = to_numpy(qkv).reshape(B, T, num_heads + 2 * num_kv_heads, -1).transpose(0, 2, 1, 3)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    start = np.array(offset, dtype=np.float64).reshape(-1, 1, 1, 1)
    angle = (start + np.arange(T)[:, None]) * to_numpy(inv_freq)
    return (
        _rotated(_normed(q, q_weight, eps), angle, rope_scale),
        _rotated(_normed(k, k_weight, eps), angle, rope_scale),
        v,
    )


def qkv_lightning_attn(*arguments: Any) -> tuple[Array, Array]:
    """The contract of `naive_qkv_lightning_attn` in float64."""
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, decay_rate, scale, eps, state, mask, each = Recurrence(
        *arguments
    )
    B, T, _ = qkv.shape
    H = decay_rate.shape[0]
    heads = qk_norm_rope(qkv, q_weight, k_weight, inv_freq, rope_scale, offset, eps, H, H)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in heads)
    o, S = lightning_attn(q, k, v, decay_rate, scale, state, mask)
    if each:
        masks = [None if mask is None else mask[:, : t + 1] for t in range(T)]
        read = ((x[:, : t + 1] for x in (q, k, v)) for t in range(T))
        S = np.stack([lightning_attn(*r, decay_rate, scale, state, m)[1] for r, m in zip(read, masks, strict=True)])
    return o.reshape(B, T, -1), S


def lightning_attn(
    q: mx.array | Array,
    k: mx.array | Array,
    v: mx.array | Array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[Array, Array]:
    """The contract of `naive_lightning_attn` in float64."""
    q64, k64, v64, rate64 = (to_numpy(x) for x in (q, k, v, decay_rate))
    state64 = None if state is None else to_numpy(state)
    return reference.lightning_attn(q64, k64, v64, rate64, scale, state64, None if mask is None else np.array(mask))


def _normed(x: Array, weight: mx.array | None, eps: float) -> Array:
    return x if weight is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * to_numpy(weight)


def _rotated(x: Array, angle: Array, rope_scale: float) -> Array:
    half = angle.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([rope_scale * (a * cos - b * sin), rope_scale * (b * cos + a * sin), rest], axis=-1)
