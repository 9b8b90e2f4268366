"""Products between the operations around them as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.arguments import FLOATS, Kind, bits, kind, kind_or_none
from metal_kernels.fused_qmv.matrices import Matrices
from metal_kernels.launch import Kernel
from metal_kernels.quantized_moe.experts import THREADGROUP_BYTES, factor_bytes, padded

HERE = Path(__file__).parent
MATRICES = [f"{m}_{part}" for m in ("first", "second") for part in "wsb"]
KERNEL = Kernel(
    HERE / "fused_qmv.metal",
    ("x", "gate", "weight", *MATRICES, "residual"),
    ("first", "second"),
    [
        HERE.parent / "quantized_moe" / "codes.metal",
        HERE.parent / "norm_router" / "packs.metal",
        HERE.parent / "quantized_moe" / "blocks.metal",
    ],
)
MAX_TOKENS = 8
MAX_WIDTH = 8192
SIMDGROUPS = 8  # of a threadgroup
VALUES = 32  # of each row that a lane owns, at most
NONE, NORM, GATE = 0, 1, 2
OPERATIONS = {NONE: "add_qmv", NORM: "norm_qmv", GATE: "gate_qmv"}

# Rows a team: what a lane keeps of them in registers is 16 words of weights at 4 bits, 16 at 8, 32 where they are plain.
# A threadgroup of mini (4 teams of 2 simdgroups) then reads 18 KB of 4-bit weights, 17 KB of 8-bit ones, beside the 8 or
# 12 KB of its prologue, and its dense product makes 128 threadgroups. Chosen by these counts; `choices` may scale them.
ROWS = {2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 8: 2, 16: 2, 32: 1}


def supports_norm_qmv(x: mx.array, weight: mx.array, matrices: Matrices, dtype: mx.Dtype | None = None) -> bool:
    """Whether `fused_norm_qmv` runs these: 1 to 8 tokens of at most 8,192 channels, and formats that the kernel reads."""
    return _prepared(matrices, NORM, x, weight, dtype=dtype) is not None


def fused_norm_qmv(
    x: mx.array, weight: mx.array, eps: float, matrices: Matrices, dtype: mx.Dtype | None = None
) -> tuple[mx.array, ...]:
    """Same contract as `naive_norm_qmv`, in one dispatch, for what `supports_norm_qmv` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _prepared(matrices, NORM, x, weight, dtype=dtype, eps=eps) or _refuse("norm_qmv", x, matrices)
    first, second = KERNEL([x, x, weight, *matrices.arrays, x], **plan)
    return (first,) if matrices.second is None else (first, second)


def supports_gate_qmv(
    x: mx.array,
    gate: mx.array,
    weight: mx.array,
    groups: int,
    matrices: Matrices,
    residual: mx.array | None = None,
) -> bool:
    """Whether `fused_gate_qmv` runs these: one matrix, and else as `supports_norm_qmv`."""
    return _prepared(matrices, GATE, x, weight, gate, groups, residual) is not None


def fused_gate_qmv(
    x: mx.array,
    gate: mx.array,
    weight: mx.array,
    groups: int,
    eps: float,
    matrices: Matrices,
    residual: mx.array | None = None,
) -> mx.array:
    """Same contract as `naive_gate_qmv`, in one dispatch, for what `supports_gate_qmv` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _prepared(matrices, GATE, x, weight, gate, groups, residual, eps=eps) or _refuse("gate_qmv", x, matrices)
    added = gate if residual is None else residual
    return KERNEL([x, gate, weight, *matrices.arrays, added], **plan)[0]


def supports_add_qmv(x: mx.array, matrices: Matrices, residual: mx.array | None = None) -> bool:
    """Whether `fused_add_qmv` runs these: one matrix, and else as `supports_norm_qmv`."""
    return _prepared(matrices, NONE, x, residual=residual) is not None


def fused_add_qmv(x: mx.array, matrices: Matrices, residual: mx.array | None = None) -> mx.array:
    """Same contract as `naive_add_qmv`, in one dispatch, for what `supports_add_qmv` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _prepared(matrices, NONE, x, residual=residual) or _refuse("add_qmv", x, matrices)
    added = x if residual is None else residual
    return KERNEL([x, x, x, *matrices.arrays, added], **plan)[0]


