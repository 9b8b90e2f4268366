"""Lightning attention a chunk at a time: matrix products inside chunks, one product over chunk states between them."""

from __future__ import annotations

import mlx.core as mx
from mlx.core import array

SEGMENT_TOKENS = 4096


def chunk_lightning_attn(
    q: array,
    k: array,
    v: array,
    decay_rate: array,
    scale: float,
    state: array | None = None,
    mask: array | None = None,
    chunk_size: int = 64,
) -> tuple[array, array]:
    """Same contract as `naive_lightning_attn`, in float32 products over chunks of ``chunk_size`` tokens.

    With c_i the number of counted tokens of the chunk up to and with i, e_n those before chunk n, and P_n the state
    before it::

        o_i = scale * ( sum_{j <= i} exp(-s (c_i - c_j)) (q_i k_j) v_j  +  exp(-s c_i) q_i P_n )
        U_n = sum_j exp(-s (c_last - c_j)) k_j v_j^T
        P_n = exp(-s e_n) S_0 + sum_{m < n} exp(-s (e_n - e_{m+1})) U_m

    Every exponent is a masked difference and not positive, so nothing overflows however large s is. Long inputs go in
    segments of 4,096 tokens (or one chunk, if longer), which bounds the memory for the states of chunks.

    Raises:
        ValueError: If ``chunk_size`` is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"[lightning_attn] chunk_size must be positive but got {chunk_size}.")
    T = q.shape[1]
    if T == 0:
        B, _, H, K = q.shape
        empty = mx.zeros((B, H, K, v.shape[-1]), mx.float32) if state is None else state
        return mx.zeros(v.shape, q.dtype), empty
    chunk_size = min(chunk_size, T)
    segment = max(1, SEGMENT_TOKENS // chunk_size) * chunk_size
    out = []
    for start in range(0, T, segment):
        part = slice(start, start + segment)
        m = None if mask is None else mask[:, part]
        o, state = _segment(q[:, part], k[:, part], v[:, part], decay_rate, state, m, chunk_size)
        out.append((scale * o).astype(q.dtype))
    assert state is not None
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=1), state


def _segment(
    q: array, k: array, v: array, decay_rate: array, state: array | None, mask: array | None, C: int
) -> tuple[array, array]:
    B, T, H, _ = q.shape
    N = -(-T // C)
    counted = _counted(T, N, C, mask)
    keep = counted[:, None, :, :, None]
    q = _to_chunks(q, N, C)
    k, v = _to_chunks(k, N, C) * keep, _to_chunks(v, N, C)
    s = decay_rate.astype(mx.float32)[None, :, None, None]
    c = mx.cumsum(counted, axis=-1)[:, None]
    # Of a dense array: MLX's CUDA backend (0.32.4) reads outside one that is a strided view.
    ends = mx.cumsum(counted.sum(axis=-1), axis=-1)[:, None]
    starts = mx.concatenate([mx.zeros((*ends.shape[:-1], 1)), ends], axis=-1)

    within = _decay(s[..., None], c[..., :, None] - c[..., None, :], mx.tri(C, dtype=mx.float32))
    o = ((q @ k.swapaxes(-1, -2)) * within) @ v
    updates = (k * mx.exp(-s * (c[..., -1:] - c))[..., None]).swapaxes(-1, -2) @ v

    between = _decay(s, starts[..., :, None] - ends[..., None, :], mx.tri(N + 1, N, k=-1, dtype=mx.float32))
    K, V = q.shape[-1], v.shape[-1]
    states = (between @ updates.reshape(B, H, N, K * V)).reshape(B, H, N + 1, K, V)
    if state is not None:
        carried = mx.exp(-s * starts[..., None])[..., None]
        states = states + carried * state.astype(mx.float32)[:, :, None]
    o = o + (q * mx.exp(-s * c)[..., None]) @ states[:, :, :-1]
    o = o.reshape(B, H, N * C, V)[:, :, :T].transpose(0, 2, 1, 3)
    return o, states[:, :, -1]


def _counted(T: int, N: int, C: int, mask: array | None) -> array:
    """1.0 where a token counts and 0.0 at masked tokens and the ragged end, [1 or B, N, C]."""
    if mask is None:
        return (mx.arange(N * C) < T).astype(mx.float32).reshape(1, N, C)
    padded = mx.pad(mask.astype(mx.float32), [(0, 0), (0, N * C - T)])
    return padded.reshape(-1, N, C)


def _to_chunks(x: array, N: int, C: int) -> array:
    """[B, T, H, D] of any dtype to [B, H, N, C, D] float32, zeros at the ragged end."""
    B, T, H, D = x.shape
    x = x.astype(mx.float32).transpose(0, 2, 1, 3)
    if N * C != T:
        x = mx.pad(x, [(0, 0), (0, 0), (0, N * C - T), (0, 0)])
    return x.reshape(B, H, N, C, D)


def _decay(s: array, distance: array, keep: array) -> array:
    """exp(-s * distance) where ``keep`` is 1, and 0 elsewhere, without forming a positive exponent."""
    return mx.exp(-s * mx.maximum(distance, 0)) * keep
