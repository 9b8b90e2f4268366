"""What wrappers of kernels share: small arrays made once for each value, and facts of arrays to cache by.

Decoding calls each wrapper once a layer and token, so checks and launch plans are looked up by the kinds of the
arguments instead of being worked out again. Knows no kernel.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import mlx.core as mx

from metal_kernels import launch

Kind = tuple[tuple[int, ...], mx.Dtype]
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def kind(x: mx.array) -> Kind:
    """Shape and dtype."""
    return x.shape, x.dtype


def kind_or_none(x: mx.array | None) -> Kind | None:
    """Shape and dtype, None of None."""
    return None if x is None else (x.shape, x.dtype)


def are_norm_weights(q_weight: Kind | None, k_weight: Kind | None, D: int) -> bool:
    """Whether these are the weights of q's and k's norms over D dims, of one float dtype, or both are absent."""
    if q_weight is None or k_weight is None:
        return q_weight is k_weight
    return q_weight == k_weight and q_weight[0] == (D,) and q_weight[1] in FLOATS


def bits(value: float) -> int:
    """A float32 as a template argument, which the kernel reads as ``as_type<float>(NAME)``.

    What no launch changes is a constant of the code. In an array it would be one more argument to bind, and one that
    every threadgroup waits for: MLX's CUDA backend keeps arrays of up to 8 bytes in memory that the host shares.
    """
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


@lru_cache(maxsize=256)
def ints(*values: int) -> mx.array:
    """The values as an int32 array."""
    return mx.array(values, mx.int32)


@lru_cache(maxsize=16)
def absent(dtype: mx.Dtype) -> mx.array:
    """What stands in for an input that a template argument switches off; long enough to be a device pointer."""
    return mx.array([0] * 16, dtype)


def resident(x: mx.array) -> mx.array:
    """A small array [n] of the host's numbers, where the threadgroups that read it need not wait for the host's memory.

    MLX's CUDA backend keeps what Python's numbers fill, and any array of up to 8 bytes, in memory shared with the host; a
    kernel of 128 threadgroups that read one number there took 20 us on an H100, and 4 without. What the GPU itself
    writes in more bytes is its own. Elsewhere x is returned as it is.
    """
    where = launch.backend()
    if where is None or where.name != "cuda":
        return x
    return (x + _zeros(4 if x.size == 1 else x.size, x.dtype))[: x.size]


@lru_cache(maxsize=16)
def _zeros(size: int, dtype: mx.Dtype) -> mx.array:
    """Computed at once, for whatever thread comes first."""
    zeros = mx.zeros((size,), dtype)
    mx.eval(zeros)
    return zeros


def positions(offset: int | mx.array) -> mx.array:
    """Positions of the first tokens as a kernel reads them: [1] or [B] int32."""
    if isinstance(offset, int):
        return ints(offset)
    return (offset if offset.ndim else offset.reshape(1)).astype(mx.int32)
