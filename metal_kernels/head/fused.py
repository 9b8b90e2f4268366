"""Norm and product with very many rows as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
from mlx.core import array

from metal_kernels import choices
from metal_kernels.constants import BLOCKS, FLOATS, PACKS, TALL, bits
from metal_kernels.launch import Kernel
from metal_kernels.packed import THREADGROUP_BYTES, Matrices, padded
from metal_kernels.quantized_moe.tiles import operand
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(
    Path(__file__).with_name("head.metal"), ("x", "weight", "w_w", "w_s", "w_b"), ("y",), (*PACKS, BLOCKS, TALL)
)
MAX_TOKENS = 8
MAX_WIDTH = 8192
TILE = 16  # rows
# More simdgroups leave each fewer units of a token to keep in registers, and are refused by some pipelines of Apple's.
SIMDGROUPS = {"metal": 12, "cuda": 16}
UNITS = 4  # that a simdgroup keeps, where there are simdgroups enough; no more than
MAX_UNITS = 8
# Threadgroups, each of which prepares the tokens again, which costs as much as some tiles. On an H200 two fit at once on each of
# 132 SMs: mini's head takes 79 us so, 82 with twice as many and 87 with 640. Not timed on Apple hardware.
THREADGROUPS = {"metal": 640, "cuda": 264}
AHEAD = 2  # whose weights are under way


def fused_head(x: array, weight: array, eps: float, matrices: Matrices) -> array:
    """Same contract as `naive_head`, in one dispatch.

    Raises:
        NoKernelError: Unless there are 1 to 8 tokens of at most 8,192 channels, and one matrix in a format whose quarters of
            32 or 64 values fill whole words; on CUDA for float32, which its matrix units do not multiply.
    """
    (*leading, K), tokens, matrix = x.shape, math.prod(x.shape[:-1]), matrices.first
    refusal = NoKernelError(f"[head] no kernel for x {x.shape} {x.dtype} and a matrix {matrix.shape} of {matrix.mode}.")
    if (
        matrices.second is not None
        or not matrices.supported
        or any(d not in FLOATS for d in (x.dtype, weight.dtype))
        or weight.shape != (K,)
        or not 1 <= tokens <= MAX_TOKENS
        or matrix.shape[-1] != K
        or K > MAX_WIDTH
    ):
        raise refusal
    form, where = dict(matrix.template), choices.where()
    unit = 64 if form["GROUP"] % 64 == 0 and K % 64 == 0 else 32
    common = x.dtype if x.dtype == weight.dtype else mx.float32
    held = operand(where, common)
    most = SIMDGROUPS.get(where, SIMDGROUPS["metal"])
    own = max(min(UNITS, K // unit), -(-K // unit // most))
    simdgroups = -(-K // unit // own)
    memory = simdgroups * max(8 * unit * held.size, 1024)
    factors = [0 if n == 4 else 2 * (n + 16 * 4) for n in matrix.factor_bytes(TILE)]
    if (
        form["BITS"] * unit // 4 % 32
        or own > MAX_UNITS
        or padded(memory, 32 * simdgroups, *factors) > THREADGROUP_BYTES
        or (where == "cuda" and held == mx.float32)
    ):
        raise refusal
    N, threadgroups = form["N"], THREADGROUPS.get(where, THREADGROUPS["metal"])
    tiles = choices.scaled(-(-N // TILE // threadgroups), "head", tokens)
    return KERNEL.launch(
        [x, weight, *matrix.arrays],
        template=[
            *form.items(),
            *(("T", common), ("M", held), ("W", matrix.weight.dtype), ("S", matrix.arrays[1].dtype), ("Y", common)),
            *(
                ("UNIT", unit),
                ("SIMDGROUPS", simdgroups),
                ("TILES", tiles),
                ("AHEAD", min(AHEAD, tiles)),
                ("TOKENS", tokens),
                ("EPS", bits(eps)),
            ),
        ],
        grid=(-(-N // (TILE * tiles)) * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[(*leading, N)],
        dtypes=[common],
    )[0]
