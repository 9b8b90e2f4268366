"""Constants of kernels: small arrays, made once for each value, and numbers as template arguments."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).parent
# Functions in Metal that kernels share: reading packed codes, packs of floats, products of blocks and of tiles.
CODES = HERE / "quantized_moe" / "codes.metal"
PACKS = (CODES, HERE / "norm_router" / "packs.metal")
BLOCKS = HERE / "quantized_moe" / "blocks.metal"
CHOOSE = HERE / "router" / "choose.metal"
TALL = HERE / "quantized_moe" / "tall.metal"
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def are_norm_weights(q_weight: mx.array | None, k_weight: mx.array | None, D: int) -> bool:
    """Whether these are the weights of q's and k's norms over D dims, of one float dtype, or both are absent."""
    if q_weight is None or k_weight is None:
        return q_weight is k_weight
    return q_weight.shape == k_weight.shape == (D,) and q_weight.dtype == k_weight.dtype and q_weight.dtype in FLOATS


def bits(value: float) -> int:
    """A float32 as a template argument, which the kernel reads as ``as_type<float>(NAME)``.

    What no launch changes is a constant of the code. In an array it would be one more argument to bind, and one that
    every threadgroup waits for: MLX's CUDA backend keeps arrays of up to 8 bytes in memory that the host shares.
    """
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


@lru_cache(maxsize=256)
def ints(*values: int) -> mx.array:
    return mx.array(values, mx.int32)


@lru_cache(maxsize=16)
def absent(dtype: mx.Dtype) -> mx.array:
    """A placeholder for an input that a template argument switches off; long enough to be a device pointer."""
    return mx.array([0] * 16, dtype)
