"""Logits and nats of given tokens, in steps and windows, and the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.errors import OptionError
from ring_mlx.generation.decoding import check_finite, largest_logit, prefill, step_sizes
from ring_mlx.model.model import Model
from ring_mlx.system.files import MOST_TEXT_BYTES, text_of
from ring_mlx.system.progress import Progress

DEFAULT_WINDOW = 4096
STEP_TOKENS = 512
Floats = npt.NDArray[np.float64]


class Window(NamedTuple):
    """Tokens from ``start`` to ``end``; those from ``first`` on are counted."""

    start: int
    first: int
    end: int


def windows(total: int, window: int, stride: int) -> list[Window]:
    """Windows over a text in which every token but its first is counted exactly once.

    The first window counts all it can; each later one counts the next ``stride`` tokens, or what is left, behind the
    ``window - stride`` or more before them. Raises OptionError if there is nothing to count, or a counted token would
    have nothing before it.
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


@dataclass(frozen=True)
class Perplexity:
    """Of a text: tokens counted, the mean of their nats and e to its power, and the windows they were read in."""

    tokens: int
    nats: float
    perplexity: float
    windows: int
    window: int
    stride: int


def read_text(path: Path, option: str) -> str:
    """A UTF-8 text file that an option names; raises OptionError if it cannot be read or is too long."""
    try:
        return text_of(path, MOST_TEXT_BYTES)
    except (OSError, ValueError) as e:
        raise OptionError(f"{option} {path} cannot be read ({e}); give a UTF-8 text file.") from None


def encode(text: str, tokenizer: TokenizerWrapper, name: str) -> list[int]:
    """The tokens of plain text; raises OptionError if there are fewer than two."""
    ids = [int(i) for i in tokenizer.encode(text)]
    if len(ids) < 2:
        raise OptionError(f"{name} has {len(ids)} tokens, so none follows another; give a longer text.")
    return ids


def window_of(context: int, window: int | None, stride: int | None, total: int) -> tuple[int, int]:
    """Window and stride, by default 4,096 or what the context or text holds, and half of that.

    Raises OptionError if the window exceeds the context.
    """
    if window is not None and window > context:
        raise OptionError(f"--window {window} exceeds the model's context of {context}; give less.")
    chosen = max(2, min(window or DEFAULT_WINDOW, context, total))
    return chosen, stride if stride is not None else max(1, chosen // 2)


def perplexity(
    model: Model, ids: Sequence[int], window: int, stride: int, progress: Progress | None = None
) -> Perplexity:
    """Read a text in sliding windows and count each token but the first once.

    ::

        perplexity = exp(mean over counted t of -log p(id_t | ids of its window before t))

    Args:
        window, stride: As for `windows`, which may refuse them.
        progress: Called with (tokens counted, all).
    """
    parts = windows(len(ids), window, stride)
    total, counted = 0.0, 0
    for start, first, end in parts:
        found = token_nats(model, ids[start:end], first - start)
        total, counted = total + float(found.sum()), counted + len(found)
        if progress:
            progress(counted, len(ids) - 1, f"perplexity {math.exp(min(total / counted, 700.0)):.4f}")
    mean = total / counted
    return Perplexity(counted, mean, math.exp(min(mean, 700.0)), len(parts), window, stride)


def table(found: Perplexity) -> str:
    read = f"{found.windows} windows of {found.window:,}" if found.windows > 1 else "1 window"
    return (
        f"perplexity {found.perplexity:.4f}, {found.nats:.5f} nats a token, {found.tokens:,} tokens counted in {read}"
    )
