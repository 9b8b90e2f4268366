"""Mixture of experts for many tokens, sorted by expert."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.launch import Kernel, backend
from metal_kernels.quantized_moe import tiles
from metal_kernels.quantized_moe.experts import FLOATS, Experts, Template, format_template, shared_product
from metal_kernels.quantized_moe.tiles import Tile

HERE = Path(__file__).parent
HEADERS = [HERE / "codes.metal", HERE / "grouped.metal"]
MATRICES = ("gate", "up", "shared_gate", "shared_up")
PLAN = Kernel(HERE / "plan.metal", ["chosen", "order"], ["tiles"])
GATE_UP = Kernel(
    HERE / "grouped_gate_up.metal",
    ["x", "order", "tiles", *(f"{m}_{part}" for m in MATRICES for part in "wsb")],
    ["h"],
    HEADERS,
)
DOWN = Kernel(
    HERE / "grouped_down.metal",
    ["h", "order", "weights", "tiles", *(f"{m}_{part}" for m in ("down", "shared_down") for part in "wsb")],
    ["parts"],
    HEADERS,
)
COMBINE = Kernel(HERE / "combine.metal", ["parts", "residual"], ["y"])
PLAN_THREADS = 256
COMBINE_THREADS = 128


def supports_prefill(experts: Experts, x: mx.array) -> bool:
    """Whether `prefill_moe` takes these tokens [..., D]: at least one, and formats that the kernels read."""
    return experts.supported and x.dtype in FLOATS and x.size >= 1


def prefill_moe(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    experts: Experts,
    residual: mx.array | None = None,
    tile: Tile | None = None,
    operand: mx.Dtype | None = None,
) -> mx.array:
    """Same contract as `naive_moe`, for what `supports_prefill` accepts; in five dispatches and a sort, no host sync.

    With 16-bit operands the dequantised weights and the products of gate and up are rounded to them, as MLX's own
    quantised product does; all sums are float32.

    Args:
        x: [..., D]; starts at a multiple of 16 bytes, as every array that is no odd slice does.
        chosen: [..., k] int32.
        weights: [..., k] float32.
        experts: Built once a layer.
        residual: [..., D] or None.
        tile: Rows of a threadgroup and their simdgroups; None chooses by the number of tokens.
        operand: What is multiplied, float32 or a 16-bit type; None takes the backend's.

    Returns:
        y [..., D] in the dtype of ``residual``; float32 without one.

    Raises:
        ValueError: If shapes or dtypes disagree.
    """
    experts.check(x, chosen, weights, residual)
    top_k, shape = chosen.shape[-1], x.shape
    x, chosen = x.reshape(-1, shape[-1]), chosen.reshape(-1, top_k)
    tokens = chosen.shape[0]
    dtype = mx.float32 if residual is None else residual.dtype
    where = backend()
    tile = tile or tiles.prefill_tile(tokens * top_k / experts.count, tokens)
    plan = _prepared(experts, top_k, tile, operand or tiles.operand(where.name if where else "", x.dtype))
    if experts.shared is not None and not experts.rides:
        added = shared_product(x, experts.shared)
        residual = added if residual is None else added + residual.reshape(x.shape)
    order = mx.argsort(chosen.reshape(-1))
    parts = _parts(x, chosen, weights, order, experts, plan)
    (y,) = COMBINE(
        [parts, parts if residual is None else residual],
        template=[("N", plan.hidden), ("SLOTS", plan.slots), ("HAS_RESIDUAL", residual is not None), ("O", dtype)],
        grid=(plan.hidden // 4, tokens, 1),
        threadgroup=(min(plan.hidden // 4, COMBINE_THREADS), 1, 1),
        shapes=[shape],
        dtypes=[dtype],
    )
    return y


class _Plan(NamedTuple):
    """What follows from the experts and the tile alone."""

    tile: Tile
    operand: mx.Dtype
    slots: int
    inner: int
    hidden: int
    plan: Template
    gate_up: Template
    down: Template


def _prepared(experts: Experts, top_k: int, tile: Tile, operand: mx.Dtype) -> _Plan:
    key = ("prefill", top_k, tile, operand)
    found: _Plan | None = experts.prepared.get(key)
    if found is None:
        found = experts.prepared[key] = _prepare(experts, top_k, tile, operand)
    return found


def _prepare(experts: Experts, top_k: int, tile: Tile, operand: mx.Dtype) -> _Plan:
    first, second = format_template(experts.gate), format_template(experts.down)
    common: Template = [("BM", tile.rows), ("BN", tiles.COLUMNS), ("BK", tiles.DEPTH_BYTES // operand.size)]
    common += [("WM", tile.simd_rows), ("WN", tile.simd_columns), ("T", operand), ("TOP_K", top_k)]
    plan: Template = [("E", experts.count), ("TOP_K", top_k), ("BM", tile.rows), ("SHARED", experts.rides)]
    gate_up: Template = [*first, *common]
    down: Template = [*second, *common, ("SLOTS", experts.slots(top_k))]
    return _Plan(tile, operand, experts.slots(top_k), dict(first)["N"], dict(second)["N"], plan, gate_up, down)


def _parts(
    x: mx.array, chosen: mx.array, weights: mx.array, order: mx.array, experts: Experts, plan: _Plan
) -> mx.array:
    """The weighted product of every token and slot, [T, slots, D] float32."""
    tokens, total = chosen.shape[0], chosen.size
    bound = total // plan.tile.rows + min(experts.count, total)
    bound += -(-tokens // plan.tile.rows) * experts.rides
    (cut,) = PLAN(
        [chosen, order],
        template=plan.plan,
        grid=(PLAN_THREADS, 1, 1),
        threadgroup=(PLAN_THREADS, 1, 1),
        shapes=[(bound, 4)],
        dtypes=[mx.int32],
    )
    threads = 32 * plan.tile.simd_rows * plan.tile.simd_columns
    (h,) = GATE_UP(
        [x, order, cut, *experts.gate_up_arrays],
        template=plan.gate_up,
        grid=(plan.inner // (tiles.COLUMNS // 2) * threads, bound, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(total + tokens * experts.rides, plan.inner)],
        dtypes=[plan.operand],
    )
    (parts,) = DOWN(
        [h, order, weights, cut, *experts.down_arrays],
        template=plan.down,
        grid=(-(-plan.hidden // tiles.COLUMNS) * threads, bound, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(tokens, plan.slots, plan.hidden)],
        dtypes=[mx.float32],
    )
    return parts
