"""The one place that chooses between a kernel and the plain form of an operation.

A kernel runs where `choices` prefers it on the backend that `launch` names, its ``supports`` takes the arguments, and the
backend's ledger has seen it agree with the plain form; all else goes through plain MLX operations, which give the same results
to within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from metal_kernels import choices, launch
from metal_kernels import fused_qmv as qmv
from metal_kernels import norm_router as norms
from metal_kernels.agreement import Judge, agree
from metal_kernels.fused_qmv import Matrices
from metal_kernels.heads import Heads
from metal_kernels.lightning_attn import (
    chunk_lightning_attn,
    fused_recurrent,
    naive_lightning_attn,
    naive_qkv_lightning_attn,
    simd_chunk,
)
from metal_kernels.linear_gate import fused as gate_kernel
from metal_kernels.linear_gate.naive import naive_linear_gate
from metal_kernels.packed import Packed
from metal_kernels.qk_norm_rope import fused as qk_kernel
from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope
from metal_kernels.quantized_moe import Experts, decode_moe, plain_moe, prefill_moe, supports_decode, supports_prefill
from metal_kernels.router import fused as router_kernel
from metal_kernels.router.choice import agree_on_experts
from metal_kernels.router.naive import naive_route

LONGEST_CHUNK = 64
MoEKernel = Callable[[mx.array, mx.array, mx.array, Experts, "mx.array | None"], "mx.array | None"]


def lightning_attn(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_lightning_attn`: one token goes through the recurrence, more through chunks.

    A token takes 4 C D operations within its chunk of C tokens and 4 D^2 between chunks: longer chunks than D cost
    more, much shorter ones save little, unless this machine chose otherwise.
    """
    if q.shape[1] == 1:
        return naive_lightning_attn(q, k, v, decay_rate, scale, state, mask)
    arguments = q, k, v, decay_rate, scale, state, mask
    if choices.ours("lightning_attn", q.shape[1]) and simd_chunk.supports(q, k, v, decay_rate):
        return _served("lightning_attn", simd_chunk.simd_chunk_lightning_attn, _chunked, arguments)
    return _chunked(*arguments)


def _chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    size = choices.chosen("chunk_tokens/9+")
    chunk_size = max(16, min(LONGEST_CHUNK, q.shape[-1])) if size == choices.BY_HEAD else int(size)
    return chunk_lightning_attn(q, k, v, decay_rate, scale, state, mask, chunk_size)


