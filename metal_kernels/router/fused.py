"""The router as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from metal_kernels.constants import CHOOSE, absent, bits
from metal_kernels.launch import Kernel
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(Path(__file__).with_name("router.metal"), ("logits", "bias"), ("chosen", "weights"), (CHOOSE,))
MAX_EXPERTS = 1024
MAX_SIMDGROUPS = 8
MAX_TOP_K = 32


def fused_route(
    logits: mx.array, bias: mx.array | None, top_k: int, n_group: int, topk_group: int, factor: float, normalize: bool
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_route`, in one dispatch.

    Raises:
        NoKernelError: Unless all is float32, with at most 1,024 experts in equal groups, of which at most 32 are chosen.
    """
    check_route(logits, bias, top_k, n_group)
    (*leading, E), tokens = logits.shape, math.prod(logits.shape[:-1])
    simdgroups = min(MAX_SIMDGROUPS, -(-E // 32))
    chosen, weights = KERNEL.launch(
        [logits, absent(mx.float32) if bias is None else bias],
        template=[
            *(("E", E), ("TOP_K", top_k), ("GROUPS", n_group), ("TOPK_GROUP", topk_group)),
            *(("SIMDGROUPS", simdgroups), ("HAS_BIAS", bias is not None)),
            *(("NORMALIZE", normalize and top_k > 1), ("SCALING", bits(factor))),
        ],
        grid=(tokens * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[(*leading, top_k), (*leading, top_k)],
        dtypes=[mx.int32, mx.float32],
    )
    return chosen, weights


def check_route(logits: mx.array, bias: mx.array | None, top_k: int, n_group: int) -> None:
    """Raises NoKernelError unless kernels can make this choice."""
    E = logits.shape[-1]
    is_known = (
        logits.dtype == mx.float32 and logits.size >= 8 and E <= MAX_EXPERTS and n_group >= 1 and E % n_group == 0
    )
    is_known = is_known and (bias is None or (bias.shape, bias.dtype) == ((E,), mx.float32))
    if not is_known or not 1 <= top_k <= min(E, MAX_TOP_K):
        raise NoKernelError(
            f"[route] no kernel for logits {logits.shape} {logits.dtype}, {n_group} groups, top {top_k}."
        )
