"""The fit of affine scales and biases as one kernel; checks shapes and launches."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from metal_kernels.affine_fit.naive import Effort
from metal_kernels.constants import FLOATS, ints
from metal_kernels.launch import Kernel
from metal_kernels.packed import BITS
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(Path(__file__).with_name("affine_fit.metal"), ("w", "starts"), ("weight", "scales", "biases"))
GROUPS = (32, 64, 128)
THREADS = 128


def fused_affine_fit(
    w: mx.array, bits: int, group_size: int, dtype: mx.Dtype, effort: Effort
) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_affine_fit`, to the bit, in one dispatch.

    Raises:
        NoKernelError: Unless w is a matrix of whole groups that MLX has.
    """
    (rows, cols), is_known = w.shape, group_size in GROUPS and bits in BITS["affine"] and dtype in FLOATS
    if not is_known or w.dtype not in FLOATS or not rows or not cols or cols % group_size:
        raise NoKernelError(f"[affine_fit] no kernel for {w.shape} {w.dtype}, {bits} bits in groups of {group_size}.")
    by_group = (rows, cols // group_size)
    weight, scales, biases = KERNEL.launch(
        [w, ints(*(tenths for start in effort.starts for tenths in start))],
        template=[
            *(("W", w.dtype), ("T", dtype), ("BITS", bits), ("GROUP", group_size)),
            *(("STARTS", len(effort.starts)), ("ROUNDS", effort.rounds)),
        ],
        grid=(rows * by_group[1], 1, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[(rows, cols * bits // 32), by_group, by_group],
        dtypes=[mx.uint32, dtype, dtype],
    )
    return weight, scales, biases
