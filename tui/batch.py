"""Gathers generated tokens into a few updates a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tui.messages import Figures, Piece

UPDATE_EVERY_S = 0.06


class Batch:
    """Tokens of one answer between two updates of the screen.

    Args:
        number: The question's.
        clock: Seconds, from any start.
    """

    def __init__(self, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._number, self._clock = number, clock
        self._thinking_text = self._answer_text = ""
        self._revised: str | None = None
        self._figures = Figures()
        self._thinking_tokens, self._thinking_s, self._thinking_from = 0, 0.0, 0.0
        self._taken_at = float("-inf")

    @property
    def figures(self) -> Figures:
        """The last ones, with the thought's size so far."""
        tokens = self._figures.thinking_tokens or self._thinking_tokens
        return replace(self._figures, thinking_tokens=tokens, thinking_s=self._thinking_s)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits for the next update."""
        return not (self._thinking_text or self._answer_text)

    def add(self, thinking_text: str, answer_text: str, is_thinking: bool, figures: Figures | None = None) -> None:
        """Take one token; ``figures`` replace those so far."""
        self._figures = figures or self._figures
        self._thinking_text += thinking_text
        self._answer_text += answer_text
        if is_thinking:
            now = self._clock()
            self._thinking_from = self._thinking_from if self._thinking_tokens else now
            self._thinking_s = now - self._thinking_from
            self._thinking_tokens += 1

    def revise(self, thought: str, figures: Figures) -> None:
        """Forget what was told: the thought is this one, and the answer is told once more."""
        self._figures, self._revised = figures, thought
        self._thinking_text = self._answer_text = ""
        if not thought:
            self._thinking_tokens, self._thinking_s = 0, 0.0

    def is_due(self) -> bool:
        """Whether the last update is long enough ago."""
        return self._clock() - self._taken_at >= UPDATE_EVERY_S

    def take(self) -> Piece:
        """The update; the next one starts empty."""
        piece = Piece(self._number, self._thinking_text, self._answer_text, self.figures, self._revised)
        self._thinking_text, self._answer_text, self._revised = "", "", None
        self._taken_at = self._clock()
        return piece
