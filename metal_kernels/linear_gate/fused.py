"""The linear gate as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels.arguments import FLOATS, Kind, bits, ints, kind
from metal_kernels.launch import Kernel

HERE = Path(__file__).parent
KERNEL = Kernel(
    HERE / "linear_gate.metal",
    ("x", "gate", "weight", "count"),
    ("y",),
    [HERE.parent / "quantized_moe" / "codes.metal", HERE.parent / "norm_router" / "packs.metal"],
)
SIMDGROUPS = 8
# Channels that a lane keeps in registers: 16 where there is work enough, 4 where there is not, so that one token's
# few groups spread over more lanes.
MANY_GROUPS = 64
MAX_CHANNELS = 8192


def supports(x: mx.array, gate: mx.array, weight: mx.array, groups: int) -> bool:
    """Whether `fused_linear_gate` runs these: equal shapes, groups that divide the width, at most 8,192 channels each."""
    return _plan(kind(x), kind(gate), kind(weight), groups, 0.0) is not None


def fused_linear_gate(x: mx.array, gate: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """Same contract as `naive_linear_gate`, in one dispatch, for what `supports` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _plan(kind(x), kind(gate), kind(weight), groups, eps)
    if plan is None:
        raise ValueError(f"[linear_gate] no kernel for x {x.shape} {x.dtype}, gate {gate.shape} and {groups} groups.")
    return KERNEL([x, gate, weight, ints(x.size // weight.size * groups)], **plan)[0]


@lru_cache(maxsize=256)
def _plan(x: Kind, gate: Kind, weight: Kind, groups: int, eps: float) -> dict[str, Any] | None:
    """How to launch, or None for what the kernel does not run."""
    shape, D = x[0], x[0][-1]
    count = math.prod(shape[:-1]) * groups
    if shape != gate[0] or weight[0] != (D,) or any(dtype not in FLOATS for _, dtype in (x, gate, weight)):
        return None
    if count < 1 or D % groups or not D >= 8 or D // groups > MAX_CHANNELS:
        return None
    size = D // groups
    each = 16 if count >= MANY_GROUPS else 4
    simdgroups = next((n for n in (1, 2, 4) if size <= n * 32 * each), SIMDGROUPS)
    return {
        "template": [
            ("X", x[1]),
            ("T", gate[1]),
            ("W", weight[1]),
            ("GROUPS", groups),
            ("SIZE", size),
            ("P", math.gcd(size, 4)),
            ("SIMDGROUPS", simdgroups),
            ("EPS", bits(eps)),
        ],
        "grid": (-(-count * simdgroups // SIMDGROUPS) * SIMDGROUPS * 32, 1, 1),
        "threadgroup": (SIMDGROUPS * 32, 1, 1),
        "shapes": [shape],
        "dtypes": [gate[1]],
    }
