"""Mixture of experts for a few tokens, in two dispatches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import BLOCKS, CHOOSE, CODES, FLOATS, bits
from metal_kernels.launch import Kernel
from metal_kernels.packed import THREADGROUP_BYTES, Packed, padded
from metal_kernels.quantized_moe.experts import Experts, shared_product
from metal_kernels.quantized_moe.tiles import Rows, decode_rows
from metal_kernels.recorded import NoKernelError, run
from metal_kernels.router.fused import MAX_TOP_K, check_route

MAX_TOKENS = 8
MAX_SIMDGROUPS = 12  # 384 threads, which every pipeline of an Apple GPU may have
MOST_WORDS = 64  # of weights that a lane keeps for several tokens
HERE = Path(__file__).parent
FIRST = [f"{m}_{part}" for m in ("gate", "up", "shared_gate", "shared_up") for part in "wsb"]
SECOND = [f"{m}_{part}" for m in ("down", "shared_down") for part in "wsb"]
GATE_UP = Kernel(
    HERE / "decode_gate_up.metal",
    ["x", "chosen", *FIRST],
    ["h"],
    [CODES, BLOCKS],
)
ROUTED_GATE_UP = Kernel(
    HERE / "decode_gate_up.metal",
    ["x", "logits", "bias", *FIRST],
    ["h", "chosen", "weights"],
    [CODES, BLOCKS, CHOOSE],
)
DOWN = Kernel(
    HERE / "decode_down.metal",
    ["h", "chosen", "weights", *SECOND, "residual"],
    ["y"],
    [CODES, BLOCKS],
)


def check_decode(x: mx.array, experts: Experts) -> tuple[()]:
    """Whether `decode_moe` takes these tokens [..., D].

    Raises NoKernelError unless there are 1 to 8 of them, formats that the kernels read, and rows that fit.
    """
    tokens = math.prod(x.shape[:-1])
    is_known = experts.supported and x.dtype in FLOATS and 1 <= tokens <= MAX_TOKENS
    if not is_known or min(_simdgroups(experts, x.dtype, _rows(experts, tokens), 1, tokens)) == 0:
        raise NoKernelError(f"[moe] no kernel for x {x.shape} {x.dtype} and {experts.gate.mode} experts.")
    return ()


def decode_moe(
    x: mx.array, chosen: mx.array, weights: mx.array, experts: Experts, residual: mx.array | None = None
) -> mx.array:
    """Same contract as `plain_moe`, for what `check_decode` accepts; sums of products in another order.

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
    if experts.shared is None or experts.rides:
        return _launch(x, chosen, weights, experts, residual, dtype)
    added = shared_product(x, experts.shared)
    added = added if residual is None else added + residual
    found: mx.array = run(_launch, x, chosen, weights, experts.stacks, added, dtype)
    return found


