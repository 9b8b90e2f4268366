"""The one place that chooses between a kernel and the plain form of an operation.

A kernel runs where `choices` prefers it on the backend that `launch` names, its wrapper takes the arguments, and the backend's
ledger has seen it agree with the plain form. All else goes through plain MLX operations, which give the same results to within
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.core import array

from metal_kernels import choices, launch
from metal_kernels.affine_fit.fused import fused_affine_fit
from metal_kernels.affine_fit.naive import Effort, naive_affine_fit
from metal_kernels.agreement import Judge, Judged, agree, same_bits
from metal_kernels.ends.fused import fused_embed, fused_peak
from metal_kernels.ends.naive import naive_embed, naive_peak
from metal_kernels.few_queries.fused import MAX_QUERIES, UNSPLIT_KEYS, fused_few_queries
from metal_kernels.few_queries.naive import naive_few_queries
from metal_kernels.fused_qmv.fused import fused_add_qmv, fused_gate_qmv, fused_head, fused_norm_qmv
from metal_kernels.fused_qmv.naive import naive_add_qmv, naive_gate_qmv, naive_head, naive_norm_qmv
from metal_kernels.heads import Heads
from metal_kernels.lightning_attn import simd_chunk
from metal_kernels.lightning_attn.chunk import chunk_lightning_attn
from metal_kernels.lightning_attn.fused_recurrent import fused_qkv_lightning_attn
from metal_kernels.lightning_attn.naive import naive_lightning_attn, naive_qkv_lightning_attn
from metal_kernels.linear_gate.fused import fused_linear_gate
from metal_kernels.linear_gate.naive import naive_linear_gate
from metal_kernels.norm_router.fused import fused_add_norm, fused_norm_router
from metal_kernels.norm_router.naive import naive_add_norm, naive_norm_router
from metal_kernels.packed import Matrices, Packed
from metal_kernels.qk_norm_rope.fused import fused_qk_norm_rope
from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope
from metal_kernels.quantized_moe.decode import check_decode, decode_moe
from metal_kernels.quantized_moe.decode import routed_moe as fused_routed_moe
from metal_kernels.quantized_moe.experts import Experts, naive_routed_moe, plain_moe
from metal_kernels.quantized_moe.prefill import check_prefill, prefill_moe
from metal_kernels.recorded import find
from metal_kernels.router.choice import agree_on_experts
from metal_kernels.router.fused import fused_route
from metal_kernels.router.naive import naive_route

LONGEST_CHUNK = 64
# By which name an operation is chosen, where it is another one.
CHOICES = {"qkv_lightning_attn": "recurrent", "decode_moe": "experts", "routed_moe": "experts"}
MoEKernel = Callable[[array, array, array, Experts, "array | None"], "array | None"]


def lightning_attn(
    q: array, k: array, v: array, decay_rate: array, scale: float, state: array | None = None, mask: array | None = None
) -> tuple[array, array]:
    """Same contract as `naive_lightning_attn`: one token goes through the recurrence, more through chunks.

    A token takes 4 C D operations within its chunk of C tokens and 4 D^2 between chunks: longer chunks than D cost
    more, much shorter ones save little, unless this machine chose otherwise.
    """
    if q.shape[1] == 1:
        return naive_lightning_attn(q, k, v, decay_rate, scale, state, mask)
    arguments = q, k, v, decay_rate, scale, state, mask
    if choices.ours("lightning_attn", q.shape[1]) and simd_chunk.supports(q, k, v, decay_rate):
        run = partial(simd_chunk.simd_chunk_lightning_attn, *arguments)
        return _proven("lightning_attn", run, _chunked, arguments, _chunked)
    return _chunked(*arguments)


def _chunked(*arguments: Any) -> tuple[array, array]:
    size, longest = choices.chosen("chunk_tokens/9+"), min(LONGEST_CHUNK, arguments[0].shape[-1])
    sized = *arguments, max(16, longest) if size == choices.BY_HEAD else int(size)
    return chunk_lightning_attn(*sized)


def qkv_lightning_attn(
    qkv: array,
    heads: Heads,
    decay_rate: array,
    scale: float,
    offset: int | array,
    state: array | None = None,
    mask: array | None = None,
    each: bool = False,
) -> tuple[array, array]:
    """Same contract as `naive_qkv_lightning_attn`; ``heads`` has norms and rotation, and as many of k and v as of q."""

    def separately(*_: Any) -> tuple[array, array]:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in qk_norm_rope(qkv, heads, offset))
        o, after = lightning_attn(q, k, v, decay_rate, scale, state, mask)
        return o.reshape(*o.shape[:2], -1), after

    if launch.backend() is None and not each:
        return separately()
    h, where = heads, launch.positions(offset)
    rotation = qkv, h.q_weight, h.k_weight, h.inv_freq, h.rope_scale, where
    arguments = *rotation, decay_rate, scale, h.eps, state, mask, each
    kernel, plain = fused_qkv_lightning_attn, naive_qkv_lightning_attn
    return _served("qkv_lightning_attn", kernel, plain, arguments, plain if each else separately)


def qk_norm_rope(qkv: array, heads: Heads, offset: int | array) -> tuple[array, array, array]:
    """q [B, num_heads, T, D], k and v [B, num_kv_heads, T, D] of a fused projection, q and k normed and rotated."""
    if launch.backend() is None:
        return heads.split(qkv, offset)
    h = heads
    rotation = qkv, h.q_weight, h.k_weight, h.inv_freq, h.rope_scale, launch.positions(offset)
    arguments = *rotation, h.eps, h.num_heads, h.num_kv_heads
    kernel, plain = fused_qk_norm_rope, naive_qk_norm_rope
    return _served("qk_norm_rope", kernel, plain, arguments, lambda *_: heads.split(qkv, offset))


def few_queries(
    q: array, k: array, v: array, offset: int | array, scale: float, start: array | None = None
) -> array | None:
    """Same result as `naive_few_queries`, or None where MLX's attention is used."""
    operation, T = "few_queries" if k.shape[2] <= UNSPLIT_KEYS else "many_keys", q.shape[2]
    if T > MAX_QUERIES or not choices.ours(operation, T):  # asked here first, since the rest costs Python time
        return None
    arguments = q, k, v, launch.positions(offset), scale, start
    return _served(operation, fused_few_queries, naive_few_queries, arguments, _nothing)


