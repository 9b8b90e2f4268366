"""Both as kernels; check shapes and launch."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import FLOATS, PACKS
from metal_kernels.launch import Kernel
from metal_kernels.packed import BLOCK, Packed
from metal_kernels.recorded import NoKernelError

HERE = Path(__file__).parent
EMBED = Kernel(HERE / "embed.metal", ("tokens", "w_w", "w_s", "w_b"), ("y",), PACKS)
PEAK = Kernel(HERE / "peak.metal", ("x",), ("place", "largest"), PACKS)
MAX_TOKENS = 8
MAX_THREADS = 256
# Simdgroups of a row, which one core reads: as many as every pipeline allows, or a CUDA block has.
SIMDGROUPS = {"metal": 12, "cuda": 32}


def fused_embed(tokens: mx.array, matrix: Packed, dtype: mx.Dtype) -> mx.array:
    """Same contract as `naive_embed`, in one dispatch.

    Raises NoKernelError unless there are 1 to 8 tokens, and a quantized matrix that kernels read.
    """
    is_known = matrix.scales is not None and matrix.is_readable and matrix.weight.ndim == 2 and dtype in FLOATS
    if not is_known or not 1 <= tokens.size <= MAX_TOKENS or not mx.issubdtype(tokens.dtype, mx.integer):
        raise NoKernelError(
            f"[embed] no kernel for tokens {tokens.shape} and a matrix {matrix.shape} of {matrix.mode}."
        )
    K = matrix.shape[1]
    threads = min(MAX_THREADS, -(-K // BLOCK // 32) * 32)
    return EMBED.launch(
        [tokens, *matrix.arrays],
        template=[*matrix.template, ("W", matrix.weight.dtype), ("O", dtype), ("THREADS", threads)],
        grid=(tokens.size * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(*tokens.shape, K)],
        dtypes=[dtype],
    )[0]


def fused_peak(x: mx.array) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_peak`, in one dispatch. Raises NoKernelError unless there are rows of floats."""
    (*leading, N), rows = x.shape, math.prod(x.shape[:-1])
    if x.dtype not in FLOATS or rows < 1 or x.size < 8:
        raise NoKernelError(f"[peak] no kernel for x {x.shape} {x.dtype}.")
    pack = math.gcd(N, 8)
    simdgroups = min(SIMDGROUPS.get(choices.where(), SIMDGROUPS["metal"]), -(-N // pack // 32))
    place, largest = PEAK.launch(
        [x],
        template=[("N", N), ("P", pack), ("SIMDGROUPS", simdgroups)],
        grid=(rows * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[tuple(leading), tuple(leading)],
        dtypes=[mx.uint32, mx.float32],
    )
    return place, largest
