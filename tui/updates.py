"""An answer's tokens, gathered into a few updates a second with their figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ring_mlx import AnswerText, PrefillProgress, Revised, Statistics, ThinkingText
from tui.messages import Figures, Piece

UPDATE_EVERY_S = 0.06


class Updates:
    """Gathers an answer's tokens into a few updates a second, and measures figures until the session gives them.

    Args:
        number: The question's.
        cache_bytes: Bytes of snapshots now.
        clock: Seconds, from any start.
    """

    def __init__(
        self, number: int, cache_bytes: Callable[[], int] = lambda: 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._number, self._cache_bytes, self._clock = number, cache_bytes, clock
        self._thinking_text = self._answer_text = ""
        self._revised: str | None = None
        self.tokens = 0
        self._started, self._first = clock(), 0.0
        self._figures = Figures(cache_bytes=cache_bytes())
        self._thinking_tokens, self._thinking_s, self._thinking_from = 0, 0.0, 0.0
        self._taken_at = float("-inf")

    @property
    def figures(self) -> Figures:
        """The last figures, with the thought's size so far."""
        tokens = self._figures.thinking_tokens or self._thinking_tokens
        return replace(self._figures, thinking_tokens=tokens, thinking_s=self._thinking_s)

    def hear(self, event: object) -> None:
        """Take one event of a session."""
        if isinstance(event, PrefillProgress):
            self._figures = replace(self._figures, prompt_tokens=event.total, reused_tokens=event.reused)
        elif isinstance(event, ThinkingText):
            self.add(event.text, "", True, self._measured())
        elif isinstance(event, AnswerText):
            self.add("", event.text, False, self._measured())
        elif isinstance(event, Revised):
            self._figures, self._revised = self._measured(), event.thought
            self._thinking_text = self._answer_text = ""
            if not event.thought:
                self._thinking_tokens, self._thinking_s = 0, 0.0
        elif isinstance(event, Statistics):
            self._figures = Figures(**vars(event), cache_bytes=self._cache_bytes())

    def add(self, thinking_text: str, answer_text: str, is_thinking: bool, figures: Figures) -> None:
        """Take one token and the figures with it."""
        self._figures = figures
        self._thinking_text += thinking_text
        self._answer_text += answer_text
        if is_thinking:
            now = self._clock()
            self._thinking_from = self._thinking_from if self._thinking_tokens else now
            self._thinking_s = now - self._thinking_from
            self._thinking_tokens += 1

    def is_due(self) -> bool:
        """Whether the last update is long enough ago."""
        return self._clock() - self._taken_at >= UPDATE_EVERY_S

    def take(self) -> Piece:
        """The update; the next one starts empty."""
        piece = Piece(self._number, self._thinking_text, self._answer_text, self.figures, self._revised)
        self._thinking_text, self._answer_text, self._revised = "", "", None
        self._taken_at = self._clock()
        return piece

    def _measured(self) -> Figures:
        now = self._clock()
        self._first = self._first or now
        self.tokens += 1
        wait_s = self._first - self._started
        read = self._figures.prompt_tokens - self._figures.reused_tokens
        return replace(
            self._figures,
            generated_tokens=self.tokens,
            prompt_tps=read / max(wait_s, 1e-9),
            generation_tps=(self.tokens - 1) / (now - self._first) if self.tokens > 1 else 0.0,
            time_to_first_token_s=wait_s,
        )