def linear_gate(x: array, gate: array, weight: array, groups: int, eps: float) -> array:
    """Same contract as `naive_linear_gate`."""
    return _served("linear_gate", fused_linear_gate, naive_linear_gate, (x, gate, weight, groups, eps))


def route(
    logits: array, bias: array | None, top_k: int, n_group: int, topk_group: int, factor: float, normalize: bool
) -> tuple[array, array]:
    """Same contract as `naive_route`."""
    arguments = logits, bias, top_k, n_group, topk_group, factor, normalize
    return _served("route", fused_route, naive_route, arguments, judge=agree_on_experts)


def add_norm(
    x: array, r: array | None, weight: array, eps: float, dtype: mx.Dtype | None = None
) -> tuple[array, array]:
    """Same contract as `naive_add_norm`."""
    if r is None:
        return naive_add_norm(x, r, weight, eps, dtype)
    return _served("add_norm", fused_add_norm, naive_add_norm, (x, r, weight, eps, dtype))


def norm_router(
    x: array, r: array | None, weight: array, router: Packed, eps: float, dtype: mx.Dtype | None = None
) -> tuple[array, array, array] | None:
    """Same result as `naive_norm_router`, or None where MLX's product is used."""
    arguments = x, r, weight, router, eps, dtype
    return _served("norm_router", fused_norm_router, naive_norm_router, arguments, _nothing)


def affine_fit(w: array, bits: int, group_size: int, dtype: mx.Dtype, effort: Effort) -> tuple[array, array, array]:
    """Same contract as `naive_affine_fit`, to the bit."""
    arguments = w, bits, group_size, dtype, effort
    return _served("affine_fit", fused_affine_fit, naive_affine_fit, arguments, judge=same_bits)


def norm_qmv(
    x: array, weight: array, eps: float, matrices: Matrices | None, dtype: mx.Dtype | None = None
) -> tuple[array, ...] | None:
    """Same result as `naive_norm_qmv`, or None where MLX's products are used."""
    if matrices is None:
        return None
    return _served("norm_qmv", fused_norm_qmv, naive_norm_qmv, (x, weight, eps, matrices, dtype), _nothing)


def gate_qmv(
    x: array,
    gate: array,
    weight: array,
    groups: int,
    eps: float,
    matrices: Matrices | None,
    residual: array | None = None,
) -> array | None:
    """Same result as `naive_gate_qmv`, or None where MLX's product is used."""
    if matrices is None:
        return None
    arguments = x, gate, weight, groups, eps, matrices, residual
    return _served("gate_qmv", fused_gate_qmv, naive_gate_qmv, arguments, _nothing)


