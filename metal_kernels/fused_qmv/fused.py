"""Products between the operations around them as one kernel; checks shapes and launches."""

from __future__ import annotations

import math

import mlx.core as mx
from mlx.core import array

from metal_kernels import choices
from metal_kernels.constants import BLOCKS, FLOATS, PACKS, bits
from metal_kernels.fused_qmv import tall
from metal_kernels.launch import Kernel
from metal_kernels.packed import THREADGROUP_BYTES, Matrices, padded
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(tall.HERE / "fused_qmv.metal", tall.INPUTS, ("first", "second"), (*PACKS, BLOCKS))
MAX_TOKENS = 8
MAX_WIDTH = 8192
SIMDGROUPS = 8  # of a threadgroup
VALUES = 32  # of each row that a lane owns, at most
PROLOGUES = {"add_qmv": 0, "norm_qmv": 1, "head": 1, "gate_qmv": 2}

# Rows a team: what a lane keeps of them in registers is 16 words of weights at 4 bits, 16 at 8, 32 where they are plain.
# A threadgroup of mini (4 teams of 2 simdgroups) then reads 18 KB of 4-bit weights, 17 KB of 8-bit ones, beside the 8 or
# 12 KB of its prologue, and its dense product makes 128 threadgroups. Chosen by these counts; `choices` may scale them.
ROWS = {2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 8: 2, 16: 2, 32: 1}


# Tokens for which each weight is unpacked once: a lane has ROWS sums of each, and 8 values of x of each, in registers.
MOST_TOGETHER = 4
SHARED_BYTES = 16 * 1024  # of their inputs in threadgroup memory, half of what there is


def fused_norm_qmv(
    x: array, weight: array, eps: float, matrices: Matrices, dtype: mx.Dtype | None = None
) -> tuple[array, ...]:
    """Same contract as `naive_norm_qmv`, in one dispatch.

    Raises NoKernelError unless there are 1 to 8 tokens of at most 8,192 channels, and formats that the kernel reads.
    """
    found = _launch("norm_qmv", x, x, weight, matrices, None, dtype=dtype, eps=eps)
    return tuple(found[: len(matrices.all)])


def fused_gate_qmv(
    x: array, gate: array, weight: array, groups: int, eps: float, matrices: Matrices, residual: array | None = None
) -> array:
    """Same contract as `naive_gate_qmv`, in one dispatch.

    Raises NoKernelError as `fused_norm_qmv`, and for two matrices.
    """
    return _launch("gate_qmv", x, gate, weight, matrices, residual, dtype=gate.dtype, groups=groups, eps=eps)[0]


def fused_add_qmv(x: array, matrices: Matrices, residual: array | None = None) -> array:
    """Same contract as `naive_add_qmv`, in one dispatch.

    Raises NoKernelError as `fused_norm_qmv`, and for two matrices.
    """
    return _launch("add_qmv", x, x, None, matrices, residual)[0]


def fused_head(x: array, weight: array, eps: float, matrices: Matrices) -> array:
    """Same contract as `naive_head`, in one dispatch.

    Raises NoKernelError as `fused_norm_qmv`, for two matrices, and for what `tall.cut` does not take.
    """
    return _launch("head", x, x, weight, matrices, None, eps=eps)[0]


def _launch(
    name: str,
    x: array,
    gate: array,
    weight: array | None,
    matrices: Matrices,
    residual: array | None,
    dtype: mx.Dtype | None = None,
    groups: int = 1,
    eps: float = 0.0,
) -> list[array]:
    """``dtype``: of the product's input; by default the common one of x and weight."""
    (*leading, K), tokens = x.shape, math.prod(x.shape[:-1])
    form = matrices.first.mode, matrices.first.bits, matrices.first.weight.shape
    refusal = NoKernelError(f"[{name}] no kernel for x {x.shape} {x.dtype} and matrices {form}.")
    N, *others = (w.shape[-2] for w in matrices.all)
    M = others[0] if others else 0
    arrays = [a for a in (x, gate, weight, residual) if a is not None]
    if (
        not matrices.supported
        or any(d not in FLOATS for d in (*(a.dtype for a in arrays), dtype or mx.float32))
        or not 1 <= tokens <= MAX_TOKENS
        or matrices.first.shape[-1] != K
        or K > MAX_WIDTH
        or K % groups
        or (weight is not None and weight.shape != (K,))
        or gate.shape != x.shape
        or (residual is not None and (residual.shape != (*leading, N) or tokens * N < 8))
        or (M and name != "norm_qmv")
    ):
        raise refusal
    common = x.dtype if weight is None or weight.dtype == x.dtype else mx.float32
    stored = dtype or common
    y = stored if residual is None else residual.dtype
    how = None
    if name == "head" or choices.variant(name, tokens) == choices.TALL:
        how = tall.cut(name, matrices, tokens, groups, stored)
    if how is None and name != "head":
        how = _cut(name, matrices, tokens, groups, stored)
    if how is None:
        raise refusal
    return how.kernel.launch(
        [x, gate, x if weight is None else weight, *matrices.arrays, gate if residual is None else residual],
        template=[
            *(dict(matrices.first.template) | {"N": N, "SECOND": M}).items(),
            *(("PROLOGUE", PROLOGUES[name]), ("GROUPS", groups), ("TOKENS", tokens)),
            *(("W", matrices.first.weight.dtype), ("S", matrices.arrays[1].dtype)),
            *(("T", common), ("O", stored), ("Y", y)),
            *(("HAS_RESIDUAL", residual is not None), ("EPS", bits(eps))),
            *how.template,
        ],
        grid=(how.threadgroups * how.threads, 1, 1),
        threadgroup=(how.threads, 1, 1),
        shapes=[(*leading, N), (*leading, M) if M else (1,)],
        dtypes=[y, y],
    )


def _cut(name: str, matrices: Matrices, tokens: int, groups: int, dtype: mx.Dtype) -> tall.Cut | None:
    """How this module's kernel cuts the product; None where it would need too much memory."""
    width, K = matrices.first.stored_bits, matrices.first.shape[-1]
    rows = choices.scaled(ROWS[width], name, tokens)
    team = -(-K // (32 * VALUES))
    teams = max(1, SIMDGROUPS // team)
    owned = teams * rows
    together = _together(tokens, K, dtype.size)
    sums = 4 * together * groups * max(1, teams * team // groups), 4 * tokens * owned * team
    if padded(together * K * dtype.size, *sums, *matrices.first.factor_bytes(owned)) > THREADGROUP_BYTES:
        return None
    sizes = ("STEP", 128 // width if width in (8, 16, 32) else 32), ("P", math.gcd(K // groups, 8)), ("TEAM", team)
    template = [*sizes, ("TEAMS", teams), ("ROWS", rows), ("TOGETHER", together)]
    return tall.Cut(KERNEL, template, sum(-(-w.shape[-2] // owned) for w in matrices.all), teams * team * 32)


def _together(tokens: int, K: int, size: int) -> int:
    """Tokens that are multiplied together, in as few turns as threadgroup memory and registers allow."""
    turns = -(-tokens // max(1, min(MOST_TOGETHER, SHARED_BYTES // (K * size))))
    return -(-tokens // turns)
