"""Mixture of experts for a few tokens, in two dispatches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.launch import Kernel
from metal_kernels.packed import Packed
from metal_kernels.quantized_moe.experts import (
    FLOATS,
    THREADGROUP_BYTES,
    Experts,
    Template,
    arrays,
    factor_bytes,
    format_template,
    padded,
    shared_product,
)
from metal_kernels.quantized_moe.tiles import Rows, decode_rows

MAX_TOKENS = 8
MAX_SIMDGROUPS = 12  # 384 threads, which every pipeline of an Apple GPU may have
HERE = Path(__file__).parent
MATRICES = ("gate", "up", "shared_gate", "shared_up")
GATE_UP = Kernel(
    HERE / "decode_gate_up.metal",
    ["x", "chosen", *(f"{m}_{part}" for m in MATRICES for part in "wsb")],
    ["h"],
    [HERE / "codes.metal", HERE / "blocks.metal"],
)
DOWN = Kernel(
    HERE / "decode_down.metal",
    ["h", "chosen", "weights", *(f"{m}_{part}" for m in ("down", "shared_down") for part in "wsb"), "residual"],
    ["y"],
    [HERE / "codes.metal", HERE / "blocks.metal"],
)


def supports_decode(experts: Experts, x: mx.array) -> bool:
    """Whether `decode_moe` takes these tokens [..., D]: 1 to 8 of them, formats that the kernels read, and rows that fit."""
    if not experts.supported or x.dtype not in FLOATS or not 1 <= math.prod(x.shape[:-1]) <= MAX_TOKENS:
        return False
    key = ("fits", x.dtype, decode_rows(choices.where(), math.prod(x.shape[:-1])))
    if key not in experts.prepared:
        experts.prepared[key] = min(_simdgroups(experts, *key[1:], 1)) > 0
    fits: bool = experts.prepared[key]
    return fits


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
    plan = _prepared(experts, x.dtype, chosen.shape, dtype, residual is not None)
    (h,) = GATE_UP([x, chosen, *experts.gate_up_arrays], **plan.gate_up)
    (y,) = DOWN([h, chosen, weights, *experts.down_arrays, h if residual is None else residual], **plan.down)
    return y


class _Plan(NamedTuple):
    """All but the arrays of both launches."""

    gate_up: dict[str, Any]
    down: dict[str, Any]


def _prepared(experts: Experts, x: mx.Dtype, chosen: tuple[int, ...], dtype: mx.Dtype, has_residual: bool) -> _Plan:
    rows = decode_rows(choices.where(), math.prod(chosen[:-1]))
    key = ("decode", x, chosen, dtype, has_residual, rows)
    found: _Plan | None = experts.prepared.get(key)
    if found is None:
        found = experts.prepared[key] = _prepare(experts, x, chosen, dtype, has_residual, rows)
    return found


def _prepare(
    experts: Experts, x: mx.Dtype, chosen: tuple[int, ...], dtype: mx.Dtype, has_residual: bool, rows: Rows
) -> _Plan:
    (*leading, top_k), tokens = chosen, math.prod(chosen[:-1])
    slots = experts.slots(top_k)
    first, second = (_cut(w) for w in (experts.gate, experts.down))
    simdgroups, most = _simdgroups(experts, x, rows, slots)
    common: Template = [("TOP_K", top_k), ("SLOTS", slots)]
    threads = 32 * simdgroups
    gate_up = {
        "template": [
            *first.items(),
            *common,
            *(("X", x), ("ROWS", rows.gate_up), ("SIMDGROUPS", simdgroups)),
            *(("DOWN_STEP", second["STEP"]), ("DOWN_LANES", second["LANES"])),
        ],
        "grid": (-(-first["N"] // (simdgroups * rows.gate_up * 32 // first["LANES"])) * threads, slots, tokens),
        "threadgroup": (threads, 1, 1),
        "shapes": [(tokens, slots, first["N"])],
        "dtypes": [mx.float32],
    }
    threads = 32 * -(-slots // -(-slots // most))
    template: Template = [*second.items(), *common, ("ROWS", rows.down), ("SIMDGROUPS", threads // 32)]
    down = {
        "template": [*template, ("HAS_RESIDUAL", has_residual), ("O", dtype)],
        "grid": (-(-second["N"] // (rows.down * 32 // second["LANES"])) * threads, tokens, 1),
        "threadgroup": (threads, 1, 1),
        "shapes": [(*leading, second["N"])],
        "dtypes": [dtype],
    }
    return _Plan(gate_up, down)


def _cut(w: Packed) -> dict[str, Any]:
    """What both kernels' templates say of a stack."""
    form: dict[str, Any] = dict(format_template(w))
    step, lanes = _steps(form["BITS"], form["K"])
    return form | {"STEP": step, "LANES": lanes, "W": w.weight.dtype, "S": arrays(w)[1].dtype}


def _simdgroups(experts: Experts, x: mx.Dtype, rows: Rows, slots: int) -> tuple[int, int]:
    """Simdgroups of a threadgroup in either kernel whose threadgroup memory suffices; 0 where it does for none."""
    first, second = (_cut(w)["LANES"] for w in (experts.gate, experts.down))
    owned, owned_down = rows.gate_up * 32 // first, rows.down * 32 // second
    tokens = experts.hidden * x.size

    def gate_up(n: int) -> int:
        return padded(tokens, *2 * factor_bytes(experts.gate, n * owned))

    def down(n: int) -> int:
        return padded(4 * n * owned_down, *(n * -(-b // 4) * 4 for b in factor_bytes(experts.down, owned_down)))

    first = next((n for n in range(rows.simdgroups, 0, -1) if gate_up(n) <= THREADGROUP_BYTES), 0)
    second = next((n for n in range(min(slots, MAX_SIMDGROUPS), 0, -1) if down(n) <= THREADGROUP_BYTES), 0)
    return first, second


def _steps(bits: int, K: int) -> tuple[int, int]:
    """Values a lane takes at a time (16 bytes of weights, at most 32 values), and lanes that share a row of K.

    Of the powers of two, the lanes that idle least; the most of those.
    """
    step = 128 // bits if 32 % bits == 0 and bits > 4 else 32
    steps = K // step
    lanes = min((32, 16, 8, 4, 2, 1), key=lambda n: -(-steps // n) * n + (n < 8) * steps)
    return step, lanes
