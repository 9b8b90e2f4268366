"""Perplexity of a text under a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.scoring import token_nats, windows
from ring_mlx.model.model import Model
from ring_mlx.system.files import MOST_TEXT_BYTES, text_of
from ring_mlx.system.progress import Progress

DEFAULT_WINDOW = 4096


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

    Raises:
        OptionError: If the window exceeds the context.
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
        window, stride: As for `scoring.windows`, which may refuse them.
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
    """As text."""
    read = f"{found.windows} windows of {found.window:,}" if found.windows > 1 else "1 window"
    return (
        f"perplexity {found.perplexity:.4f}, {found.nats:.5f} nats a token, {found.tokens:,} tokens counted in {read}"
    )
