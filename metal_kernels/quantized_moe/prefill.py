"""Mixture of experts for many tokens, sorted by expert."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from metal_kernels.constants import CODES, FLOATS, TALL
from metal_kernels.launch import Kernel, backend
from metal_kernels.quantized_moe import tiles
from metal_kernels.quantized_moe.experts import Experts, shared_product
from metal_kernels.quantized_moe.tiles import Tile
from metal_kernels.recorded import NoKernelError, run

HERE = Path(__file__).parent
HEADERS = [CODES, TALL, HERE / "grouped.metal"]
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


def check_prefill(x: mx.array, experts: Experts) -> tuple[()]:
    """Whether `prefill_moe` takes these tokens [..., D].

    Raises NoKernelError unless there is one at least, and formats that the kernels read.
    """
    if not experts.supported or x.dtype not in FLOATS or x.size < 1:
        raise NoKernelError(f"[moe] no kernel for x {x.shape} {x.dtype} and {experts.gate.mode} experts.")
    return ()


def prefill_moe(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    experts: Experts,
    residual: mx.array | None = None,
    tile: Tile | None = None,
    operand: mx.Dtype | None = None,
) -> mx.array:
    """Same contract as `plain_moe`, for what `check_prefill` accepts; in five dispatches and a sort, no host sync.

    With 16-bit operands the dequantized weights and the products of gate and up are rounded to them, as MLX's own
    quantized product does; all sums are float32.

    Args:
        x, chosen, weights, experts, residual: As of `decode_moe`.
        tile: Rows of a threadgroup and their simdgroups; None chooses by the number of tokens.
        operand: What is multiplied, float32 or a 16-bit type; None takes the backend's.

    Raises:
        ValueError: If shapes or dtypes disagree.
    """
    experts.check(x, chosen, weights, residual)
    top_k, dtype, shape = chosen.shape[-1], mx.float32 if residual is None else residual.dtype, x.shape
    x, chosen = x.reshape(-1, shape[-1]), chosen.reshape(-1, top_k)
    if experts.shared is not None and not experts.rides:
        added = shared_product(x, experts.shared)
        residual = added if residual is None else added + residual.reshape(x.shape)
        experts = experts.stacks
    where, tokens = backend(), chosen.shape[0]
    tile = tile or tiles.prefill_tile(tokens * top_k / experts.gate.shape[0], tokens)
    operand = operand or tiles.operand(where.name if where else "", x.dtype)
    order = mx.argsort(chosen.reshape(-1))
    found: mx.array = run(_launch, x, chosen, weights, order, experts, residual, tile, operand, dtype)
    return found.reshape(shape)


def _launch(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    order: mx.array,
    experts: Experts,
    residual: mx.array | None,
    tile: Tile,
    operand: mx.Dtype,
    dtype: mx.Dtype,
) -> mx.array:
    """For x [T, D] and the order [T k] in which the pairs of token and expert are sorted by expert."""
    (tokens, top_k), rides, slots = chosen.shape, int(experts.rides), experts.slots(chosen.shape[1])
    (E, inner, hidden), total = experts.gate.shape, chosen.size
    bound = total // tile.rows + min(E, total) + -(-tokens // tile.rows) * rides
    common: list[tuple[str, int | mx.Dtype]] = [
        ("BM", tile.rows),
        ("BN", tiles.COLUMNS),
        ("BK", tiles.DEPTH_BYTES // operand.size),
    ]
    common += [("WM", tile.simd_rows), ("WN", tile.simd_columns), ("T", operand), ("TOP_K", top_k)]
    (cut,) = PLAN.launch(
        [chosen, order],
        template=[("E", E), ("TOP_K", top_k), ("BM", tile.rows), ("SHARED", experts.rides)],
        grid=(PLAN_THREADS, 1, 1),
        threadgroup=(PLAN_THREADS, 1, 1),
        shapes=[(bound, 4)],
        dtypes=[mx.int32],
    )
    threads = 32 * tile.simd_rows * tile.simd_columns
    (h,) = GATE_UP.launch(
        [x, order, cut, *experts.arrays(0, 1)],
        template=[*experts.gate.template, *common],
        grid=(inner // (tiles.COLUMNS // 2) * threads, bound, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(total + tokens * rides, inner)],
        dtypes=[operand],
    )
    (parts,) = DOWN.launch(
        [h, order, weights, cut, *experts.arrays(2)],
        template=[*experts.down.template, *common, ("SLOTS", slots)],
        grid=(-(-hidden // tiles.COLUMNS) * threads, bound, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(tokens, slots, hidden)],
        dtypes=[mx.float32],
    )
    return COMBINE.launch(
        [parts, parts if residual is None else residual],
        template=[("N", hidden), ("SLOTS", slots), ("HAS_RESIDUAL", residual is not None), ("O", dtype)],
        grid=(hidden // 4, tokens, 1),
        threadgroup=(min(hidden // 4, COMBINE_THREADS), 1, 1),
        shapes=[(tokens, hidden)],
        dtypes=[dtype],
    )[0]
