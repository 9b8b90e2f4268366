"""Scores given tokens: logits in steps, and windows over texts longer than the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ring_mlx.errors import OptionError
from ring_mlx.generation.decoding import check_finite, largest_logit, prefill, step_sizes
from ring_mlx.model.model import Model

STEP_TOKENS = 512
Floats = npt.NDArray[np.float64]


class Window(NamedTuple):
    """Tokens from ``start`` to ``end``, of which those from ``first`` on are counted."""

    start: int
    first: int
    end: int


def windows(total: int, window: int, stride: int) -> list[Window]:
    """Windows over a text in which every token but its first is counted exactly once.

    The first window counts all it can; each later one counts the next ``stride`` tokens, or what is left, behind the
    ``window - stride`` or more before them.

    Args:
        total: Tokens of the text, at least two.
        window: Tokens read at a time.
        stride: Tokens counted at a time, fewer than ``window``.

    Raises:
        OptionError: If there is nothing to count, or a counted token would have nothing before it.
    """
    if total < 2:
        raise OptionError(f"a text of {total} tokens has none that follows another; give a longer one.")
    if window < 2 or not 0 < stride < window:
        raise OptionError(f"stride {stride} is not from 1 to {window - 1}, less than the window {window}; choose one.")
    found = [Window(0, 1, min(window, total))]
    while found[-1].end < total:
        counted = found[-1].end
        end = min(counted + stride, total)
        found.append(Window(end - window, counted, end))
    return found


def scored_logits(
    model: Model, ids: Sequence[int], first: int, cache: Any = None, step: int = STEP_TOKENS
) -> Iterator[tuple[mx.array, mx.array]]:
    """The logits that predict ``ids[first:]``, a step at a time; the head sees no other position.

    Args:
        ids: Tokens [T] that continue the cache.
        first: Index of the first that is predicted, at least 1.
        cache: Updated in place; None is an empty one.
        step: Tokens read at a time.

    Yields:
        Logits [n, vocab] float32 and the tokens that came [n].
    """
    cache = model.make_cache() if cache is None else cache
    whole = mx.array(list(ids), dtype=mx.int32)
    for _ in prefill(whole[: first - 1], model, cache, step_sizes(first - 1, step)):
        pass
    scored, targets = whole[first - 1 : -1], whole[first:]
    sizes = step_sizes(scored.size, step)
    for size, (done, logits) in zip(sizes, prefill(scored, model, cache, sizes, every_position=True), strict=True):
        check_finite(np.asarray(largest_logit(logits[0])).tolist())
        yield logits[0], targets[done - size : done]


def nats(logits: mx.array, targets: mx.array) -> mx.array:
    """``-log softmax(logits)[target]`` of every row: logits [n, vocab] float32 and targets [n] to [n]."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def token_nats(model: Model, ids: Sequence[int], first: int, cache: Any = None, step: int = STEP_TOKENS) -> Floats:
    """Nats of each of ``ids[first:]``; arguments as for `scored_logits`."""
    parts = [np.array(nats(*scored), dtype=np.float64) for scored in scored_logits(model, ids, first, cache, step)]
    return np.concatenate(parts)
