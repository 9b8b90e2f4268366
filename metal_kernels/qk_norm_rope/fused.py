"""QK-norm, rotary embedding and split as one kernel; checks shapes and launches."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels.arguments import FLOATS, Kind, absent, are_norm_weights, bits, kind, kind_or_none, positions
from metal_kernels.launch import Kernel

HERE = Path(__file__).parent
KERNEL = Kernel(
    HERE / "qk_norm_rope.metal",
    ("qkv", "q_weight", "k_weight", "inv_freq", "offset"),
    ("q", "k", "v"),
    [HERE.parent / "quantized_moe" / "codes.metal", HERE.parent / "norm_router" / "packs.metal"],
)
SIMDGROUPS = 8


def supports(
    qkv: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    inv_freq: mx.array,
    num_heads: int,
    num_kv_heads: int,
) -> bool:
    """Whether `fused_qk_norm_rope` runs these: heads of a multiple of 32, both norm weights of one dtype or neither."""
    kinds = kind(qkv), kind_or_none(q_weight), kind_or_none(k_weight), kind(inv_freq)
    return _plan(*kinds, num_heads, num_kv_heads, 1, 0.0, 1.0) is not None


def fused_qk_norm_rope(
    qkv: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    inv_freq: mx.array,
    rope_scale: float,
    offset: int | mx.array,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_qk_norm_rope`, in one dispatch, for what `supports` says; the outputs are contiguous.

    Raises:
        ValueError: For anything else.
    """
    where = positions(offset)
    kinds = kind(qkv), kind_or_none(q_weight), kind_or_none(k_weight), kind(inv_freq)
    plan = _plan(*kinds, num_heads, num_kv_heads, where.shape[0], eps, rope_scale)
    if plan is None:
        raise ValueError(f"[qk_norm_rope] no kernel for qkv {qkv.shape} {qkv.dtype} with {num_heads} heads.")
    weights = (absent(mx.float32),) * 2 if q_weight is None or k_weight is None else (q_weight, k_weight)
    q, k, v = KERNEL([qkv, *weights, inv_freq, where], **plan)
    return q, k, v


@lru_cache(maxsize=256)
def _plan(
    qkv: Kind,
    q_weight: Kind | None,
    k_weight: Kind | None,
    inv_freq: Kind,
    HQ: int,
    HKV: int,
    offsets: int,
    eps: float,
    rope_scale: float,
) -> dict[str, Any] | None:
    """How to launch, or None for what the kernel does not run."""
    (B, T, width), dtype = qkv
    heads = HQ + 2 * HKV
    D, R = width // heads, 2 * inv_freq[0][0]
    if dtype not in FLOATS or B * T < 1 or width != heads * D or D % 32 or not are_norm_weights(q_weight, k_weight, D):
        return None
    if not 2 <= R <= D or inv_freq[1] != mx.float32 or offsets not in (1, B):
        return None
    return {
        "template": [
            ("T", dtype),
            ("W", mx.float32 if q_weight is None else q_weight[1]),
            ("D", D),
            ("R", R),
            ("HQ", HQ),
            ("HKV", HKV),
            ("SIMDGROUPS", SIMDGROUPS),
            ("NORM", q_weight is not None),
            ("PER_ROW", offsets > 1),
            ("EPS", bits(eps)),
            ("ROPE_SCALE", bits(rope_scale)),
        ],
        "grid": (B * T * SIMDGROUPS * 32, -(-heads // SIMDGROUPS), 1),
        "threadgroup": (SIMDGROUPS * 32, 1, 1),
        "shapes": [(B, HQ, T, D), (B, HKV, T, D), (B, HKV, T, D)],
        "dtypes": [dtype] * 3,
    }
