"""Gathers generated tokens into a few updates a second; knows events and messages, no model and no widget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tui.messages import Figures, Piece

if TYPE_CHECKING:
    from ring_mlx import GenerationEvent

UPDATE_EVERY_S = 0.05


class Batch:
    """Tokens of one answer between two updates of the screen.

    Args:
        number: The question's.
        clock: Seconds, from any start.
    """

    def __init__(self, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._number, self._clock = number, clock
        self._thinking_text = self._answer_text = ""
        self._thinking_tokens, self._thinking_s, self._thinking_from = 0, 0.0, 0.0
        self._last: GenerationEvent | None = None
        self._taken_at = float("-inf")

    def add(self, event: GenerationEvent) -> None:
        """Take one token."""
        self._last = event
        self._thinking_text += event.thinking_text
        self._answer_text += event.answer_text
        if event.thinking:
            now = self._clock()
            self._thinking_from = self._thinking_from if self._thinking_tokens else now
            self._thinking_s = now - self._thinking_from
            self._thinking_tokens += 1

    def is_due(self) -> bool:
        """Whether the last update is long enough ago."""
        return self._clock() - self._taken_at >= UPDATE_EVERY_S

    def take(self) -> Piece:
        """The update, at least one token long; the next one starts empty."""
        e = self._last
        assert e is not None
        thinking_text, answer_text = self._thinking_text, self._answer_text
        self._thinking_text = self._answer_text = ""
        self._taken_at = self._clock()
        used = e.cached_tokens + e.prompt_tokens + e.generation_tokens
        figures = Figures(e.prompt_tps, e.generation_tps, e.time_to_first_token_s, used, e.peak_memory)
        return Piece(self._number, thinking_text, answer_text, self._thinking_tokens, self._thinking_s, figures)
