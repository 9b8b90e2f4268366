"""The router as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels.arguments import Kind, absent, bits, kind, kind_or_none
from metal_kernels.launch import Kernel

KERNEL = Kernel(Path(__file__).with_name("router.metal"), ("logits", "bias"), ("chosen", "weights"))
MAX_EXPERTS = 1024
MAX_SIMDGROUPS = 8
MAX_TOP_K = 32


def supports(logits: mx.array, bias: mx.array | None, top_k: int, n_group: int) -> bool:
    """Whether `fused_route` runs these: float32, at most 1,024 experts in equal groups, at most 32 chosen."""
    return _plan(kind(logits), kind_or_none(bias), top_k, n_group, 1, 1.0, True) is not None


def fused_route(
    logits: mx.array,
    bias: mx.array | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling_factor: float,
    normalize: bool,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_route`, in one dispatch, for what `supports` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _plan(kind(logits), kind_or_none(bias), top_k, n_group, topk_group, scaling_factor, normalize)
    if plan is None:
        raise ValueError(f"[route] no kernel for logits {logits.shape} {logits.dtype}, {n_group} groups, top {top_k}.")
    chosen, weights = KERNEL([logits, absent(mx.float32) if bias is None else bias], **plan)
    return chosen, weights


@lru_cache(maxsize=256)
def _plan(
    logits: Kind,
    bias: Kind | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling_factor: float,
    normalize: bool,
) -> dict[str, Any] | None:
    """How to launch, or None for what the kernel does not run."""
    (*leading, E), dtype = logits
    tokens = math.prod(leading)
    if dtype != mx.float32 or tokens * E < 8 or E > MAX_EXPERTS or n_group < 1 or E % n_group:
        return None
    if bias not in (None, ((E,), mx.float32)) or not 1 <= top_k <= min(E, MAX_TOP_K):
        return None
    simdgroups = min(MAX_SIMDGROUPS, -(-E // 32))
    return {
        "template": [
            ("E", E),
            ("TOP_K", top_k),
            ("GROUPS", n_group),
            ("TOPK_GROUP", topk_group),
            ("SIMDGROUPS", simdgroups),
            ("HAS_BIAS", bias is not None),
            ("NORMALIZE", normalize and top_k > 1),
            ("SCALING", bits(scaling_factor)),
        ],
        "grid": (tokens * simdgroups * 32, 1, 1),
        "threadgroup": (simdgroups * 32, 1, 1),
        "shapes": [(*leading, top_k), (*leading, top_k)],
        "dtypes": [mx.int32, mx.float32],
    }