def add_qmv(x: array, matrices: Matrices | None, residual: array | None = None) -> array | None:
    """Same result as `naive_add_qmv`, or None where MLX's product is used."""
    if matrices is None:
        return None
    return _served("add_qmv", fused_add_qmv, naive_add_qmv, (x, matrices, residual), _nothing)


def embed(tokens: array, matrix: Packed, dtype: mx.Dtype) -> array | None:
    """Same result as `naive_embed` for a packed matrix, or None where MLX's operations are used."""
    return _served("embed", fused_embed, naive_embed, (tokens, matrix, dtype), _nothing)


def peak(x: array) -> tuple[array, array]:
    """Same contract as `naive_peak`."""
    return _served("peak", fused_peak, naive_peak, (x,), judge=same_bits)


def head(x: array, weight: array, eps: float, matrices: Matrices | None) -> array | None:
    """Same result as `naive_head`, or None where MLX's norm and product are used."""
    if matrices is None:
        return None
    return _served("head", fused_head, naive_head, (x, weight, eps, matrices), _nothing)


def routed_moe(*arguments: Any) -> tuple[array, array, array] | None:
    """Same result as `naive_routed_moe` for one token, or None where its choice is made apart."""
    if choices.chosen("route/1") != choices.WITHIN:
        return None
    return _served("routed_moe", fused_routed_moe, naive_routed_moe, arguments, _nothing, _agree_routed)


def _agree_routed(
    operation: str, arguments: tuple[Any, ...], found: tuple[array, ...], expected: tuple[array, ...]
) -> Judged:
    """The choice as `route`'s, and the rest against the plain form for what was chosen, since near ties may fall either way."""
    x, *routing, experts, residual = arguments
    error, problem = agree_on_experts(operation, tuple(routing), (found[1], found[2]), (expected[1], expected[2]))
    if problem != "":
        return error, problem
    chosen = x, found[1], found[2], experts, residual
    return agree("decode_moe", chosen, found[0], plain_moe(*chosen))


def moe_kernel(experts: Experts, x: array) -> MoEKernel | None:
    """A function that computes `plain_moe` for tokens x [..., D], or None where MLX's products are used.

    The kernel returns None where it is off.
    """
    if launch.backend() is None:
        return None
    if find(check_decode, (x, experts), "experts")[0] is not None:
        return _few_tokens
    return _many_tokens if find(check_prefill, (x, experts), "experts")[0] is not None else None


def _few_tokens(x: array, chosen: array, weights: array, experts: Experts, residual: array | None) -> array | None:
    arguments = x, chosen, weights, experts, residual
    if experts.shared is None or experts.rides:
        return _served("decode_moe", decode_moe, plain_moe, arguments, _nothing)
    return _proven("decode_moe", partial(decode_moe, *arguments), plain_moe, arguments, _nothing)


def _many_tokens(*arguments: Any) -> array | None:
    return _proven("prefill_moe", partial(prefill_moe, *arguments), plain_moe, arguments, _nothing)


def _served(
    operation: str,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: tuple[Any, ...],
    otherwise: Callable[..., Any] | None = None,
    judge: Judge = agree,
) -> Any:
    """The kernel's result if it takes the arguments, is preferred and proven; else the result of ``otherwise``.

    By default that is ``plain``, to which the kernel is held.
    """
    otherwise = otherwise or plain
    if launch.backend() is None:
        return otherwise(*arguments)
    call, arrays = find(kernel, arguments, CHOICES.get(operation, operation))
    if call is None:
        return otherwise(*arguments)
    return _proven(operation, partial(call, arrays), plain, arguments, otherwise, judge)


def _proven(
    operation: str,
    run: Callable[[], Any],
    plain: Callable[..., Any],
    arguments: tuple[Any, ...],
    otherwise: Callable[..., Any],
    judge: Judge = agree,
) -> Any:
    """What ``run`` launches if its kernels are proven; see `Ledger.settle`."""
    where = launch.backend()
    if where is None or where.ledger is None:
        return run()
    try:
        return run()
    except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
        return where.ledger.settle(e, operation, run, plain, arguments, otherwise, judge)


def _nothing(*_: Any) -> None:
    """Replaces a kernel that is off, where the caller has MLX's operations."""
