"""QK-norm, rotary embedding and split as one kernel; checks shapes and launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels.constants import FLOATS, PACKS, absent, are_norm_weights, bits
from metal_kernels.launch import Kernel, positions
from metal_kernels.qk_norm_rope.naive import Projection
from metal_kernels.recorded import NoKernelError

INPUTS = ("qkv", "q_weight", "k_weight", "inv_freq", "offset")
KERNEL = Kernel(Path(__file__).with_name("qk_norm_rope.metal"), INPUTS, ("q", "k", "v"), PACKS)
SIMDGROUPS = 8


def fused_qk_norm_rope(*arguments: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_qk_norm_rope`, in one dispatch; the outputs are contiguous.

    Raises NoKernelError unless heads are a multiple of 32, and both norm weights of one dtype or absent.
    """
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, eps, num_heads, num_kv_heads = Projection(*arguments)
    B, T, width = qkv.shape
    offset, heads = positions(offset), num_heads + 2 * num_kv_heads
    D, R, dtype = width // heads, 2 * inv_freq.shape[0], qkv.dtype
    is_known = dtype in FLOATS and B * T >= 1 and width == heads * D and D % 32 == 0 and 2 <= R <= D
    is_known = is_known and inv_freq.dtype == mx.float32 and offset.shape in ((1,), (B,))
    if not is_known or not are_norm_weights(q_weight, k_weight, D):
        raise NoKernelError(f"[qk_norm_rope] no kernel for qkv {qkv.shape} {dtype} with {num_heads} heads.")
    weight = absent(mx.float32) if q_weight is None else q_weight
    q, k, v = KERNEL.launch(
        [qkv, weight, absent(mx.float32) if k_weight is None else k_weight, inv_freq, offset],
        template=[
            *(("T", dtype), ("W", weight.dtype), ("D", D), ("R", R), ("HQ", num_heads), ("HKV", num_kv_heads)),
            *(("SIMDGROUPS", SIMDGROUPS), ("NORM", q_weight is not None), ("PER_ROW", offset.shape[0] > 1)),
            *(("EPS", bits(eps)), ("ROPE_SCALE", bits(rope_scale))),
        ],
        grid=(B * T * SIMDGROUPS * 32, -(-heads // SIMDGROUPS), 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        shapes=[(B, num_heads, T, D), (B, num_kv_heads, T, D), (B, num_kv_heads, T, D)],
        dtypes=[dtype] * 3,
    )
    return q, k, v
