"""Lightning attention token by token in float32: the definition that every other form is held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.core import array

from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope


def naive_lightning_attn(
    q: array, k: array, v: array, decay_rate: array, scale: float, state: array | None = None, mask: array | None = None
) -> tuple[array, array]:
    """Linear attention with a fixed decay per head, one token after the other.

    For each head with rate s, over the tokens t of a row::

        S_t = exp(-s) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t

    A masked token leaves the state as it was: it neither adds nor decays, and its output is ``scale * q_t S_{t-1}``.

    Args:
        q: Queries [B, T, H, K], any float dtype.
        k: Keys [B, T, H, K].
        v: Values [B, T, H, V].
        decay_rate: s, [H], float32, not negative.
        scale: Factor of the output, K^-0.5 in this model.
        state: S before the first token, [B, H, K, V] float32; None is zero.
        mask: True where a token counts, [B, T] bool; None is all of them.

    Returns:
        o [B, T, H, V] in the dtype of ``q``, and S after the last token, [B, H, K, V] float32.

    Source: arXiv 2510.19338, section 2; the decay is that of lightning attention, arXiv 2401.04658.
    """
    B, T, H, K = q.shape
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    S = mx.zeros((B, H, K, v.shape[-1]), mx.float32) if state is None else state.astype(mx.float32)
    decay = mx.exp(-decay_rate.astype(mx.float32))[None, :, None, None]
    out = []
    for t in range(T):
        updated = S * decay + k[:, t, :, :, None] * v[:, t, :, None, :]
        S = updated if mask is None else mx.where(mask[:, t, None, None, None], updated, S)
        out.append((q[:, t, :, None, :] @ S)[:, :, 0])
    o = mx.stack(out, axis=1) if T else mx.zeros(v.shape, mx.float32)
    return (scale * o).astype(dtype), S


class Recurrence(NamedTuple):
    """A fused projection, and the attention over its heads.

    Attributes:
        qkv: [B, T, 3 * H * D], rows [Q | K | V], any float dtype.
        q_weight, k_weight, inv_freq, rope_scale, offset, eps: As of `Projection`.
        decay_rate, scale, state, mask: As of `naive_lightning_attn`, with K = V = D.
        each: Whether the state after each token is wanted, so that the last tokens can be taken back.
    """

    qkv: array
    q_weight: array | None
    k_weight: array | None
    inv_freq: array
    rope_scale: float
    offset: int | array
    decay_rate: array
    scale: float
    eps: float
    state: array | None = None
    mask: array | None = None
    each: bool = False


def naive_qkv_lightning_attn(*arguments: Any) -> tuple[array, array]:
    """Lightning attention straight from the fused projection, nothing rounded before the output.

    ::

        q, k, v = qk_norm_rope(qkv),  o, S = lightning_attn(q, k, v)

    Args:
        arguments: The fields of `Recurrence`.

    Returns:
        o [B, T, H * D] in the dtype of ``qkv``, and S after the last token, [B, H, D, D] float32; with ``each`` S after each, [T, B, H, D, D].
    """
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, decay_rate, scale, eps, state, mask, each = Recurrence(
        *arguments
    )
    H = decay_rate.shape[0]
    heads = naive_qk_norm_rope(qkv.astype(mx.float32), q_weight, k_weight, inv_freq, rope_scale, offset, eps, H, H)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in heads)
    tokens = [slice(t, t + 1) for t in range(q.shape[1])] if each else [slice(None)]
    out, states, S = [], [], state
    for t in tokens:
        counted = None if mask is None else mask[:, t]
        o, S = naive_lightning_attn(q[:, t], k[:, t], v[:, t], decay_rate, scale, S, counted)
        out.append(o)
        states.append(S)
    o = mx.concatenate(out, axis=1).flatten(2).astype(qkv.dtype)
    return o, mx.stack(states) if each else states[0]