def _refuse(name: str, x: mx.array, matrices: Matrices) -> dict[str, Any]:
    form = matrices.first.mode, matrices.first.bits, matrices.first.weight.shape
    raise ValueError(f"[{name}] no kernel for x {x.shape} {x.dtype} and matrices {form}.")


def _prepared(
    matrices: Matrices,
    prologue: int,
    x: mx.array,
    weight: mx.array | None = None,
    gate: mx.array | None = None,
    groups: int = 1,
    residual: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    eps: float = 0.0,
) -> dict[str, Any] | None:
    """How to launch, worked out once for these kinds of arguments, or None for what the kernel does not run."""
    rows = choices.scaled(ROWS.get(matrices.form.get("BITS", 0), 1), OPERATIONS[prologue], math.prod(x.shape[:-1]))
    kinds = kind(x), kind_or_none(weight), kind_or_none(gate), groups, kind_or_none(residual)
    key = (prologue, rows, *kinds, dtype, eps)
    if key not in matrices.prepared:
        matrices.prepared[key] = _plan(matrices, *key)
    found: dict[str, Any] | None = matrices.prepared[key]
    return found


def _plan(
    matrices: Matrices,
    prologue: int,
    rows: int,
    x: Kind,
    weight: Kind | None,
    gate: Kind | None,
    groups: int,
    residual: Kind | None,
    dtype: mx.Dtype | None,
    eps: float,
) -> dict[str, Any] | None:
    (*leading, K), tokens = x[0], math.prod(x[0][:-1])
    if not matrices.supported or not 1 <= tokens <= MAX_TOKENS or matrices.width != K or K > MAX_WIDTH or K % groups:
        return None
    N, M = matrices.sizes
    kinds = [k for k in (x, weight, gate, residual) if k is not None]
    if any(d not in FLOATS for _, d in kinds) or (dtype or mx.float32) not in FLOATS:
        return None
    if (weight or ((K,),))[0] != (K,) or (gate or x)[0] != x[0]:
        return None
    if residual is not None and (residual[0] != (*leading, N) or tokens * N < 8):
        return None
    if M and (residual is not None or prologue == GATE):
        return None
    common = x[1] if weight is None or weight[1] == x[1] else mx.float32
    stored = gate[1] if gate is not None else dtype or common
    y = stored if residual is None else residual[1]
    width = matrices.form["BITS"]
    team = -(-K // (32 * VALUES))
    teams = max(1, SIMDGROUPS // team)
    owned = teams * rows
    split = max(1, teams * team // groups)
    factors = factor_bytes(matrices.first, owned)
    if padded(K * stored.size, 4 * groups * split, 4 * tokens * owned * team, *factors) > THREADGROUP_BYTES:
        return None
    return {
        "template": [
            *matrices.form.items(),
            *(("N", N), ("M", M), ("PROLOGUE", prologue), ("GROUPS", groups)),
            *(("W", matrices.first.weight.dtype), ("S", matrices.arrays[1].dtype)),
            *(("T", common), ("O", stored), ("Y", y)),
            *(("STEP", 128 // width if width in (8, 16, 32) else 32), ("P", math.gcd(K // groups, 8))),
            *(("TEAM", team), ("TEAMS", teams), ("ROWS", rows), ("TOKENS", tokens)),
            ("HAS_RESIDUAL", residual is not None),
            ("EPS", bits(eps)),
        ],
        "grid": ((-(-N // owned) + -(-M // owned)) * teams * team * 32, 1, 1),
        "threadgroup": (teams * team * 32, 1, 1),
        "shapes": [(*leading, N), (*leading, M) if M else (1,)],
        "dtypes": [y, y],
    }
