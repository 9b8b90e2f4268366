"""Mixture of experts for a few tokens, in two dispatches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from metal_kernels.launch import Kernel, backend
from metal_kernels.quantized_moe.experts import FLOATS, Experts, Template, format_template, shared_product
from metal_kernels.quantized_moe.tiles import Rows, decode_rows

MAX_TOKENS = 8
MAX_SIMDGROUPS = 12  # 384 threads, which every pipeline of an Apple GPU may have
HERE = Path(__file__).parent
MATRICES = ("gate", "up", "shared_gate", "shared_up")
GATE_UP = Kernel(
    HERE / "decode_gate_up.metal",
    ["x", "chosen", *(f"{m}_{part}" for m in MATRICES for part in "wsb")],
    ["h"],
    [HERE / "codes.metal"],
)
DOWN = Kernel(
    HERE / "decode_down.metal",
    ["h", "chosen", "weights", *(f"{m}_{part}" for m in ("down", "shared_down") for part in "wsb"), "residual"],
    ["y"],
    [HERE / "codes.metal"],
)


def supports_decode(experts: Experts, x: mx.array) -> bool:
    """Whether `decode_moe` takes these tokens [..., D]: 1 to 8 of them, and formats that the kernels read."""
    return experts.supported and x.dtype in FLOATS and 1 <= math.prod(x.shape[:-1]) <= MAX_TOKENS


def decode_moe(
    x: mx.array, chosen: mx.array, weights: mx.array, experts: Experts, residual: mx.array | None = None
) -> mx.array:
    """Same contract as `naive_moe`, for what `supports_decode` accepts; sums of products in another order.

    Args:
        x: [..., D]; starts at a multiple of 16 bytes, as every array that is no odd slice does.
        chosen: [..., k] int32.
        weights: [..., k] float32.
        experts: Built once a layer.
        residual: [..., D] or None.

    Returns:
        y [..., D] in the dtype of ``residual``; float32 without one.

    Raises:
        ValueError: If shapes or dtypes disagree.
    """
    experts.check(x, chosen, weights, residual)
    dtype = mx.float32 if residual is None else residual.dtype
    if experts.shared is not None and not experts.rides:
        added = shared_product(x, experts.shared)
        residual = added if residual is None else added + residual
    plan = _prepared(experts, chosen.shape, dtype, residual is not None)
    (h,) = GATE_UP([x, chosen, *experts.gate_up_arrays], **plan.gate_up)
    (y,) = DOWN([h, chosen, weights, *experts.down_arrays, h if residual is None else residual], **plan.down)
    return y


class _Plan(NamedTuple):
    """All but the arrays of both launches."""

    gate_up: dict[str, Any]
    down: dict[str, Any]


def _prepared(experts: Experts, chosen: tuple[int, ...], dtype: mx.Dtype, has_residual: bool) -> _Plan:
    where = backend()
    rows = decode_rows(where.name if where else "", math.prod(chosen[:-1]))
    key = ("decode", chosen, dtype, has_residual, rows)
    found: _Plan | None = experts.prepared.get(key)
    if found is None:
        found = experts.prepared[key] = _prepare(experts, chosen, dtype, has_residual, rows)
    return found


def _prepare(experts: Experts, chosen: tuple[int, ...], dtype: mx.Dtype, has_residual: bool, rows: Rows) -> _Plan:
    (*leading, top_k), tokens = chosen, math.prod(chosen[:-1])
    slots, common = experts.slots(top_k), [("TOP_K", top_k), ("SLOTS", experts.slots(top_k))]
    first, second = dict(format_template(experts.gate)), dict(format_template(experts.down))
    step, lanes = _steps(first["BITS"], first["K"])
    threads = 32 * rows.simdgroups
    gate_up = {
        "template": [*first.items(), *common, ("ROWS", rows.gate_up), ("LANES", lanes), ("STEP", step)],
        "grid": (-(-first["N"] // (rows.simdgroups * rows.gate_up * 32 // lanes)) * threads, slots, tokens),
        "threadgroup": (threads, 1, 1),
        "shapes": [(tokens, slots, first["N"])],
        "dtypes": [mx.float32],
    }
    step, lanes = _steps(second["BITS"], second["K"])
    threads = 32 * -(-slots // -(-slots // MAX_SIMDGROUPS))
    template: Template = [*second.items(), *common, ("ROWS", rows.down), ("LANES", lanes), ("STEP", step)]
    down = {
        "template": [*template, ("SIMDGROUPS", threads // 32), ("HAS_RESIDUAL", has_residual), ("O", dtype)],
        "grid": (-(-second["N"] // (rows.down * 32 // lanes)) * threads, tokens, 1),
        "threadgroup": (threads, 1, 1),
        "shapes": [(*leading, second["N"])],
        "dtypes": [dtype],
    }
    return _Plan(gate_up, down)


def _steps(bits: int, K: int) -> tuple[int, int]:
    """Values a lane takes at a time (16 bytes of weights, at most 32 values), and lanes that share a row of K.

    Of the powers of two, the lanes that idle least; the most of those.
    """
    step = 128 // bits if 32 % bits == 0 and bits > 4 else 32
    steps = K // step
    lanes = min((32, 16, 8, 4, 2, 1), key=lambda n: -(-steps // n) * n + (n < 8) * steps)
    return step, lanes
