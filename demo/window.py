"""Softmax attention that looks back a few tokens only, for training: what lies further must come from the states.

A small hybrid can answer everything through its softmax layers and leave its decaying states idle. Where all of them but
the last are narrowed now and then, what the last one reads far back must have been carried there by the states.
Knows `SoftmaxAttention`, not training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from ring_mlx.model.attention import SoftmaxAttention


def window_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, window: int) -> mx.array:
    """Causal grouped-query softmax attention over the last ``window`` tokens, the query's own among them.

    Blocks of ``window`` queries look at their own block and the one before, so that memory grows with T, not T squared.

    Args:
        q: [B, H, T, D].
        k: [B, KV, T, D].
        v: [B, KV, T, D].
        scale: Factor of the products.
        window: At least 1.

    Returns:
        [B, H, T, D].
    """
    T = q.shape[2]
    blocks = -(-T // window)

    def split(x: mx.array) -> mx.array:
        B, H, _, D = x.shape
        x = mx.pad(x, ((0, 0), (0, 0), (0, blocks * window - T), (0, 0)))
        return x.reshape(B, H, blocks, window, D).transpose(0, 2, 1, 3, 4)

    def with_previous(x: mx.array) -> mx.array:
        before = mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        return mx.concatenate([before, x], axis=3).flatten(0, 1)

    q_blocks, k_blocks, v_blocks = split(q), split(k), split(v)
    back = mx.arange(window)[:, None] - mx.arange(-window, window)
    mask = (back >= 0) & (back < window)
    is_first = (mx.arange(blocks) == 0)[:, None, None] & (mx.arange(2 * window) < window)
    mask = mx.broadcast_to((mask & ~is_first)[None, :, None], (q.shape[0], blocks, 1, window, 2 * window))
    o = mx.fast.scaled_dot_product_attention(
        q_blocks.flatten(0, 1), with_previous(k_blocks), with_previous(v_blocks), scale=scale, mask=mask.flatten(0, 1)
    )
    o = o.reshape(q.shape[0], blocks, q.shape[1], window, -1).transpose(0, 2, 1, 3, 4)
    return o.reshape(*q.shape[:2], blocks * window, -1)[:, :, :T]


@contextmanager
def windowed(model: Any, window: int | None) -> Iterator[None]:
    """All softmax layers of the model but the last look back ``window`` tokens as long as the context lasts.

    Only without a cache and without padding, as in training.

    Args:
        model: A `ring_mlx.model.model.Model`.
        window: How far; None changes nothing.
    """
    if window is None:
        yield
        return
    layers = [layer.attention for layer in model.layers if isinstance(layer.attention, SoftmaxAttention)]
    narrow = layers[:-1]
    attend = SoftmaxAttention.attend

    def narrowly(
        self: SoftmaxAttention,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        mask: mx.array | str | None,
        cache: Any | None,
        *others: Any,
    ) -> mx.array:
        if not any(self is layer for layer in narrow):
            return attend(self, q, k, v, mask, cache, *others)
        if cache is not None or isinstance(mask, mx.array):
            raise ValueError("[demo.window] a window is for training, without cache and padding; leave both away")
        o = window_attention(q, k, v, self.scale, window)
        return o.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)

    with mock.patch.object(SoftmaxAttention, "attend", narrowly):
        yield