def qkv_lightning_attn(
    qkv: mx.array,
    heads: Heads,
    decay_rate: mx.array,
    scale: float,
    offset: int | mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Lightning attention from the fused projection: norms, rotation and `naive_lightning_attn`.

    Args:
        qkv: [B, T, 3 H D].
        heads: Norms and rotation, with as many heads of k and v as of q.
        decay_rate: s, [H] float32.
        scale: Factor of the output.
        offset: Position of the first token, one for all rows or [B].
        state: [B, H, D, D] float32; None is zero.
        mask: True where a token counts [B, T], or None for all.

    Returns:
        o [B, T, H D] in the dtype of ``qkv``, and the state after the last token.
    """

    def separately(*_: Any) -> tuple[mx.array, mx.array]:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in qk_norm_rope(qkv, heads, offset))
        o, after = lightning_attn(q, k, v, decay_rate, scale, state, mask)
        return o.reshape(*o.shape[:2], -1), after

    h = heads
    kinds = qkv, h.q_weight, h.k_weight, h.inv_freq, decay_rate
    if not choices.ours("recurrent", qkv.shape[1]) or not fused_recurrent.supports(*kinds):
        return separately()
    arguments = *kinds[:4], h.rope_scale, offset, decay_rate, scale, h.eps, state, mask
    kernel, plain = fused_recurrent.fused_qkv_lightning_attn, naive_qkv_lightning_attn
    return _served("qkv_lightning_attn", kernel, plain, arguments, separately)


def qk_norm_rope(qkv: mx.array, heads: Heads, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """q [B, num_heads, T, D], k and v [B, num_kv_heads, T, D] of a fused projection, q and k normed and rotated."""
    h = heads
    kinds, counts = (qkv, h.q_weight, h.k_weight, h.inv_freq), (h.num_heads, h.num_kv_heads)
    if not choices.ours("qk_norm_rope", _tokens(qkv)) or not qk_kernel.supports(*kinds, *counts):
        return heads.split(qkv, offset)
    arguments = *kinds, h.rope_scale, offset, h.eps, *counts
    kernel, plain = qk_kernel.fused_qk_norm_rope, naive_qk_norm_rope
    return _served("qk_norm_rope", kernel, plain, arguments, lambda *_: heads.split(qkv, offset))


def linear_gate(x: mx.array, gate: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """Same contract as `naive_linear_gate`."""
    arguments = x, gate, weight, groups, eps
    if choices.ours("linear_gate", _tokens(x)) and gate_kernel.supports(x, gate, weight, groups):
        return _served("linear_gate", gate_kernel.fused_linear_gate, naive_linear_gate, arguments)
    return naive_linear_gate(*arguments)


def route(
    logits: mx.array,
    bias: mx.array | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling_factor: float,
    normalize: bool,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_route`."""
    arguments = logits, bias, top_k, n_group, topk_group, scaling_factor, normalize
    if choices.ours("route", _tokens(logits)) and router_kernel.supports(logits, bias, top_k, n_group):
        return _served("route", router_kernel.fused_route, naive_route, arguments, judge=agree_on_experts)
    return naive_route(*arguments)


def add_norm(
    x: mx.array, r: mx.array | None, weight: mx.array, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_add_norm`."""
    if r is not None and choices.ours("add_norm", _tokens(x)) and norms.supports_add_norm(x, r, weight, dtype):
        return _served("add_norm", norms.fused_add_norm, norms.naive_add_norm, (x, r, weight, eps, dtype))
    return norms.naive_add_norm(x, r, weight, eps, dtype)


def norm_router(
    x: mx.array, r: mx.array | None, weight: mx.array, router: Packed, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array, mx.array] | None:
    """What `naive_norm_router` returns, or None where MLX's product shall do it."""
    if not choices.ours("norm_router", _tokens(x)) or not norms.supports(x, r, weight, router, dtype):
        return None
    arguments = x, r, weight, router, eps, dtype
    return _served("norm_router", norms.fused_norm_router, norms.naive_norm_router, arguments, _nothing)


def norm_qmv(
    x: mx.array, weight: mx.array, eps: float, matrices: Matrices, dtype: mx.Dtype | None = None
) -> tuple[mx.array, ...] | None:
    """What `naive_norm_qmv` returns, or None where MLX's products shall do it."""
    if not choices.ours("norm_qmv", _tokens(x)) or not qmv.supports_norm_qmv(x, weight, matrices, dtype):
        return None
    return _served("norm_qmv", qmv.fused_norm_qmv, qmv.naive_norm_qmv, (x, weight, eps, matrices, dtype), _nothing)


def gate_qmv(
    x: mx.array,
    gate: mx.array,
    weight: mx.array,
    groups: int,
    eps: float,
    matrices: Matrices,
    residual: mx.array | None = None,
) -> mx.array | None:
    """What `naive_gate_qmv` returns, or None where MLX's product shall do it."""
    if not choices.ours("gate_qmv", _tokens(x)) or not qmv.supports_gate_qmv(
        x, gate, weight, groups, matrices, residual
    ):
        return None
    arguments = x, gate, weight, groups, eps, matrices, residual
    return _served("gate_qmv", qmv.fused_gate_qmv, qmv.naive_gate_qmv, arguments, _nothing)


def add_qmv(x: mx.array, matrices: Matrices, residual: mx.array | None = None) -> mx.array | None:
    """What `naive_add_qmv` returns, or None where MLX's product shall do it."""
    if not choices.ours("add_qmv", _tokens(x)) or not qmv.supports_add_qmv(x, matrices, residual):
        return None
    return _served("add_qmv", qmv.fused_add_qmv, qmv.naive_add_qmv, (x, matrices, residual), _nothing)


def moe_kernel(experts: Experts, x: mx.array) -> MoEKernel | None:
    """What computes `naive_moe` for tokens x [..., D], or None where MLX's products shall do it.

    The kernel returns None where it is off.
    """
    if not choices.ours("experts", _tokens(x)):
        return None
    if supports_decode(experts, x):
        return partial(_moe, "decode_moe", decode_moe)
    return partial(_moe, "prefill_moe", prefill_moe) if supports_prefill(experts, x) else None


def _moe(operation: str, kernel: Callable[..., mx.array], *arguments: Any) -> mx.array | None:
    found: mx.array | None = _served(operation, kernel, plain_moe, arguments, _nothing)
    return found


def _served(
    operation: str,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: tuple[Any, ...],
    otherwise: Callable[..., Any] | None = None,
    judge: Judge = agree,
) -> Any:
    """What the kernel makes of the arguments, once it is proven; see `Ledger.serve`."""
    where = launch.backend()
    if where is None or where.ledger is None:
        return kernel(*arguments)
    return where.ledger.serve(operation, kernel, plain, arguments, otherwise or plain, judge)


def _nothing(*_: Any) -> None:
    """In place of a kernel that is off, where the caller has MLX's operations."""


def _tokens(x: mx.array) -> int:
    return math.prod(x.shape[:-1])
