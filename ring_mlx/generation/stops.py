"""Ends streamed text at stop sequences, which may arrive in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from ring_mlx.generation.thinking import tag_prefix


class StopText:
    """Lets text through up to the first of some stop sequences."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Take the next text; returns what is certainly before a stop sequence."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max(tag_prefix(text, s) for s in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, at the end of all text."""
        held, self._held = self._held, ""
        return held
