"""The fixed decay rates of lightning attention, which no checkpoint holds."""

from __future__ import annotations

import math

import mlx.core as mx


def alibi_slopes(num_heads: int) -> list[float]:
    """The ALiBi slope of each of H heads.

    ::

        slope_h = r^(h+1),  r = 2^(-2^-(log2 H - 3))

    for H a power of two. Otherwise the slopes of the power of two below, then every second slope of the one above.

    Source: ALiBi, arXiv 2108.12409, and its published interleaving for other head counts.
    """
    below = 2 ** int(math.log2(num_heads))
    return _geometric(below) + _geometric(2 * below)[::2][: num_heads - below]


def decay_rate(num_heads: int, layer: int, num_layers: int, offset: int | str = 0) -> mx.array:
    """Rate s of each head of a linear layer, for the decay exp(-s) a token.

    ::

        s_h = slope_h * (1 - n / (N - 1) + 1e-5),  n = i + offset, or max(0, i - 1) where it is clamped

    for layer i of all N, counted from 0, where ``offset`` is one of `config_values.DECAY_OFFSETS`; [H] float32, computed
    in float64 and rounded once.

    Source: arXiv 2510.19338, and the files that `config_values.DECAY_OFFSETS` names.
    """
    number = max(0, layer - 1) if isinstance(offset, str) else layer + offset
    factor = 1 - number / max(1, num_layers - 1) + 1e-5
    return mx.array([slope * factor for slope in alibi_slopes(num_heads)], dtype=mx.float32)


def _geometric(n: int) -> list[float]:
    ratio = 2.0 ** -(2.0 ** -(math.log2(n) - 3))
    return [ratio ** (h + 1) for h in range(n)]