def routed_moe(
    x: mx.array,
    logits: mx.array,
    bias: mx.array | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    factor: float,
    normalize: bool,
    experts: Experts,
    residual: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_routed_moe` for one token, in two dispatches: the first makes the choice in every threadgroup.

    Raises:
        NoKernelError: Unless `check_decode` takes the token, the shared expert rides, and `fused_route` takes the logits.
    """
    check_decode(x, experts)
    check_route(logits, bias, top_k, n_group)
    if x.size != x.shape[-1] or logits.shape[:-1] != x.shape[:-1] or not (experts.shared is None or experts.rides):
        raise NoKernelError(f"[moe] no kernel that chooses experts for x {x.shape} and logits {logits.shape}.")
    routing = (
        *(("E", logits.shape[-1]), ("GROUPS", n_group), ("TOPK_GROUP", topk_group), ("HAS_BIAS", bias is not None)),
        *(("NORMALIZE", normalize and top_k > 1), ("SCALING", bits(factor))),
    )
    opening = ROUTED_GATE_UP, [x, logits, logits if bias is None else bias], top_k, routing
    h, chosen, weights = _gate_up(*opening, experts)
    dtype = mx.float32 if residual is None else residual.dtype
    return _down(h, chosen, weights, experts, residual, x.dtype, dtype), chosen, weights


def _launch(
    x: mx.array, chosen: mx.array, weights: mx.array, experts: Experts, residual: mx.array | None, dtype: mx.Dtype
) -> mx.array:
    (h,) = _gate_up(GATE_UP, [x, chosen], chosen.shape[-1], (), experts)
    return _down(h, chosen, weights, experts, residual, x.dtype, dtype)


def _gate_up(
    kernel: Kernel, inputs: list[mx.array], top_k: int, routing: Sequence[tuple[str, Any]], experts: Experts
) -> list[mx.array]:
    """h, and the choice and its weights where the kernel makes it."""
    x, first, second = inputs[0], _cut(experts.gate), _cut(experts.down)
    (*leading, _), tokens, slots = x.shape, math.prod(x.shape[:-1]), experts.slots(top_k)
    rows = _rows(experts, tokens)
    simdgroups, _ = _simdgroups(experts, x.dtype, rows, 1, tokens, 4 * (dict(routing).get("E", 0) + 2 * MAX_TOP_K))
    threads = 32 * simdgroups
    arrays, places = experts.bound(0, 1)
    picked = [(*leading, top_k)] * (2 if routing else 0)
    return kernel.launch(
        [*inputs, *arrays],
        template=[
            *(*first.items(), ("TOP_K", top_k), ("SLOTS", slots)),
            *(("TOKENS", tokens), ("X", x.dtype), ("ROWS", rows.gate_up), ("SIMDGROUPS", simdgroups)),
            *(("DOWN_STEP", second["STEP"]), ("DOWN_LANES", second["LANES"])),
            *(*zip(map(str.upper, FIRST), places, strict=True), *routing),
        ],
        grid=(-(-first["N"] // (simdgroups * rows.gate_up * 32 // first["LANES"])) * threads, slots, tokens),
        threadgroup=(threads, 1, 1),
        shapes=[(tokens, slots, first["N"]), *picked],
        dtypes=[mx.float32, mx.int32, mx.float32][: 1 + len(picked)],
    )


def _down(
    h: mx.array,
    chosen: mx.array,
    weights: mx.array,
    experts: Experts,
    residual: mx.array | None,
    x: mx.Dtype,
    dtype: mx.Dtype,
) -> mx.array:
    (*leading, top_k), (tokens, slots, _), second = chosen.shape, h.shape, _cut(experts.down)
    rows = _rows(experts, tokens)
    together = tokens if rows.is_down_together else 1
    pairs = together * top_k + slots - top_k
    _, most = _simdgroups(experts, x, rows, pairs, tokens)
    threads = 32 * -(-pairs // -(-pairs // most))
    arrays, places = experts.bound(2)
    return DOWN.launch(
        [h, chosen, weights, *arrays, h if residual is None else residual],
        template=[
            *(*second.items(), ("TOP_K", top_k), ("SLOTS", slots)),
            *(("TOKENS", together), ("ROWS", rows.down), ("SIMDGROUPS", threads // 32)),
            *(("HAS_RESIDUAL", residual is not None), ("O", dtype)),
            *zip(map(str.upper, SECOND), places, strict=True),
        ],
        grid=(-(-second["N"] // (rows.down * 32 // second["LANES"])) * threads, tokens // together, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(*leading, second["N"])],
        dtypes=[dtype],
    )[0]


def _cut(w: Packed) -> dict[str, Any]:
    """What both kernels' templates say of a stack."""
    form: dict[str, Any] = dict(w.template)
    step, lanes = _steps(form["BITS"], form["K"])
    return form | {"STEP": step, "LANES": lanes, "W": w.weight.dtype, "S": w.arrays[1].dtype}


def _rows(experts: Experts, tokens: int) -> Rows:
    """Of several tokens the first kernel keeps all weights of its rows: no more than fit into registers."""
    rows, cut = decode_rows(choices.where(), tokens), _cut(experts.gate)
    words = 2 * -(-cut["K"] // (cut["STEP"] * cut["LANES"])) * cut["STEP"] * cut["BITS"] // 32
    return rows if tokens == 1 else rows._replace(gate_up=max(1, min(rows.gate_up, MOST_WORDS // words)))


def _simdgroups(
    experts: Experts, x: mx.Dtype, rows: Rows, pairs: int, tokens: int, besides: int = 0
) -> tuple[int, int]:
    """Simdgroups of a threadgroup in either kernel whose threadgroup memory suffices; 0 where it does for none."""
    first, second = (_cut(w)["LANES"] for w in (experts.gate, experts.down))
    owned, owned_down = rows.gate_up * 32 // first, rows.down * 32 // second
    x_bytes = experts.gate.shape[-1] * x.size

    def gate_up(n: int) -> int:
        return padded(x_bytes, 4 * tokens * (tokens > 1), besides, *2 * experts.gate.factor_bytes(n * owned))

    def down(n: int) -> int:
        return padded(4 * n * tokens * owned_down, *(n * -(-b // 4) * 4 for b in experts.down.factor_bytes(owned_down)))

    first = next((n for n in range(rows.simdgroups, 0, -1) if gate_up(n) <= THREADGROUP_BYTES), 0)
    second = next((n for n in range(min(pairs, MAX_SIMDGROUPS), 0, -1) if down(n) <= THREADGROUP_BYTES), 0)
    return first, second


def _steps(bits: int, K: int) -> tuple[int, int]:
    """Values a lane takes at a time (16 bytes of weights, at most 32 values), and lanes that share a row of K.

    Of the powers of two, the lanes that idle least; the most of those.
    """
    step = 128 // bits if 32 % bits == 0 and bits > 4 else 32
    steps = K // step
    lanes = min((32, 16, 8, 4, 2, 1), key=lambda n: -(-steps // n) * n + (n < 8) * steps)
    return step, lanes
