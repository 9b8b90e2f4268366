"""Softmax attention of a few queries over the arrays of a cache, in float32 MLX operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx


class Queries(NamedTuple):
    """New queries, and the keys and values that a cache holds, theirs among them.

    Attributes:
        q: [B, HQ, T, D], any float dtype.
        k: [B, HKV, L, D], any float dtype; HQ is a multiple of HKV. What lies behind the last query is not read.
        v: The same.
        offset: Position of the first query, one for all rows or [B] int32.
        scale: Factor of the scores.
        start: Tokens of padding before a row's first one, [B] int32; None is none.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    offset: int | mx.array
    scale: float
    start: mx.array | None = None


def naive_few_queries(*arguments: Any) -> mx.array:
    """Causal attention, heads of q sharing those of k and v in order.

    With i the place of a query in the cache, ``offset + start`` of the first one::

        o_i = sum_j softmax_j(scale * q_i k_j) v_j,  start <= j <= i

    A query in the padding looks at itself only.

    Args:
        arguments: The fields of `Queries`.

    Returns:
        o [B, T, HQ * D] in the dtype of ``q``, rounded once.
    """
    q, k, v, offset, scale, start = Queries(*arguments)
    B, HQ, T, D = q.shape
    HKV, L = k.shape[1:3]
    first = mx.array(0) if start is None else start.reshape(-1, 1, 1)
    own = mx.array(offset).reshape(-1, 1, 1) + first + mx.arange(T)[:, None]
    places = mx.arange(L)
    seen = ((places >= first) & (places <= own)) | (places == own)
    wide = q.astype(mx.float32).reshape(B, HKV, HQ // HKV, T, D)
    k, v = (x.astype(mx.float32)[:, :, None] for x in (k, v))
    scores = mx.where(seen[:, None, None], scale * (wide @ k.swapaxes(-1, -2)), -mx.inf)
    o = mx.softmax(scores, axis=-1) @ v
    return o.reshape(B, HQ, T, D).transpose(0, 2, 1, 3).reshape(B, T, HQ * D).astype(q.dtype)
