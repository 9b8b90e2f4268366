"""The linear gate as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from metal_kernels.constants import FLOATS, PACKS, bits, ints
from metal_kernels.launch import Kernel
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(Path(__file__).with_name("linear_gate.metal"), ("x", "gate", "weight", "count"), ("y",), PACKS)
SIMDGROUPS = 8
# Channels that a lane keeps in registers: 16 where there is work enough, 4 where there is not, so that one token's
# few groups spread over more lanes.
MANY_GROUPS = 64
MAX_CHANNELS = 8192  # of a group


def fused_linear_gate(x: mx.array, gate: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """Same contract as `naive_linear_gate`, in one dispatch.

    Raises:
        NoKernelError: For no tokens, shapes that differ, groups that do not divide the width or have over 8,192 channels.
    """
    D = x.shape[-1]
    count, size = math.prod(x.shape[:-1]) * groups, D // groups
    is_known = all(a.dtype in FLOATS for a in (x, gate, weight))
    if (
        not is_known
        or x.shape != gate.shape
        or weight.shape != (D,)
        or count < 1
        or D % groups
        or D < 8
        or size > MAX_CHANNELS
    ):
        raise NoKernelError(
            f"[linear_gate] no kernel for x {x.shape} {x.dtype}, gate {gate.shape} and {groups} groups."
        )
    each = 16 if count >= MANY_GROUPS else 4
    simdgroups = next((n for n in (1, 2, 4) if size <= n * 32 * each), SIMDGROUPS)
    return KERNEL.launch(
        [x, gate, weight, ints(count)],
        template=[
            *(("X", x.dtype), ("T", gate.dtype), ("W", weight.dtype)),
            *(("GROUPS", groups), ("SIZE", size), ("P", math.gcd(size, 4))),
            *(("SIMDGROUPS", simdgroups), ("EPS", bits(eps))),
        ],
        grid=(-(-count * simdgroups // SIMDGROUPS) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        shapes=[x.shape],
        dtypes=[gate.dtype],
    )[0]
